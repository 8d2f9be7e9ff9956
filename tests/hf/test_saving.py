"""A saved cache goes on, in any process, as the one that was saved; a file that is not whole is refused."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import ways
from checks import AKVQ, PromptInParts, reached_storages
from hosts import Host, build_host
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import FAMILIES
from tiny_parts import Tiny, words

from rotatek_cache import RotateKCache, attach
from rotatek_cache.cache import saving
from rotatek_cache.calibration.gather import calibrate
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.codecs.fingerprint import ModelMark, fingerprint
from rotatek_cache.codecs.registry import CODECS
from rotatek_cache.core.row_layout import Alignment
from rotatek_cache.token_pruning.registry import TOKENS

FIT = {"solver": "eigh", "always_compress": True}
OPTIONS = {
    "dense": {"sparsity": 0},
    "energy": {"energy": 0.9},
    "codes": {"rank": 16, "key_bits": 4, "value_bits": 4, "value_sparsity": 0.5, "basis_bits": 8},
    "float8": {"sparsity": 0.5, "key_bits": "fp8", "value_bits": "fp8"},
    "auto": {"sparsity": 0.75, "key_bits": "auto", "value_sparsity": 0.75, "value_bits": "auto"},
    "kivi": {"sparsity": 0, "basis": "none", "key_bits": 4, "value_basis": "none", "value_bits": 4},
    "budget": {"budget": "0.95x"},
    "budget for attention": {"budget": "0.6x", "tokens": "vl_cache"},
    "budget for features": {"budget": "0.6x", "tokens": "divprune"},
    "bits by token": AKVQ | {"tokens": "akvq_vl:0.3,text_layers=1"},
    **{f"basis {name}": {"sparsity": 0.5, "basis": name} for name in CODECS if name not in ("none", "hadamard")},
    **{f"tokens {name}": {"sparsity": 0.5, "tokens": f"{name}:0.5"} for name in TOKENS if TOKENS[name].drops},
}
CALIBRATED = {
    "plain": {"sparsity": 0.5},
    "float8": {"sparsity": 0.5, "key_bits": "fp8", "value_sparsity": 0.5, "value_bits": 8},
    "heads": {
        "sparsity": 0.75,
        "key_bits": "auto",
        "value_sparsity": 0.75,
        "value_bits": "auto",
        "allocation": "heads",
    },
    "streaming": {"sparsity": 0.5, "key_bits": 4, "streaming": True},
}


@pytest.fixture(scope="module")
def basis(tmp_path_factory) -> Path:
    host, path = build_host("llava"), tmp_path_factory.mktemp("saving") / "basis.safetensors"
    state = Calibration(fingerprint(host.attached), "llava")
    with torch.no_grad():
        calibrate(host.attached, [host.tiny.inputs(host.tiny.prompt(seed)) for seed in range(3)], state)
    state.write_basis(path, value_method="output")
    return path


def read(host: Host, cache: RotateKCache, turns: int = 1):
    """Hold a conversation of some turns with a padded batch; returns the arguments of the next turn."""
    inputs = ways.padded(host.tiny)
    first = ways.generate(host.attached, inputs, cache)
    second = ways.follow_up(host.tiny, inputs, first.sequences, words(5, 3))
    for turn in range(turns - 1):
        output = ways.generate(host.attached, second, cache)
        second = ways.follow_up(host.tiny, second, output.sequences, words(4, 10 + turn))
    return second


def logits(host: Host, inputs, cache: RotateKCache) -> torch.Tensor:
    return torch.stack(ways.generate(host.attached, inputs, cache).logits)


def check_goes_on(host: Host, cache: RotateKCache, path: Path, second, **where) -> RotateKCache:
    saved = cache.save(path)
    assert saved.on_disk == path.stat().st_size >= saved.in_memory
    assert saved.in_memory <= cache.nbytes() + 4096  # the fingerprint of the model beside it
    loaded = RotateKCache.load(path, **where)
    assert loaded.nbytes() == cache.nbytes() and repr(loaded) == repr(cache)
    before, after = str(cache.report()).splitlines(), str(loaded.report()).splitlines()
    assert [line for line in before if "decode steps" not in line] == after
    assert torch.equal(logits(host, second, loaded), logits(host, second, cache))
    return loaded


@pytest.mark.parametrize("name", OPTIONS)
def test_a_loaded_cache_goes_on_bit_for_bit(llava: Host, tmp_path, name):
    options, study = OPTIONS[name], {} if "budget" in name else FIT
    cache = RotateKCache.for_study(**options, **study)
    loaded = check_goes_on(llava, cache, tmp_path / "one", read(llava, cache))
    if "budget" in OPTIONS[name]:
        assert loaded.coordinator.planner.made == cache.coordinator.planner.made
    for held in (loaded, cache):  # and so does what was loaded, for another prompt too
        held.reset()
    inputs = ways.one(llava.tiny)
    assert torch.equal(logits(llava, inputs, loaded), logits(llava, inputs, cache))


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_calibrated_basis_is_named_and_not_saved(llava: Host, tmp_path, basis, name, dtype):
    host = Host(llava.tiny, llava.plain, attach(copy.deepcopy(llava.plain).to(dtype)))
    cache = RotateKCache(**CALIBRATED[name], basis=basis)
    loaded = check_goes_on(host, cache, tmp_path / "one", read(host, cache))
    bases = [
        [
            part.basis.B
            for layer in held.layers
            for kv in layer.kv.segments
            for part in (kv.keys, kv.values)
            if part.basis
        ]
        for held in (cache, loaded)
    ]
    assert bases[0]
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(*bases, strict=True))  # in memory once


def test_a_basis_file_may_have_moved(llava: Host, tmp_path, basis):
    cache, moved = RotateKCache(sparsity=0.5, basis=basis), tmp_path / "moved.safetensors"
    second = read(llava, cache)
    cache.save(tmp_path / "one")
    shutil.copy(basis, moved)
    loaded = RotateKCache.load(tmp_path / "one", basis=moved)
    assert loaded.options.basis == str(moved) == loaded.layers[0].kv.options.basis
    assert torch.equal(logits(llava, second, loaded), logits(llava, second, cache))


def test_a_basis_file_that_is_missing_or_another_is_named(llava: Host, tmp_path, basis):
    mine, path = tmp_path / "mine.safetensors", tmp_path / "one"
    shutil.copy(basis, mine)
    cache = RotateKCache(sparsity=0.5, basis=mine)
    read(llava, cache)
    cache.save(path)
    mine.unlink()
    with pytest.raises(ValueError, match=r"needs the basis file .*mine.safetensors does not exist; .*basis="):
        RotateKCache.load(path)
    state = Calibration(fingerprint(llava.attached), "llava")
    calibrate(llava.attached, [llava.tiny.inputs(llava.tiny.prompt(9))], state)
    state.write_basis(mine)
    with pytest.raises(ValueError, match=r"another basis than .*mine.safetensors holds now"):
        RotateKCache.load(path)
    fitted = RotateKCache(sparsity=0.5)
    fitted.save(path)
    with pytest.raises(ValueError, match="made without a basis file"):
        RotateKCache.load(path, basis=mine)


@pytest.mark.parametrize("name", ["codes", "tokens vl_cache"])
def test_conversations_are_saved_at_any_turn(llava: Host, tmp_path, name):
    cache = RotateKCache(**OPTIONS[name])
    check_goes_on(llava, cache, tmp_path / "one", read(llava, cache, turns=3))


def test_what_was_loaded_is_saved_again(llava: Host, tmp_path):
    cache = RotateKCache(sparsity=0.5)
    second = read(llava, cache)
    loaded = check_goes_on(llava, copy.deepcopy(cache), tmp_path / "one", second)
    RotateKCache.load(tmp_path / "one").save(tmp_path / "two")
    facts = [safe_open(tmp_path / name, framework="pt").metadata() for name in ("one", "two")]
    assert facts[0] == facts[1]  # the checksum with them
    assert not loaded.layers[0].kv.segments[0].shared


def test_an_empty_cache_and_one_of_text(llava: Host, tmp_path):
    RotateKCache(sparsity=0.5, tokens="fastv:0.5").save(tmp_path / "one")
    loaded = RotateKCache.load(tmp_path / "one")
    inputs = ways.padded(llava.tiny)
    assert torch.equal(
        logits(llava, inputs, loaded), logits(llava, inputs, RotateKCache(sparsity=0.5, tokens="fastv:0.5"))
    )
    text, cache = llava.tiny.inputs(llava.tiny.prompt(4, images=(), text=12)), RotateKCache(sparsity=0.5)
    first = ways.generate(llava.attached, text, cache)
    check_goes_on(llava, cache, tmp_path / "one", ways.follow_up(llava.tiny, text, first.sequences, words(3, 1)))


def test_a_prompt_is_saved_between_its_parts(llava: Host, tmp_path):
    prompt = PromptInParts(llava)
    prompt.cache.save(tmp_path / "one")
    prompt.check(RotateKCache.load(tmp_path / "one"))


def test_what_was_one_object_is_one_again(llava: Host, tmp_path):
    cache = RotateKCache(sparsity=0.5)
    read(llava, cache)
    cache.save(tmp_path / "one")
    for held in (cache, RotateKCache.load(tmp_path / "one")):
        first, last = held.layers[0].kv, held.layers[-1].kv
        assert first.text.alignment is last.text.alignment  # by which the columns of a mask are gathered once
        assert first.segments[0].positions is last.segments[0].positions
        assert first.segments[0].keys.basis.A is first.segments[0].keys.basis.B
        assert held.options is first.options


def test_rows_that_share_storage_do_so_again(llava: Host, tmp_path):
    cache = RotateKCache(sparsity=0.5, basis="pca")
    second = read(llava, cache)
    cache.batch_repeat_interleave(3)
    saved = cache.save(tmp_path / "one")
    loaded = RotateKCache.load(tmp_path / "one")
    assert loaded.nbytes() == cache.nbytes() == sum(reached_storages(loaded, {}, set()).values())
    assert saved.on_disk < cache.nbytes() * 1.2
    repeated = {name: tensor.repeat_interleave(3, 0) for name, tensor in second.items()}
    assert torch.equal(logits(llava, repeated, loaded), logits(llava, repeated, cache))


@pytest.mark.parametrize("name", ["dense", "codes", "tokens divprune"])
def test_compressed_files_hold_the_same(llava: Host, tmp_path, name):
    cache = RotateKCache(**OPTIONS[name])
    second = read(llava, cache)
    plain, packed = cache.save(tmp_path / "plain"), cache.save(tmp_path / "packed", compress=True)
    assert packed.in_memory == plain.in_memory
    assert packed.on_disk == (tmp_path / "packed").stat().st_size < 0.95 * plain.on_disk
    assert str(packed).endswith("in memory)") and "compressed" in str(packed)
    loaded = RotateKCache.load(tmp_path / "packed")
    assert torch.equal(logits(llava, second, loaded), logits(llava, second, cache))


def test_part_of_a_storage_is_saved_without_the_rest(tmp_path):
    whole = torch.arange(1000.0)
    state = {"slice": whole.view(10, 100)[:, 3:5], "other": torch.zeros(0), "turned": torch.arange(6).view(2, 3).T}
    saved = saving.write(tmp_path / "one", state, compress=False)
    assert saved.in_memory == 20 * 4 + 6 * 8
    file = saving.SavedFile(tmp_path / "one", None)
    for name, part in file.parts(list(state)).items():
        assert torch.equal(file.part(part), state[name])


# --- new processes ----------------------------------------------------------------------------------------------------

ASKED = {
    **{family: (family, {"sparsity": 0.5}, {}) for family in FAMILIES},
    **{f"llava {name}": ("llava", options, {}) for name, options in OPTIONS.items() if "basis" not in name},
    **{f"llava calibrated {name}": ("llava", options, {}) for name, options in CALIBRATED.items()},
    **{
        f"{family} beams": (family, {"sparsity": 0.5}, {"num_beams": 3}) for family in ("llava", "qwen2_5_vl", "gemma3")
    },
    "qwen2_5_vl vl_cache": ("qwen2_5_vl", {"sparsity": 0.5, "tokens": "vl_cache:0.5"}, {}),
}


@pytest.fixture(scope="module")
def answered(tmp_path_factory, basis):
    """How a new process answered from files, by name."""
    folder = tmp_path_factory.mktemp("asked")
    with torch.no_grad():
        for name, (family, options, how) in ASKED.items():
            host = build_host(family)
            cache = RotateKCache(**options, **{"basis": basis} if "calibrated" in name else {})
            second = read(host, cache, turns=2)
            cache.batch_repeat_interleave(how.get("num_beams", 1))
            cache.save(folder / f"{name}.cache")
            output = ways.generate(host.attached, second, cache, **how)
            asked = {"family": family, "second": second, "options": how}
            asked |= {"sequences": output.sequences, "logits": torch.stack(output.logits)}
            torch.save(asked, folder / f"{name}.asked")
    script = Path(__file__).parent / "answer_saved.py"
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ASKED)
def test_a_new_process_answers_bit_for_bit(answered, name):
    assert answered[name] == {"tokens": True, "logits": True}


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    host, path = build_host("llava"), tmp_path_factory.mktemp("whole") / "one"
    with torch.no_grad():
        cache = RotateKCache(rank=8, key_bits=4, value_sparsity=0.75, value_bits=4)
        host.attached(**host.tiny.inputs(host.tiny.prompt(1)), past_key_values=cache)
    cache.save(path)
    RotateKCache.load(path)
    return path.read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_found(whole, tmp_path, data):
    header = 8 + int.from_bytes(whole[:8], "little")
    at = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(whole) - 1)))
    changed = bytearray(whole)
    changed[at] ^= data.draw(st.integers(1, 255))
    (tmp_path / "one").write_bytes(changed)
    with pytest.raises(ValueError, match="saved cache"):
        RotateKCache.load(tmp_path / "one")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.floats(0, 1, exclude_max=True))
def test_a_file_that_was_cut_is_refused(whole, tmp_path, length):
    (tmp_path / "one").write_bytes(whole[: int(length * len(whole))])
    with pytest.raises(ValueError, match=r"saved cache .* cannot be read \(truncated, or no safetensors file\)"):
        RotateKCache.load(tmp_path / "one")


def test_foreign_files_are_refused(whole, tmp_path, basis):
    path = tmp_path / "one"
    with pytest.raises(ValueError, match=r"saved cache .*nowhere does not exist"):
        RotateKCache.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected 'rotatek-cache-1', got 'rotatek-basis-2'"):
        RotateKCache.load(basis)
    save_file({"0": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="is no saved cache of this version"):
        RotateKCache.load(path)
    path.write_bytes(whole.replace(b"rotatek-cache-1", b"rotatek-cache-9"))
    with pytest.raises(ValueError, match=r"expected 'rotatek-cache-1', got 'rotatek-cache-9'"):
        RotateKCache.load(path)


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        (["object", 0, "os:system", {}], "os:system is no class that a saved cache may hold"),
        (["object", 0, "rotatek_cache.cache.saving:importlib", {}], "no class that a saved cache may hold"),
        (["object", 0, "rotatek_cache.options:FitOptions", {"rank": 8}], "FitOptions has the fields"),
        (["tensor", 0, 0, "float32", [5], [1], 0], "cannot read: .*out of bounds"),
        (["tensor", 0, 0, "float32", [2], [-1], 1], "cannot read"),
        (["tensor", 0, 0, "load", [2], [1], 0], "load is no dtype"),
        (["same", 7], "cannot read: 7"),
        (["new"], "'new' is nothing that a state is made of"),
    ],
)
def test_files_with_a_right_checksum_hold_nothing_but_states(tmp_path, monkeypatch, state, complaint):
    described = json.dumps({"storages": [{"bytes": 16, "device": "cpu", "plane": 0}], "state": ["dict", ["x", state]]})
    data = torch.zeros(16, dtype=torch.uint8)
    metadata = {"format": saving.FORMAT, "state": described, "checksum": saving._checksum(described, [data])}
    save_file({"0": data}, tmp_path / "one", metadata)
    with pytest.raises(ValueError, match="other parts than this version knows"):
        RotateKCache.load(tmp_path / "one")
    file = saving.SavedFile(tmp_path / "one", None)
    with pytest.raises(ValueError, match=complaint):
        file.part(file.parts(["x"])["x"])


@pytest.mark.parametrize("other", ["weights", "qwen2_5_vl"])
def test_another_model_is_refused(llava: Host, tmp_path, other):
    cache = RotateKCache(sparsity=0.5)
    second = read(llava, cache)
    cache.save(tmp_path / "one")
    loaded = RotateKCache.load(tmp_path / "one")
    if other == "weights":
        model = copy.deepcopy(llava.plain)
        for name, parameter in model.named_parameters():
            if "k_proj" in name:
                parameter.data *= 1.1
        model = attach(model)
    else:
        model = build_host(other).attached
    for held in (loaded, cache):
        with pytest.raises(ValueError, match=r"states of another model \('llava'\) than .*cache.reset\(\)"):
            model(second["input_ids"], past_key_values=held)
    loaded.reset()
    model(words_of(FAMILIES["llava"]), past_key_values=loaded)


def words_of(tiny: Tiny) -> torch.Tensor:
    return tiny.inputs(tiny.prompt(4, images=(), text=12))["input_ids"]


def test_the_model_in_another_dtype_is_the_same_model(llava: Host, tmp_path):
    cache = RotateKCache(sparsity=0.5)
    second = read(llava, cache)
    cache.save(tmp_path / "one")
    half = attach(copy.deepcopy(llava.plain).to(torch.bfloat16))
    loaded = RotateKCache.load(tmp_path / "one")
    new = second["input_ids"][:, loaded.get_seq_length() :]
    got, expected = (
        host(new, attention_mask=second["attention_mask"], past_key_values=held).logits[:, -1].float()
        for host, held in ((half, loaded), (llava.attached, cache))
    )
    torch.testing.assert_close(got, expected, atol=0.2, rtol=0.1)


def test_a_device_that_is_not_here_is_named(whole, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    (tmp_path / "one").write_bytes(whole)
    with pytest.raises(ValueError, match=r'belongs on cuda:0, which cannot be used here .*as in device="cpu"'):
        RotateKCache.load(tmp_path / "one", device="cuda:0")


def test_stock_layers_of_another_transformers_are_refused(tmp_path, monkeypatch):
    host, cache = build_host("gemma3"), RotateKCache(sparsity=0.5)
    read(host, cache)
    cache.save(tmp_path / "one")
    monkeypatch.setattr("rotatek_cache.hf.cache.transformers.__version__", "6.1.0")
    with pytest.raises(ValueError, match=r"layers of transformers 5\..*, this is 6.1.0"):
        RotateKCache.load(tmp_path / "one")


def test_states_that_are_not_finite_are_not_saved(llava: Host, tmp_path):
    cache = RotateKCache(sparsity=0.5)
    read(llava, cache)
    layer = cache.layers[0].kv
    layer.sealer.keys.unanswered.append(_Unanswered())
    with pytest.raises(ValueError, match="not finite"):
        cache.save(tmp_path / "one")
    assert not list(tmp_path.iterdir())


class _Unanswered:
    """Says that states were not finite, once it is waited for."""

    waited = False

    def wait(self):
        self.waited = True

    def passed(self):
        if self.waited:
            raise ValueError("not finite")
        return False


class Elsewhere:
    def __init__(self, number=0):
        self.number = number


def test_a_class_from_elsewhere_has_to_be_registered(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_REGISTERED", dict(saving._REGISTERED))
    with pytest.raises(TypeError, match=r"Elsewhere is no class that a saved cache may hold: .*saving.register"):
        saving.write(tmp_path / "one", {"x": Elsewhere(3)}, compress=False)
    assert not list(tmp_path.iterdir())
    assert saving.register(Elsewhere) is Elsewhere
    saving.write(tmp_path / "one", {"x": Elsewhere(3)}, compress=False)
    file = saving.SavedFile(tmp_path / "one", None)
    assert file.part(file.parts(["x"])["x"]).number == 3


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*nowhere' for the file 'one': make it first"):
        RotateKCache(sparsity=0.5).save(tmp_path / "nowhere" / "one")


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"path: '.*' is a folder: name a file in it"):
        RotateKCache(sparsity=0.5).save(tmp_path)
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}.*"))


def test_a_file_is_replaced_whole_or_not_at_all(llava: Host, tmp_path, monkeypatch):
    path = tmp_path / "one"
    RotateKCache(sparsity=0.5).save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        RotateKCache(sparsity=0.25).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    RotateKCache(sparsity=0.25).save(path)
    assert RotateKCache.load(path).options.sparsity == 0.25
    assert path.stat().st_mode & 0o777 == 0o666 & ~saving._umask()


def test_the_bytes_are_those_that_were_written(whole, tmp_path):
    """Loaded tensors keep no map of the file, which may be deleted."""
    (tmp_path / "one").write_bytes(whole)
    loaded = RotateKCache.load(tmp_path / "one")
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in loaded.tensors()}
    (tmp_path / "one").write_bytes(bytes(len(whole)))
    (tmp_path / "one").unlink()
    assert sum(held.values()) == loaded.nbytes() < len(whole)
    assert all(torch.isfinite(t.float()).all() for t in loaded.tensors())


def test_weights_that_are_not_in_memory_tell_no_models_apart(llava: Host):
    whole, offloaded, other = (copy.deepcopy(llava.plain) for _ in range(3))
    name = next(name for name, _ in offloaded.named_parameters() if name.endswith("k_proj.weight"))
    module = offloaded.get_submodule(name.removesuffix(".weight"))
    module.weight = torch.nn.Parameter(module.weight.to("meta"))
    for parameter in other.parameters():
        parameter.data *= 1.1
    marks = [ModelMark.of(model, "llava") for model in (whole, offloaded, other)]
    assert marks[0].agrees(marks[1]) and marks[1].agrees(marks[0])
    assert not marks[2].agrees(marks[1]) and not marks[1].agrees(marks[2])
    assert not marks[0].agrees(ModelMark("qwen2_vl", marks[0].numbers))


def test_a_copy_on_the_host_is_not_loaded_to_a_device(tmp_path):
    """The host lays out later text by it, where it is; without it, it asks the device."""
    host = Alignment(torch.zeros(1, 2, dtype=torch.int32), None, 2)
    saving.write(tmp_path / "one", {"text": Alignment(host.positions, None, 2, host)}, compress=False)
    file = saving.SavedFile(tmp_path / "one", "cpu")
    assert file.part(file.parts(["text"])["text"]).origin is None


def test_joint_projections_tell_models_apart():
    """Fuyu's layers have one weight for queries, Keys and Values, `query_key_value`."""
    model = build_host("fuyu").plain
    before = ModelMark.of(model, "fuyu")
    with torch.no_grad():
        for parameter in (other := copy.deepcopy(model)).parameters():
            parameter.mul_(1.1)
    assert before.numbers and not before.agrees(ModelMark.of(other, "fuyu"))
