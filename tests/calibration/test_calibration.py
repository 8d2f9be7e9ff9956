"""Calibrated bases: one pass or two, stopping and resuming, what a file gives, and which files are refused."""

import copy
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import rotatek_cache
from rotatek_cache import FitOptions, RotateKCache, attach
from rotatek_cache.calibration import images as calibrate_images
from rotatek_cache.calibration.gather import calibrate, output_projections
from rotatek_cache.calibration.moments import Calibration, Moments
from rotatek_cache.cli.app import app
from rotatek_cache.codecs.basis_file import load_basis
from rotatek_cache.codecs.fingerprint import fingerprint, same_fingerprint, sample_weight
from rotatek_cache.codecs.registry import codecs_for
from rotatek_cache.codecs.sealing import Sealer
from rotatek_cache.codecs.shared_basis import StateBasis
from rotatek_cache.core.quantization import HeadCodes
from rotatek_cache.hf.chat import open_image
from rotatek_cache.options import Allocation

IMAGES = 6


@pytest.fixture(scope="module")
def prompts(request):
    from hosts import build_host

    tiny = build_host("llava").tiny
    return [tiny.inputs(tiny.prompt(seed)) for seed in range(IMAGES)]


@pytest.fixture
def state(llava):
    return Calibration(fingerprint(llava.attached), "llava")


@pytest.fixture(scope="module")
def basis_file(prompts, tmp_path_factory):
    from hosts import build_host

    model = build_host("llava").attached
    path = tmp_path_factory.mktemp("calibrated") / "basis.safetensors"
    calibrate(model, prompts, Calibration(fingerprint(model), "llava")).write_basis(path, source="six drawn images")
    return path


def contents(path) -> dict[str, torch.Tensor]:
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def test_moments_are_those_within_images_and_add_up():
    states = [torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)]
    states[0][0, :, :2] = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    states[1][0, :, :2] = torch.tensor([[5.0, 0.0], [5.0, 4.0]])
    total = Moments.of(states[0], 0) + Moments.of(states[1], 1)
    assert (
        total.scatter[0, :2, :2].tolist() == [[2, 0], [0, 8]] and total.tokens == 4 and total.sample.shape == (1, 4, 8)
    )
    basis = total.basis()
    assert basis["spectrum"][0, :3].tolist() == [2, 0.5, 0]
    assert basis["encoder"][0, :2, :2].abs().tolist() == [[0, 1], [1, 0]]


def test_a_seal_with_a_basis_file_sums_no_scatter(basis_file, monkeypatch):
    """What it multiplies states by is the file's basis: no product of states with states, no eigenproblem."""

    class Products(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.shapes = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            assert "linalg" not in func.__name__ and "eig" not in func.__name__
            if any(word in func.__name__ for word in ("mm", "matmul", "einsum")):
                self.shapes.append(tuple(out.shape[-2:]))
            return out

    monkeypatch.setattr("rotatek_cache.core.compiled._steps", lambda: None)  # torch is what can be watched
    sealer = Sealer(FitOptions(rank=8, key_bits=4, value_sparsity=0.5, basis=str(basis_file)), 0)
    heads, width = sealer.calibrated.state(0, "key").encoder.shape[:2]
    keys, values = torch.randn(2, heads, 100, width)
    sealer.store_keys(keys, [(0, 100)], None, None)  # makes what the model's requests share
    with Products() as products:
        sealer.store_keys(keys, [(0, 100)], None, None)
        sealer.store_values(values, [(0, 100)])
    assert products.shapes and all(shape[0] in (1, 100) for shape in products.shapes), products.shapes


def test_static_selection_ranks_channels_by_query_times_key_power():
    moments = Moments(
        torch.diag(torch.tensor([4.0, 9.0, *[0.0] * 6], dtype=torch.float64))[None], 1, torch.zeros(1, 2, 8)
    )
    moments.cost = torch.diag(torch.tensor([3.0, 1.0, *[1.0] * 6], dtype=torch.float64))[None]
    basis = moments.basis("leank")
    assert basis["encoder"][0, :, 0].tolist() == [1, *[0] * 7]
    assert basis["spectrum"][0, :2].tolist() == [12, 9]


def test_a_calibrated_oblique_basis_has_unit_decoder_power_and_inverts_its_encoder():
    generator = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(1, 50, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    moments = Moments.of(keys, 0, queries.mT @ queries)
    basis = moments.basis("oblique")
    torch.testing.assert_close(basis["decoder"].mT @ basis["encoder"], torch.eye(8)[None], atol=1e-5, rtol=0)
    covariance = moments.scatter.float() / 50
    torch.testing.assert_close(
        (basis["encoder"].mT @ covariance @ basis["encoder"])[0].diagonal(), basis["spectrum"][0]
    )


@pytest.mark.parametrize("method", ["pca", "oblique", "leank"])
def test_every_method_is_exact_at_full_rank(llava, prompts, method, tmp_path):
    state = calibrate(llava.attached, prompts[:2], Calibration(fingerprint(llava.attached), "llava"))
    state.write_basis(tmp_path / "basis.safetensors", method=method)
    inputs = llava.tiny.inputs(llava.tiny.prompt(20))
    expected = llava.plain.generate(**inputs, max_new_tokens=5, do_sample=False)
    cache = RotateKCache.for_study(rank=32, basis=str(tmp_path / "basis.safetensors"), always_compress=True)
    assert torch.equal(
        llava.attached.generate(**inputs, max_new_tokens=5, do_sample=False, past_key_values=cache), expected
    )


def test_streaming_never_holds_an_image_densely(llava, basis_file):
    inputs = llava.tiny.inputs(llava.tiny.prompt(20), llava.tiny.prompt(21, text=3))
    expected = llava.plain.generate(**inputs, max_new_tokens=5, do_sample=False)
    options = {"basis": str(basis_file), "rank": 32, "always_compress": True}
    streaming = RotateKCache.for_study(streaming=True, **options)
    tokens = llava.attached.generate(
        **inputs, max_new_tokens=5, do_sample=False, past_key_values=streaming, prefill_chunk_size=9
    )
    assert torch.equal(tokens, expected)
    assert all(len(layer.kv.segments) > 2 and layer.kv.pending is None for layer in streaming.layers)


def test_streaming_needs_a_calibrated_basis():
    with pytest.raises(ValueError, match="streaming needs a calibrated basis"):
        RotateKCache(sparsity=0.5, streaming=True)


def test_stopping_and_resuming_gives_the_same_file(llava, prompts, basis_file, tmp_path):
    first = Calibration(fingerprint(llava.attached), "llava")
    calibrate(llava.attached, prompts[:2], first).save(tmp_path / "state.safetensors")
    resumed = Calibration.load(tmp_path / "state.safetensors", fingerprint(llava.attached))
    assert resumed.images == 2
    calibrate(llava.attached, prompts[2:], resumed).write_basis(tmp_path / "again.safetensors")
    once, again = contents(basis_file), contents(tmp_path / "again.safetensors")
    assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)


def test_full_rank_gives_the_dense_tokens(llava, prompts, basis_file):
    inputs = llava.tiny.inputs(llava.tiny.prompt(20), llava.tiny.prompt(21, text=3))
    expected = llava.plain.generate(**inputs, max_new_tokens=5, do_sample=False)
    cache = RotateKCache.for_study(rank=32, basis=str(basis_file), always_compress=True)
    assert torch.equal(
        llava.attached.generate(**inputs, max_new_tokens=5, do_sample=False, past_key_values=cache), expected
    )


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5},
        {"rank": 12},
        {"energy": 0.9},
        {"sparsity": 0.5, "key_bits": 4, "value_sparsity": 0.5, "value_bits": 8},
        {"sparsity": 0.8, "key_bits": "auto", "value_sparsity": 0.8, "value_bits": "auto"},
    ],
    ids=str,
)
def test_beams_padding_and_second_turns_run_on_it(llava, basis_file, options):
    inputs = llava.tiny.inputs(llava.tiny.prompt(20), llava.tiny.prompt(21, text=3))
    cache = RotateKCache.for_study(basis=str(basis_file), **options)
    tokens = llava.attached.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False, past_key_values=cache)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 4
    cache = RotateKCache.for_study(basis=str(basis_file), **options)
    first = llava.attached.generate(**inputs, max_new_tokens=4, do_sample=False, past_key_values=cache)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    second = llava.attached.generate(
        input_ids=first, attention_mask=mask, max_new_tokens=3, do_sample=False, past_key_values=copy.deepcopy(cache)
    )
    assert second.shape[1] == first.shape[1] + 3
    assert "rank" in str(cache.report())


def test_the_request_owns_codes_and_means_only(llava, prompts, basis_file):
    options = {"sparsity": 0.75, "key_bits": "auto", "value_sparsity": 0.75, "value_bits": "auto"}
    cache = RotateKCache.for_study(basis=str(basis_file), **options)
    llava.attached(**prompts[0], past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        segment = layer.kv.segments[0]
        heads, tokens, token_bytes = segment.keys.data.shape
        assert segment.keys.data.nbytes == heads * tokens * token_bytes and token_bytes <= 32 * 2 / 4
        assert [t.shape for t in segment.keys.basis.tensors()] == [(heads, 1, 32)]  # delta alone
    online = RotateKCache.for_study(basis="pca", **options)
    llava.attached(**prompts[0], past_key_values=online, use_cache=True)
    assert cache.nbytes() < online.nbytes()


@pytest.mark.parametrize(("dtype", "means"), [(torch.float32, 1), (torch.float16, 1), (torch.bfloat16, 2)])
@pytest.mark.parametrize("tokens", [12, 300])
def test_a_request_takes_what_the_sparsity_leaves_and_a_token_for_means(basis_file, dtype, means, tokens):
    """What docs promise of automatic bits; half precision alone is what bits are counted against."""
    codec = codecs_for(FitOptions(sparsity=0.75, key_bits="auto", basis=str(basis_file)), layer=1)[0]
    stored = codec.store(torch.randn(2, tokens, 32).to(dtype), [(0, tokens)])
    token = 2 * 32 * 2  # bytes of two dense heads in half precision
    assert stored.data.nbytes == tokens * token / 4
    assert sum(held.nbytes for held in stored.basis.tensors()) == means * token * (2 if dtype == torch.float32 else 1)
    assert codec.stored_bytes(tokens, 32, dtype) * 2 == stored.data.nbytes + means * 2 * 32 * dtype.itemsize


def test_caches_of_one_model_share_the_file(basis_file):
    assert load_basis(basis_file) is load_basis(str(basis_file))


def test_codes_of_the_file_are_nearly_as_good_as_codes_of_the_image(llava, prompts, basis_file):
    def logits(**options):
        cache = RotateKCache.for_study(**options)
        out = llava.attached(**prompts[0], past_key_values=cache, use_cache=True).logits[:, -1:]
        return llava.attached(input_ids=out.argmax(-1), past_key_values=cache, use_cache=True).logits

    exact = logits(sparsity=0)
    options = {"sparsity": 0.5, "key_bits": 8, "value_sparsity": 0.0, "value_bits": 8}
    own = (logits(basis="pca", **options) - exact).norm()
    calibrated = (logits(basis=str(basis_file), **options) - exact).norm()
    assert calibrated < 4 * own


def test_another_models_basis_is_refused(llava, prompts, basis_file):
    other = attach(llava.tiny.build())
    with torch.no_grad():
        other.get_parameter("model.language_model.layers.0.self_attn.k_proj.weight").mul_(2)
    cache = RotateKCache(sparsity=0.5, basis=str(basis_file))
    with pytest.raises(ValueError, match="was calibrated on another model"):
        other(**prompts[0], past_key_values=cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_is_itself_in_another_dtype(llava, dtype):
    assert same_fingerprint(fingerprint(copy.deepcopy(llava.plain).to(dtype)), fingerprint(llava.attached))


def test_a_model_is_known_by_a_part_of_its_weights():
    weight = torch.randn(6, 50)
    whole = sample_weight(weight)
    parts = [sample_weight(weight[rows], 50 * rows.start, 300) for rows in (slice(0, 2), slice(2, 6))]
    assert torch.equal(torch.where(parts[0].isnan(), parts[1], parts[0]), whole)
    assert all(same_fingerprint(part, whole) and part.isnan().any() for part in parts)
    assert not same_fingerprint(sample_weight(weight[:2] + 1, 0, 300), whole)


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5, "value_sparsity": 0.5, "value_bits": 4},
        {"sparsity": 0.6, "key_bits": "auto", "value_sparsity": 0.6, "value_bits": "auto"},
        {"sparsity": 0.6, "key_bits": "auto", "allocation": Allocation("heads")},
        {"energy": 0.9},
    ],
    ids=str,
)
def test_some_of_the_heads_are_sealed_as_all_are(basis_file, options):
    """As where processes share a model: each fits and stores its own heads, with the widths that all agree on."""
    fit = FitOptions(basis=str(basis_file), **options)
    file = load_basis(basis_file)
    heads, width = file.state(0, "key").encoder.shape[:2]
    keys, values = torch.randn(heads, 12, width), torch.randn(heads, 12, width)
    span = [(0, 5), (5, 7)]
    all_of_them = Sealer(fit, 0)
    whole = [all_of_them.store_keys(keys, span, None, None), all_of_them.store_values(values, span)]
    for head in range(heads):
        part = slice(head, head + 1)
        sealer = Sealer(fit, 0, part)
        own = [sealer.store_keys(keys[part], span, None, None), sealer.store_values(values[part], span)]
        for stored, expected in zip(own, whole, strict=True):
            if isinstance(expected.code, HeadCodes):
                assert stored.code.parts == expected.code.parts[part]
                numbers = stored.code.unpack(stored.code.split(stored.data))
                full = expected.code.unpack(expected.code.split(expected.data))[part]
                assert torch.equal(numbers, full[..., : numbers.shape[-1]])
            else:
                assert stored.code == expected.code
                assert torch.equal(stored.data, expected.data[part])
            if expected.basis is not None:
                rank = stored.basis.B.shape[-1]
                assert torch.equal(stored.basis.B, expected.basis.B[part][..., :rank])
                torch.testing.assert_close(stored.basis.delta, expected.basis.delta[part])


def test_missing_truncated_and_foreign_files_are_named(basis_file, tmp_path, state):
    with pytest.raises(ValueError, match=r"nowhere.safetensors does not exist"):
        RotateKCache(sparsity=0.5, basis="nowhere.safetensors")
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(basis_file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"truncated.safetensors cannot be read"):
        RotateKCache(sparsity=0.5, basis=str(truncated))
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(ValueError, match="no basis file of this version"):
        RotateKCache(sparsity=0.5, basis=str(foreign))
    with pytest.raises(ValueError, match="cannot be read"):
        Calibration.load(truncated, state.fingerprint)
    with pytest.raises(ValueError, match="is no calibration state of this version"):
        Calibration.load(basis_file, state.fingerprint)
    with pytest.raises(ValueError, match="no visual token was seen"):
        Calibration(torch.zeros(1), "llava").write_basis(tmp_path / "empty.safetensors")


def test_a_state_of_another_model_is_refused(llava, prompts, state, tmp_path):
    calibrate(llava.attached, prompts[:1], state).save(tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match="belongs to another model"):
        Calibration.load(tmp_path / "state.safetensors", torch.zeros(3))


@pytest.fixture
def pages(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    source = Path(rotatek_cache.__file__).parent / "reader" / "pages"
    for page in sorted(source.glob("*.png"))[:3]:
        shutil.copy(page, folder)
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


def test_the_command_calibrates_the_reader_and_skips_what_it_cannot_read(pages, tmp_path):
    out = tmp_path / "basis.safetensors"
    result = run("--images", pages, "--out", out)
    assert result.exit_code == 0, result.output
    assert "from 3 images (1 skipped)" in result.output
    assert load_basis(out).images == 3
    assert not out.with_name("basis.safetensors.state").exists()


def test_a_stopped_command_goes_on_where_it_was_saved(pages, tmp_path, monkeypatch):
    whole, again = tmp_path / "whole.safetensors", tmp_path / "again.safetensors"
    assert run("--images", pages, "--out", whole).exit_code == 0
    opened = []

    def stop(path):
        opened.append(path.name)
        if len(opened) == 3:
            raise KeyboardInterrupt
        return open_image(path)

    monkeypatch.setattr(calibrate_images, "open_image", stop)
    assert run("--images", pages, "--out", again, "--save-every", 1).exit_code != 0
    opened.clear()
    monkeypatch.setattr(calibrate_images, "open_image", lambda path: opened.append(path.name) or open_image(path))
    assert run("--images", pages, "--out", again).exit_code == 0
    assert len(opened) == 2
    first, second = contents(whole), contents(again)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_stopped_command_refuses_other_images_and_questions(pages, tmp_path, monkeypatch):
    out = tmp_path / "basis.safetensors"

    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate_images, "open_image", stop)
    assert run("--images", pages, "--out", out).exit_code != 0
    monkeypatch.undo()
    (pages / "broken.png").unlink()
    for arguments in (["--images", pages], ["--images", pages, "--question", "row 1?"]):
        result = run(*arguments, "--out", out)
        assert result.exit_code == 2
        assert "was begun with other images, questions or texts" in result.output.replace("\n", " ")
    saved = out.with_name("basis.safetensors.state")
    save_file({"fingerprint": torch.zeros(1)}, saved, metadata={"format": "rotatek-calibration-3"})
    result = run("--images", pages, "--out", out).output.replace("\n", " ")
    assert "of this version" in result and "'rotatek-calibration-3': delete it, or give another --out" in result
    saved.unlink()
    assert run("--images", pages, "--out", out).exit_code == 0


def test_a_place_that_cannot_be_written_is_named_before_the_work(pages, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    result = run("--images", pages, "--out", tmp_path / "file" / "basis.safetensors")
    assert result.exit_code == 2 and "cannot be written" in result.output.replace("\n", " ")


@pytest.mark.parametrize("lost", ["fingerprint", "layers.0.key.spectrum", "layers.0.value.low4"])
def test_a_basis_file_that_lacks_something_is_named(basis_file, tmp_path, lost):
    with safe_open(str(basis_file), framework="pt") as file:
        metadata = file.metadata()
    tensors = contents(basis_file)
    del tensors[lost]
    save_file(tensors, tmp_path / "less.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="is incomplete or holds something else"):
        load_basis(tmp_path / "less.safetensors")
    save_file({**contents(basis_file), "extra": torch.zeros(1)}, tmp_path / "more.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="is incomplete or holds something else"):
        load_basis(tmp_path / "more.safetensors")


def test_the_working_directory_may_change(llava, basis_file, monkeypatch):
    monkeypatch.chdir(basis_file.parent)
    cache = RotateKCache(basis=basis_file.name, rank=8)
    monkeypatch.chdir("/")
    llava.attached(**llava.tiny.inputs(llava.tiny.prompt(1)), past_key_values=cache, use_cache=True)
    cache.reset()
    assert "once per model" in str(cache.report())


def test_a_dataset_gives_the_file_that_a_folder_of_its_images_gives(pages, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = sorted(pages.glob("*.png"))  # the broken one first
    rows = datasets.Dataset.from_dict({"name": [f.name for f in files], "picture": [str(f) for f in files]})
    rows = rows.cast_column("picture", datasets.Image())
    datasets.DatasetDict({"seen": rows}).save_to_disk(tmp_path / "saved")
    assert run("--images", pages, "--out", tmp_path / "folder.safetensors").exit_code == 0
    result = run("--images", tmp_path / "saved", "--split", "seen", "--out", tmp_path / "dataset.safetensors")
    assert result.exit_code == 0 and "from 3 images (1 skipped)" in result.output
    first, second = contents(tmp_path / "folder.safetensors"), contents(tmp_path / "dataset.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    wrong = run("--images", tmp_path / "saved", "--split", "train", "--out", tmp_path / "x.safetensors")
    assert wrong.exit_code == 2 and "--split must be one of seen, got 'train'" in wrong.output
    rows.remove_columns("picture").save_to_disk(tmp_path / "words")
    wrong = run("--images", tmp_path / "words", "--out", tmp_path / "x.safetensors")
    assert wrong.exit_code == 2 and "has no image column, only name" in wrong.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--images", "nowhere", "--out", "x.safetensors"], "--images must be a folder, or a dataset as owner/name"),
        (["--images", "/no/where", "--out", "x.safetensors"], "--images must be a folder, or a dataset as owner/name"),
        (["--images", ".", "--out", "basis.pt"], "--out must end in .safetensors"),
        (
            ["--images", ".", "--out", "x.safetensors", "--method", "svd"],
            "--method must be one of fisher, pca, oblique, leank",
        ),
    ],
)
def test_the_command_names_bad_arguments(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output.replace("\n", " ")


@pytest.mark.parametrize(("bits", "amount"), [("auto", {"sparsity": 0.9}), (4, {"rank": 16}), (None, {"rank": 16})])
def test_heads_that_are_worth_more_get_more_and_the_whole_budget_is_kept(llava, basis_file, bits, amount):
    """Bytes come from storage: what one head gives up another has, and no more is stored than for equal parts."""
    inputs = llava.tiny.inputs(llava.tiny.prompt(20), llava.tiny.prompt(21, text=3))
    stored = {}
    for allocation in ("uniform", "layers", ("heads", "gain", 0.0), ("heads", "gain", 0.5)):
        cache = RotateKCache.for_study(
            basis=str(basis_file), key_bits=bits, allocation=allocation, always_compress=True, **amount
        )
        llava.attached(**inputs, past_key_values=cache, use_cache=True)
        keys = [layer.kv.segments[0].keys for layer in cache.layers]
        stored[allocation] = sum(part.data.nbytes for part in keys)
        if isinstance(allocation, tuple):
            assert all(part.data.dim() == 1 for part in keys)  # the heads follow one another and none is padded
    tokens = sum(len(layer.kv.segments[0].positions) for layer in cache.layers)
    heads = llava.attached.config.text_config.num_key_value_heads
    budget = int(0.1 * 16 * 32) / 8 if bits == "auto" else 16 * (bits or 32) / 8
    assert all(size <= tokens * heads * budget for size in stored.values())
    assert stored["heads", "gain", 0.0] > tokens * heads * (budget - 2)  # what is left is less than a step per head


def of_two_directions(step):
    """A basis of states that lie in two of eight channels, of variances 4 and 1 and gains .5 and 3."""
    return StateBasis(
        encoder=torch.eye(8)[None],
        decoder=torch.eye(8)[None],
        spectrum=torch.tensor([[4.0, 1.0, *[0.0] * 6]]),
        gain=torch.tensor([[0.5, 3.0, *[1.0] * 6]]),
        low={},
        step=step,
    )


def test_worth_by_hand():
    state = of_two_directions({})
    assert state.worth("variance")[0, :2].tolist() == [4, 1]
    assert state.worth("gain")[0, :2].tolist() == [2, 3]
    assert state.worth("relative")[0, :2].tolist() == pytest.approx([0.8, 0.2])
    assert state.ranks_for_energy(0.8) == [1] and state.ranks_for_energy(0.81) == [2]


def test_codes_leave_what_rounding_does():
    state = of_two_directions({2: torch.tensor([[3.0, 6.0, *[0.0] * 6]]), 4: torch.full((1, 8), 0.6)})
    found = state.distortion("gain", (4, 2))[0].T
    # 9 / 12 and .36 / 12 of the first; two bits of the second are no better than none.
    assert found[0].tolist() == pytest.approx([2, 0.375, 0.015]) and found[1].tolist() == pytest.approx([3, 3, 0.09])
    assert not found[2:].any()


def test_files_may_be_read_as_the_umask_says(state, tmp_path):
    before = os.umask(0o027)
    try:
        state.save(tmp_path / "state")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o640


def test_gain_is_what_a_unit_of_distortion_costs():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 60, 8, generator=generator) * torch.logspace(0, -1, 8)
    columns = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    moments = Moments.of(values, 0, (columns.mT @ columns)[None])
    basis = moments.basis("pca")
    outputs = columns @ basis["decoder" if "decoder" in basis else "encoder"][0].double()
    torch.testing.assert_close(basis["gain"][0].double(), outputs.square().sum(0), rtol=1e-4, atol=1e-4)
    # Weighted by the projection, the same number of directions leaves less error in the outputs.
    weighted = moments.basis("output")

    def error(found: dict[str, torch.Tensor]) -> float:
        centred = values[0] - values[0].mean(0)
        kept = centred @ found["encoder"][0, :, :3] @ found.get("decoder", found["encoder"])[0, :, :3].mT
        return float(((centred - kept).double() @ columns.mT).square().sum())

    assert error(weighted) < error(basis)


def test_the_output_projections_of_the_text_model_are_found(llava):
    found = output_projections(llava.attached)
    text = llava.attached.config.text_config
    assert sorted(found) == list(range(text.num_hidden_layers))
    width = text.num_attention_heads * text.head_dim
    assert all(weight.shape == (text.hidden_size, width) for weight in found.values())


def test_values_weighted_by_the_output_need_its_projection(state, tmp_path):
    state.add(0, "key", torch.randn(1, 9, 8))
    state.add(0, "value", torch.randn(1, 9, 8))
    state.images = 1
    with pytest.raises(ValueError, match="value_method='output' needs the output projections"):
        state.write_basis(tmp_path / "b.safetensors", value_method="output")
    with pytest.raises(ValueError, match="value_method must be one of fisher, pca, output, got 'svd'"):
        state.write_basis(tmp_path / "b.safetensors", value_method="svd")


def test_the_report_names_what_all_requests_share(llava, basis_file):
    inputs = llava.tiny.inputs(llava.tiny.prompt(20))
    cache = RotateKCache.for_study(basis=str(basis_file), rank=8, always_compress=True)
    llava.attached(**inputs, past_key_values=cache, use_cache=True)
    tensors = {name: tensor for name, tensor in contents(basis_file).items() if name != "fingerprint"}
    assert cache.shared_nbytes() == sum(tensor.nbytes for tensor in tensors.values())
    assert "once per model, shared by all requests and not counted above" in str(cache.report())
    assert RotateKCache(rank=8).shared_nbytes() == 0


def test_the_command_takes_text_as_well_as_images(pages, tmp_path):
    """The words of the reader's own questions, which its tokenizer knows."""
    words = tmp_path / "text"
    (words / "more").mkdir(parents=True)
    (words / "a.txt").write_text("row 1, column 2? " * 120)
    (words / "more" / "b.txt").write_text("column 3, row 1? " * 120)
    (words / "short.txt").write_text("row 1?")
    out = tmp_path / "basis.safetensors"
    result = run("--images", pages, "--text", words, "--out", out, "--text-tokens", 128, "--most-text", 3)
    assert result.exit_code == 0, result.output
    assert "from 3 images (1 skipped) and 3 passages of text" in result.output.replace("\n", " ")
    with safe_open(str(out), framework="pt") as file:
        assert '"texts": 3' in file.metadata()["provenance"]
    for which in ("key", "value", "token_key", "token_value"):
        assert load_basis(out).state(0, which).encoder.shape[-1] == 128
    assert RotateKCache(basis=out, text="coded", bits=3).options.row_bits == (3, 3)
    alone = tmp_path / "alone.safetensors"
    assert run("--text", words / "a.txt", "--out", alone, "--text-tokens", 128).exit_code == 0
    assert RotateKCache(basis=alone, text="coded").options.codes_text
    with pytest.raises(ValueError, match="calibrated without images"):
        RotateKCache(basis=alone, rank=8, visual_mask=torch.ones(1, 9, dtype=torch.bool)).update(
            torch.randn(1, 1, 9, 128), torch.randn(1, 1, 9, 128), 0
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--images or --text must be given"),
        (["--text", "nowhere.txt"], "--text 'nowhere.txt' cannot be read"),
    ],
)
def test_the_command_names_bad_texts(arguments, words, tmp_path):
    result = run(*arguments, "--out", tmp_path / "x.safetensors")
    assert result.exit_code == 2 and words in result.output.replace("\n", " ")
