"""Lossy caches in use: a row's result is its own, whatever its batch, padding and turn; the error falls with rank."""

import copy
import itertools

import pytest
import torch
from checks import AKVQ, decode
from hosts import build_host

from rotatek_cache import RotateKCache
from rotatek_cache.calibration.gather import calibrate
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.codecs.fingerprint import fingerprint
from rotatek_cache.codecs.registry import CODECS

OPTIONS = [
    *({"rank": 8, "basis": name, "always_compress": True} for name in CODECS if name not in ("none", "hadamard")),
    {"sparsity": 0, "basis": "none", "key_bits": 4, "value_basis": "none", "value_bits": 4, "always_compress": True},
    AKVQ | {"always_compress": True, "tokens": "akvq_vl:0.2,text_layers=1"},
    AKVQ | {"key_bits": 8, "value_bits": 4},
    {"energy": 0.7, "always_compress": True, "value_basis": "hadamard", "value_bits": 4},
    {"sparsity": 0.5, "key_bits": "fp8", "value_sparsity": 0.5, "value_bits": "fp8", "always_compress": True},
    {"rank": 8, "solver": "eigh", "always_compress": True},
    {"energy": 0.7, "always_compress": True},
    {"sparsity": 0.8, "key_bits": "auto", "value_sparsity": 0.7, "value_bits": "auto", "always_compress": True},
    {"energy": 0.8, "basis": "pca", "value_sparsity": 0.5, "value_bits": 4},
    {"sparsity": 0.0, "key_bits": 4, "always_compress": True},
    {"sparsity": 0.5, "key_bits": 4, "value_sparsity": 0.5, "value_bits": 4, "always_compress": True},
    {"sparsity": 0.0, "value_sparsity": 0.75, "always_compress": True},
    {"rank": 8, "basis_bits": 8, "always_compress": True},
    {"sparsity": 0.8, "key_bits": "auto", "value_sparsity": 0.5, "basis_bits": 8, "always_compress": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_row_does_not_depend_on_its_batch(llava, options):
    prompts = [llava.tiny.prompt(1, images=(0,)), llava.tiny.prompt(2, images=(0, 0), text=2, tail=3)]
    tokens = torch.tensor([[20, 30, 40, 50], [21, 31, 41, 51]])
    together = decode(llava, llava.tiny.inputs(*prompts), RotateKCache.for_study(**options), tokens)
    for row, prompt in enumerate(prompts):
        alone = decode(llava, llava.tiny.inputs(prompt), RotateKCache.for_study(**options), tokens[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_beams_and_selection_keep_each_row_its_own(llava, options):
    inputs = llava.tiny.inputs(llava.tiny.prompt(1), llava.tiny.prompt(2, text=2, tail=3))
    tokens = torch.tensor([[20, 30, 40], [21, 31, 41]])
    cache = RotateKCache.for_study(**options)
    llava.attached(**inputs, past_key_values=cache, use_cache=True)
    chosen = copy.deepcopy(cache)
    index = torch.tensor([1, 0, 1])
    chosen.reorder_cache(torch.tensor([1, 0]))
    chosen.batch_select_indices(torch.tensor([0, 1, 0]))
    for held, rows in ((cache, torch.arange(2)), (chosen, index)):
        mask = torch.nn.functional.pad(inputs["attention_mask"][rows], (0, 3), value=1)
        positions = (mask.cumsum(1) - 1)[:, -3:]
        logits = llava.attached(
            input_ids=tokens[rows], attention_mask=mask, position_ids=positions, past_key_values=held, use_cache=True
        ).logits
        if held is cache:
            expected = logits
    torch.testing.assert_close(logits, expected[index], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", ["rotatek", "pca", "oblique"])
def test_the_error_of_the_logits_falls_with_the_rank(family, method):
    host = build_host(family)
    inputs = host.tiny.inputs(*(host.tiny.prompt(seed) for seed in range(3)))
    first = host.attached(**inputs, past_key_values=(dense := RotateKCache(sparsity=0)), use_cache=True).logits
    token = first[:, -1:].argmax(-1)

    def following(cache: RotateKCache) -> torch.Tensor:
        return host.attached(input_ids=token, past_key_values=cache, use_cache=True).logits

    expected = following(dense)
    errors = []
    for rank in (4, 12, 24, 32):
        cache = RotateKCache.for_study(rank=rank, basis=method, solver="eigh", always_compress=True)
        host.attached(**inputs, past_key_values=cache, use_cache=True)
        errors.append(float((following(cache) - expected).norm() / expected.norm()))
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.8, "key_bits": "auto", "value_sparsity": 0.8, "value_bits": "auto"},
        {"sparsity": 0.8, "key_bits": "auto", "value_sparsity": 0.8, "value_bits": "auto", "allocation": "heads"},
        {"sparsity": 0.8, "key_bits": "auto", "allocation": "layers"},
        {"sparsity": 0.5, "allocation": "heads"},
        {"rank": 16, "key_bits": 4, "value_sparsity": 0.5, "value_bits": 8, "allocation": "heads"},
        {"energy": 0.8, "allocation": "heads"},
        AKVQ | {"always_compress": True, "tokens": "akvq_vl:0.2,text_layers=1"},
        AKVQ | {"key_bits": 8, "value_bits": 4},
        {"energy": 0.7, "always_compress": True, "value_basis": "hadamard", "value_bits": 4},
        {"sparsity": 0.5, "key_bits": "fp8", "value_sparsity": 0.25, "value_bits": "fp8"},
    ],
    ids=str,
)
def test_a_calibrated_basis_gives_each_row_its_own_in_any_batch(llava, tmp_path, options):
    tiny = llava.tiny
    state = Calibration(fingerprint(llava.attached), "llava")
    calibrate(llava.attached, (tiny.inputs(tiny.prompt(seed)) for seed in range(4)), state)
    state.write_basis(tmp_path / "basis.safetensors", value_method="output")
    options = {**options, "basis": str(tmp_path / "basis.safetensors"), "always_compress": True}
    prompts = [tiny.prompt(11), tiny.prompt(12, images=(0, 0), text=2)]
    tokens = torch.tensor([[20, 30, 40, 50], [21, 31, 41, 51]])
    together = decode(llava, tiny.inputs(*prompts), RotateKCache.for_study(**options), tokens)
    for row, prompt in enumerate(prompts):
        alone = decode(llava, tiny.inputs(prompt), RotateKCache.for_study(**options), tokens[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], atol=2e-3, rtol=1e-3)
