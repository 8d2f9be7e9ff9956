"""Settings of torch that hold for a whole program change nothing: autocast, default device and default dtype."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch
import ways
from hosts import Host, build_host
from transformers import DynamicCache

from rotatek_cache import RotateKCache
from rotatek_cache.cache.coordinator import Coordinator
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.calibration.gather import calibrate
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.codecs.fingerprint import fingerprint
from rotatek_cache.core.attention import attend
from rotatek_cache.hf.feature_choice import choose
from rotatek_cache.options import FitOptions
from rotatek_cache.token_pruning.interface import AttentionMethod
from rotatek_cache.token_pruning.methods.divprune import DivPrune
from rotatek_cache.token_pruning.methods.visionzip import VisionZip
from rotatek_cache.token_pruning.registry import TOKENS, token_method

ROOT = Path(__file__).parents[2]
STORED = [
    {"sparsity": 0},
    {"sparsity": 0.5},
    {"energy": 0.8},
    *({"rank": 8, "basis": basis} for basis in ("pca", "tempered", "oblique", "think", "spark")),
    {"rank": 8, "solver": "eigh"},
    {"rank": 8, "basis_bits": 8},
    {"sparsity": 0.5, "key_bits": "fp8"},
    {"rank": 16, "key_bits": 4, "value_sparsity": 0.5, "value_bits": 4, "basis_bits": 8},
    {"sparsity": 0.75, "key_bits": "auto", "value_sparsity": 0.75, "value_bits": "auto"},
    {"basis": "none", "sparsity": 0, "key_bits": 4},
]
METHODS = [name for name, method in TOKENS.items() if method.drops]
ATTENTIVE = [name for name in METHODS if issubclass(TOKENS[name], AttentionMethod)]
CHOSEN = [
    *({"sparsity": 0.5, "tokens": f"{name}:0.5"} for name in METHODS),
    {"budget": "0.95x"},
    {"budget": "0.6x", "tokens": "vl_cache"},
]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


def same(one, other):
    assert len(one) == len(other)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def read(options, method, setting):
    """What three layers store of a padded batch and answer to its next token, under a setting."""
    generator = torch.Generator().manual_seed(0)
    visual = torch.zeros(2, 90, dtype=torch.bool)
    visual[0, 4:80], visual[1, 20:70] = True, True
    mask = torch.ones(90, 90, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, ..., :9] = False
    draw = [torch.randn(3, 2, heads, 91, 32, generator=generator) for heads in (2, 2, 4)]
    with setting():
        positions = VisualPositions()
        coordinator = Coordinator(positions, method)
        layers = [LayerKV(options, positions, index) for index in range(3)]
        coordinator.learn_layers(layers)
        positions.announce(0, 90, visual)
        for layer, keys, values, queries in zip(layers, *draw, strict=True):
            layer.append(keys[..., :90, :], values[..., :90, :])
            coordinator.observe(layer, queries[..., :90, :], mask)
        positions.end_forward()
        positions.announce(90, 91, None)
        answers = []
        for layer, keys, values, queries in zip(layers, *draw, strict=True):
            layer.append(keys[..., 90:, :], values[..., 90:, :])
            for implementation in ("torch", "auto"):
                answers += attend(queries[..., 90:, :], layer.views(None), 0.2, impl=implementation)
    return [tensor for layer in layers for tensor in layer.tensors()] + answers


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("options", STORED, ids=str)
def test_what_is_stored_is_the_same(options, setting):
    fit = FitOptions(**options)
    same(read(fit, None, SETTINGS[setting]), read(fit, None, contextlib.nullcontext))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ATTENTIVE)
def test_tokens_chosen_by_attention_are_the_same(name, setting):
    fit, method = FitOptions(sparsity=0.5), token_method(f"{name}:0.5")
    same(read(fit, method, SETTINGS[setting]), read(fit, method, contextlib.nullcontext))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", [DivPrune(keep=0.4), VisionZip(keep=0.4, contextual=0.2)])
def test_tokens_chosen_by_features_are_the_same(method, setting):
    features, signal = [torch.randn(40, 16), torch.randn(30, 16)], torch.rand(70, 2 + 8)

    def chosen():
        found = choose(method, features, [16, 12], signal)
        return [choice.apply(image) for choice, image in zip(found, features, strict=True)]

    with SETTINGS[setting]():
        got = chosen()
    same(got, chosen())


@pytest.mark.parametrize("options", [*STORED, *CHOSEN], ids=str)
def test_generate_runs_under_autocast(llava: Host, options):
    inputs = ways.padded(llava.tiny)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = ways.generate(llava.plain, inputs, DynamicCache())
        cache = RotateKCache.for_study(**options)
        got = ways.generate(llava.attached, inputs, cache)
    assert torch.stack(got.logits).isfinite().all()
    assert {layer.kv.dtype for layer in cache.layers} == {torch.bfloat16}
    if options == {"sparsity": 0}:
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("under_autocast_first", [True, False])
def test_a_second_turn_may_change_autocast(llava: Host, under_autocast_first):
    inputs, cache, expected = ways.padded(llava.tiny), RotateKCache(sparsity=0.5), RotateKCache(sparsity=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=under_autocast_first):
        llava.attached(**inputs, past_key_values=cache)
    llava.attached(**inputs, past_key_values=expected)
    more = {"input_ids": torch.tensor([[20], [21]])}
    more["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not under_autocast_first):
        got = llava.attached(**more, past_key_values=cache).logits
    wanted = llava.attached(**more, past_key_values=expected).logits
    assert (got - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("options", [*STORED, *CHOSEN], ids=str)
def test_a_cpu_model_decodes_with_another_default_device(llava: Host, options):
    def logits(device):
        cache = RotateKCache.for_study(**options)
        llava.attached(**inputs, past_key_values=cache)
        with torch.device(device):
            return llava.attached(token, attention_mask=mask, past_key_values=cache).logits

    inputs, token = ways.padded(llava.tiny), torch.tensor([[20], [21]])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    assert torch.equal(logits("meta"), logits("cpu"))


@pytest.mark.parametrize("setting", ["autocast", "float64", "bfloat16"])
def test_calibration_under_a_setting(llava: Host, setting, tmp_path):
    """Moments are those of what the model gives, which autocast rounds; the file made of them is the same."""
    prompts = [llava.tiny.inputs(llava.tiny.prompt(seed)) for seed in range(2)]
    state = calibrate(llava.attached, prompts, Calibration(fingerprint(llava.attached), "llava"))
    with SETTINGS[setting]():
        again = calibrate(llava.attached, prompts, Calibration(fingerprint(llava.attached), "llava"))
        made = {at: moments.basis("oblique") for at, moments in state.moments.items()}
        again.write_basis(tmp_path / "basis.safetensors")
        RotateKCache(sparsity=0.5, basis=tmp_path / "basis.safetensors")
    for at, moments in state.moments.items():
        wanted = moments.basis("oblique")
        same(list(made[at].values()), list(wanted.values()))
        other = again.moments[at].scatter
        assert (other - moments.scatter).norm() < 0.05 * moments.scatter.norm()


MAKES = {
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
}
WHOLE = {"arange", "randint", "randperm", "tensor"}  # their dtype follows from what they are given


@pytest.mark.parametrize("folder", ["rotatek_cache", "kernels/rotatek_kernels", "integrations"])
def test_every_tensor_made_says_where_and_of_what(folder):
    unsaid = []
    for path in (ROOT / folder).rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in MAKES:
                if ast.unparse(call.func.value) != "torch":
                    continue
                given = {argument.arg for argument in call.keywords}
                wanted = {"device"} if call.func.attr in WHOLE else {"device", "dtype"}
                if "out" not in given and wanted - given:
                    unsaid.append(f"{path.relative_to(ROOT)}:{call.lineno} {ast.unparse(call)}")
    assert not unsaid


def test_families_with_positions_of_their_own_run_under_autocast():
    host = build_host("qwen2_5_vl")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ways.generate(host.attached, ways.padded(host.tiny), RotateKCache(sparsity=0.5))
    assert torch.stack(got.logits).isfinite().all()
