"""The life of an attached model: what attach changes, what it leaves alone, and what wraps around it."""

import copy
import functools
import inspect
import json
import pickle
import re
import subprocess
import sys
import threading

import pytest
import torch
import transformers
import ways
from hosts import Host, build_host
from tiny_more import EVERY
from tiny_parts import visual_positions
from transformers import AutoModelForImageTextToText, DynamicCache, GenerationMixin, LlavaModel, StaticCache

from rotatek_cache import RotateKCache, attach, detach
from rotatek_cache.hf import versions
from rotatek_cache.hf.attachment import inner_model
from rotatek_cache.hf.calls import CACHE_NAMES, cache_name
from rotatek_cache.hf.families import FAMILIES as FAMILY_TABLE

FULL = {"rank": 32, "always_compress": True}


def _dynamic(model):
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _same(got, expected, exactly=False):
    tolerance = {"atol": 0, "rtol": 0} if exactly else {"atol": 5e-5, "rtol": 1e-5}
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), **tolerance)
    assert torch.equal(got.sequences, expected.sequences)


def _trace(model):
    """Everything that attach could leave behind: instance attributes, hooks, attention implementations."""
    trace = {}
    for name, module in model.named_modules():
        trace[name] = (
            sorted(module.__dict__),
            list(module._forward_pre_hooks.values()),
            list(module._forward_hooks.values()),
            list(module._forward_hooks_always_called.values()),
            module.__dict__.get("forward"),
        )
    configs = [model.config, *(getattr(model.config, key) for key in model.config.sub_configs)]
    return trace, [config._attn_implementation for config in configs], model.config.to_dict()


def _our_hooks(model):
    hooks = [hook for m in model.modules() for hook in [*m._forward_pre_hooks.values(), *m._forward_hooks.values()]]
    return [hook for hook in hooks if hook.__module__.startswith("rotatek_cache")]


def test_attach_and_detach_leave_nothing(llava: Host):
    model = copy.deepcopy(llava.plain)
    ways.generate(model, ways.padded(llava.tiny), _dynamic(model))  # transformers itself leaves a few things on a model
    before = _trace(model)
    assert attach(model) is model
    assert attach(model) is model
    assert len(_our_hooks(model)) == 3
    _same(ways.generate(model, ways.padded(llava.tiny), RotateKCache.for_study(**FULL)), _reference(llava))
    assert detach(model) is model
    assert _trace(model) == before
    assert detach(model) is model
    with pytest.raises(RuntimeError, match=r"attach.*rotatek.*visual_mask"):
        ways.generate(model, ways.padded(llava.tiny), RotateKCache(sparsity=0.5))


def _reference(host: Host):
    return ways.generate(host.plain, ways.padded(host.tiny), _dynamic(host.plain))


@pytest.mark.parametrize("host", ["llava", "gemma3", "qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_caches_behave_as_before(host: Host, implementation):
    plain = copy.deepcopy(host.plain)
    plain.set_attn_implementation(implementation)
    attached = attach(copy.deepcopy(plain))
    # A forward with a RotateKCache between must not change that either.
    ours = ways.generate(attached, ways.padded(host.tiny), RotateKCache.for_study(**FULL))
    for make in (_dynamic, lambda m: StaticCache(config=m.config.get_text_config(decoder=True), max_cache_len=400)):
        expected = ways.generate(plain, ways.padded(host.tiny), make(plain))
        _same(ways.generate(attached, ways.padded(host.tiny), make(attached)), expected, exactly=True)
        _same(ours, expected)
    if implementation == "eager":
        options = {"output_attentions": True, "output_logits": False}
        expected = ways.generate(plain, ways.one(host.tiny), _dynamic(plain), **options)
        got = ways.generate(attached, ways.one(host.tiny), _dynamic(attached), **options)
        for step, theirs in zip(got.attentions, expected.attentions, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(step, theirs, strict=True))


def _dimmed(model, calls):
    """A patch as users write them, set on the instance."""
    original = model.model.get_image_features

    @functools.wraps(original)
    def dimmed(*args, **kwargs):
        calls.append(1)
        output = original(*args, **kwargs)
        output.pooler_output = [features * 0.25 for features in output.pooler_output]
        return output

    model.model.get_image_features = dimmed
    return dimmed


@pytest.mark.parametrize("host", ["llava", "qwen2_5_vl"], indirect=True)
def test_a_users_own_methods_on_the_instance_go_on(host: Host):
    model, calls, asked = copy.deepcopy(host.plain), [], []
    dimmed, prepare = _dimmed(model, calls), model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def prepare_inputs(*args, **kwargs):
        asked.append(1)
        return prepare(*args, **kwargs)

    model.prepare_inputs_for_generation = prepare_inputs
    inputs = ways.padded(host.tiny)
    expected = ways.generate(model, inputs, _dynamic(model))
    assert not torch.equal(expected.logits[0], _reference(host).logits[0])
    attach(model)
    for cache in (_dynamic(model), RotateKCache.for_study(**FULL), RotateKCache.for_study(**FULL, tokens="divprune:1")):
        calls.clear()
        asked.clear()
        _same(ways.generate(model, inputs, cache), expected)
        assert len(calls) == 1
        assert len(asked) == ways.NEW
    detach(model)
    assert model.model.__dict__["get_image_features"] is dimmed
    assert model.__dict__["prepare_inputs_for_generation"] is prepare_inputs
    _same(ways.generate(model, inputs, _dynamic(model)), expected, exactly=True)


def test_a_method_patched_after_attach_stays(llava: Host):
    model, calls = attach(copy.deepcopy(llava.plain)), []
    dimmed = _dimmed(model, calls)
    inputs = ways.padded(llava.tiny)
    expected = ways.generate(model, inputs, RotateKCache.for_study(**FULL))
    detach(model)
    assert model.model.get_image_features is dimmed
    calls.clear()
    _same(ways.generate(model, inputs, _dynamic(model)), expected)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("owner", "name"),
    [(GenerationMixin, "_get_candidate_generator"), (LlavaModel, "get_image_features")],
)
def test_a_method_that_transformers_lacks_is_named(llava: Host, monkeypatch, owner, name):
    model = copy.deepcopy(llava.plain)
    before = _trace(model)
    monkeypatch.delattr(owner, name)
    with pytest.raises(RuntimeError, match=rf"transformers {re.escape(transformers.__version__)}: .* no method {name}"):
        attach(model)
    assert _trace(model) == before


def test_a_method_is_expected_in_its_versions_only(llava: Host, monkeypatch):
    name = "_maybe_prepare_encoder_kwargs_for_generation"
    monkeypatch.delattr(GenerationMixin, name, raising=False)
    monkeypatch.setattr(versions.transformers, "__version__", "5.17.1")
    assert not hasattr(attach(copy.deepcopy(llava.plain)), name)
    monkeypatch.setattr(versions.transformers, "__version__", "5.18.0.dev0")
    with pytest.raises(RuntimeError, match=rf"5.18.0.dev0: .* no method {name}.* from version 5.18 on"):
        attach(copy.deepcopy(llava.plain))


def test_a_newer_transformers_works_with_one_warning_that_names_what_was_tested(llava: Host, monkeypatch, caplog):
    versions.warn_if_untested.cache_clear()
    attach(copy.deepcopy(llava.plain))
    assert not caplog.records
    monkeypatch.setattr(versions, "installed", lambda: (5, 99))
    versions.warn_if_untested.cache_clear()
    model = attach(copy.deepcopy(llava.plain))
    attach(copy.deepcopy(llava.plain))
    (record,) = caplog.records
    assert f"tested with transformers 5.17 to 5.24, this is {transformers.__version__}:" in record.getMessage()
    assert "'transformers<5.25'" in record.getMessage()
    _same(ways.generate(model, ways.padded(llava.tiny), RotateKCache.for_study(**FULL)), _reference(llava))


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_the_cache_has_either_name(llava: Host, name):
    """In `generate`, in the model and in the model below its head, by keyword and by position."""
    inputs, model = ways.one(llava.tiny), llava.attached
    known = name == cache_name() or cache_name() == CACHE_NAMES[0]  # the older name goes on being taken
    calls = {
        "generate": lambda cache: model.generate(**inputs, **{name: cache}, max_new_tokens=1, do_sample=False),
        "model": lambda cache: model(**inputs, **{name: cache}),
        "below the head": lambda cache: model.model(**inputs, **{name: cache}),
    }
    for call in calls.values():
        cache = RotateKCache(sparsity=0.5)
        if known:
            call(cache)
            assert cache.get_seq_length() == inputs["input_ids"].shape[1]
        else:
            with pytest.raises(ValueError, match="cache"):
                call(cache)
            assert cache.get_seq_length() == 0
    assert model.config.text_config._attn_implementation == "sdpa"


def test_the_cache_is_found_by_position(llava: Host):
    inputs, cache = ways.one(llava.tiny), RotateKCache(sparsity=0.5)
    before = list(inspect.signature(type(llava.attached.model).forward).parameters)[1:]
    arguments = [inputs.get(argument) for argument in before[: before.index(cache_name())]]
    llava.attached.model(*arguments, cache)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("family", list(EVERY))
def test_the_table_says_which_models_keep_an_offset_of_positions(family):
    inner = inner_model(build_host(family).plain)
    assert hasattr(inner, "rope_deltas") == FAMILY_TABLE[inner.config.model_type].mrope


def test_the_vision_tower_keeps_its_attention(llava: Host):
    model = copy.deepcopy(llava.attached)
    seen = {}

    def note(module, args):
        seen["vision"] = model.config.vision_config._attn_implementation
        seen["text"] = model.config.text_config._attn_implementation

    model.model.vision_tower.register_forward_pre_hook(note)
    model(**ways.one(llava.tiny), past_key_values=RotateKCache(sparsity=0.5))
    assert seen == {"vision": "sdpa", "text": "rotatek"}
    assert model.config.text_config._attn_implementation == "sdpa"


def test_an_error_in_a_forward_leaves_the_model_usable(llava: Host):
    model = copy.deepcopy(llava.attached)
    inputs = ways.one(llava.tiny)
    with pytest.raises(Exception, match="do not match"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:1]}, past_key_values=RotateKCache(sparsity=0.5))
    assert model.config.text_config._attn_implementation == "sdpa"
    _same(ways.generate(model, ways.padded(llava.tiny), RotateKCache.for_study(**FULL)), _reference(llava))


def test_save_and_load_show_no_trace(llava: Host, tmp_path):
    llava.plain.save_pretrained(tmp_path / "plain")
    llava.attached.save_pretrained(tmp_path / "attached")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "plain" / name).read_text()) == json.loads(
            (tmp_path / "attached" / name).read_text()
        )
    assert not any(b"rotatek" in file.read_bytes() for file in (tmp_path / "attached").iterdir())
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "attached")
    assert not _our_hooks(loaded)
    _same(ways.generate(loaded, ways.padded(llava.tiny), _dynamic(loaded)), _reference(llava), exactly=True)
    _same(ways.generate(attach(loaded), ways.padded(llava.tiny), RotateKCache.for_study(**FULL)), _reference(llava))


def test_loaded_with_the_attention_and_a_mask_in_a_fresh_process(llava: Host, tmp_path):
    """Nothing but the two public names is imported; that must register the attention function."""
    llava.plain.save_pretrained(tmp_path)
    inputs = ways.padded(llava.tiny)
    expected = _reference(llava).sequences
    torch.save({"inputs": inputs, "visual": visual_positions(inputs["input_ids"])}, tmp_path / "inputs.pt")
    script = f"""
import torch
from transformers import AutoModelForImageTextToText
from rotatek_cache import RotateKCache
model = AutoModelForImageTextToText.from_pretrained({str(tmp_path)!r}, attn_implementation={{"text_config": "rotatek"}})
given = torch.load({str(tmp_path / "inputs.pt")!r})
cache = RotateKCache.for_study(rank=32, always_compress=True, visual_mask=given["visual"])
out = model.generate(**given["inputs"], past_key_values=cache, max_new_tokens={ways.NEW}, do_sample=False)
assert cache.report().layers[0].segments
print(out.tolist())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == expected.tolist()


def test_a_copy_of_an_attached_model_is_attached_for_itself(llava: Host):
    first = copy.deepcopy(llava.attached)
    second = copy.deepcopy(first)
    detach(first)
    _same(ways.generate(second, ways.padded(llava.tiny), RotateKCache.for_study(**FULL)), _reference(llava))
    detach(second)
    assert not _our_hooks(first)
    assert not _our_hooks(second)
    assert len(_our_hooks(llava.attached)) == 3


def test_an_attached_model_is_pickled(llava: Host):
    # A fresh one: after a forward transformers' own hooks cannot be pickled.
    model = pickle.loads(pickle.dumps(attach(llava.tiny.build())))
    _same(ways.generate(model, ways.padded(llava.tiny), RotateKCache.for_study(**FULL)), _reference(llava))
    detach(model)
    assert not _our_hooks(model)


def test_threads_share_a_model(llava: Host):
    model, inputs = copy.deepcopy(llava.attached), ways.padded(llava.tiny)
    expected = _reference(llava)
    failures = []

    def run(make):
        try:
            for _ in range(4):
                _same(ways.generate(model, inputs, make()), expected)
        except Exception as error:  # noqa: BLE001 - handed to the main thread
            failures.append(error)

    makers = [
        lambda: RotateKCache.for_study(**FULL),
        lambda: RotateKCache.for_study(sparsity=0),
        lambda: _dynamic(model),
    ]
    threads = [threading.Thread(target=run, args=(make,)) for make in makers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("host", ["qwen2_vl"], indirect=True)
def test_threads_have_positions_of_their_own(host: Host, monkeypatch):
    """Another thread begins its answer just where the offset of this one's positions lies on the model."""
    prompts = [host.tiny.inputs(host.tiny.prompt(1, images=images, text=3)) for images in ((0,), (0, 1))]

    def conversation(inputs):
        cache = RotateKCache(sparsity=0)
        first = ways.generate(host.attached, inputs, cache)
        return ways.generate(host.attached, ways.follow_up(host.tiny, inputs, first.sequences, [7, 8]), cache).sequences

    expected = [conversation(inputs) for inputs in prompts]
    prepare = type(host.attached)._prepare_position_ids_for_generation
    got = {}
    other = threading.Thread(target=lambda: got.update(other=conversation(prompts[1])))

    def interrupted(*args):
        positions = prepare(*args)
        if threading.current_thread() is threading.main_thread() and other.ident is None:
            other.start()
            other.join(0.3)  # it must wait for this thread
        return positions

    monkeypatch.setattr(type(host.attached), "_prepare_position_ids_for_generation", interrupted)
    got["this"] = conversation(prompts[0])
    other.join()
    assert torch.equal(got["this"], expected[0])
    assert torch.equal(got["other"], expected[1])


def test_tokens_are_chosen_by_features_while_another_thread_is_in_a_forward(llava: Host):
    model, inputs = copy.deepcopy(llava.attached), ways.padded(llava.tiny)
    options = {"rank": 16, "tokens": "divprune:0.5"}
    expected = ways.generate(model, inputs, RotateKCache.for_study(**options)).sequences
    inside, done = threading.Event(), threading.Event()

    def wait(*_):
        if threading.current_thread() is other:
            inside.set()
            done.wait(30)

    model.model.language_model.layers[1].register_forward_pre_hook(wait)
    other = threading.Thread(target=lambda: ways.generate(model, inputs, RotateKCache(sparsity=0)))
    other.start()
    assert inside.wait(30)
    try:
        got = ways.generate(model, inputs, RotateKCache.for_study(**options)).sequences
    finally:
        done.set()
        other.join()
    assert torch.equal(got, expected)


# --- PEFT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["llava", "qwen2_5_vl", "idefics3"], indirect=True)
@pytest.mark.parametrize("attach_first", [True, False])
def test_peft(host: Host, attach_first):
    peft = pytest.importorskip("peft")

    def wrap(model):
        torch.manual_seed(3)
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        return peft.get_peft_model(model, config).eval()

    reference = wrap(copy.deepcopy(host.plain))
    model = copy.deepcopy(host.plain)
    model = wrap(attach(model)) if attach_first else attach(wrap(model))
    inputs = ways.padded(host.tiny)
    expected = ways.generate(reference, inputs, _dynamic(host.plain))
    assert not torch.equal(expected.sequences, _reference(host).sequences)  # the adapter does something
    _same(ways.generate(model, inputs, RotateKCache.for_study(**FULL)), expected)
    ours = model(**inputs, past_key_values=RotateKCache.for_study(**FULL)).logits[:, -1]
    theirs = reference(**inputs, past_key_values=_dynamic(host.plain)).logits[:, -1]
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    _same(ways.generate(merged, inputs, RotateKCache.for_study(**FULL)), expected)
    detach(merged)
    assert "prepare_inputs_for_generation" not in merged.__dict__


# --- accelerate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["llava", "qwen2_5_vl", "smolvlm"], indirect=True)
@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights(host: Host, attach_first, where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = copy.deepcopy(host.plain)
    if attach_first:
        attach(model)
    if where == "cpu":
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path, torch.device("cpu"))
    attach(model)
    _same(ways.generate(model, ways.padded(host.tiny), RotateKCache.for_study(**FULL)), _reference(host))
    _same(ways.generate(model, ways.padded(host.tiny), _dynamic(host.plain)), _reference(host))


def test_loaded_with_a_device_map(llava: Host, tmp_path):
    pytest.importorskip("accelerate")
    llava.plain.save_pretrained(tmp_path / "model")
    text = {f"model.language_model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(3)}
    rest = ["model.vision_tower", "model.multi_modal_projector", "model.language_model.embed_tokens", "lm_head"]
    rest += ["model.language_model.norm", "model.language_model.rotary_emb"]
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map=text | dict.fromkeys(rest, "cpu"), offload_folder=tmp_path / "disk"
    )
    assert any(parameter.is_meta for parameter in model.parameters())
    _same(ways.generate(attach(model), ways.padded(llava.tiny), RotateKCache.for_study(**FULL)), _reference(llava))


# --- generate's odds and ends -----------------------------------------------------------------------------------------


def test_classifier_free_guidance(llava: Host):
    options = {"guidance_scale": 1.7}
    expected = ways.generate(llava.plain, ways.one(llava.tiny), _dynamic(llava.plain), **options)
    _same(ways.generate(llava.attached, ways.one(llava.tiny), RotateKCache.for_study(**FULL), **options), expected)
    assert not torch.equal(expected.sequences, ways.generate(llava.plain, ways.one(llava.tiny), None).sequences)


def test_hidden_states_and_scores_are_returned(llava: Host):
    options = {"output_hidden_states": True, "output_scores": True}
    expected = ways.generate(llava.plain, ways.one(llava.tiny), _dynamic(llava.plain), **options)
    got = ways.generate(llava.attached, ways.one(llava.tiny), RotateKCache.for_study(**FULL), **options)
    for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-5)


def test_a_prompt_read_in_inference_mode_is_continued_outside(llava: Host):
    inputs = ways.one(llava.tiny)
    cache, dense = RotateKCache.for_study(**FULL), _dynamic(llava.plain)
    with torch.inference_mode():
        llava.attached(**inputs, past_key_values=cache)
        llava.plain(**inputs, past_key_values=dense)
    second = ways.follow_up(llava.tiny, inputs, inputs["input_ids"], [20, 21, 22])
    expected = ways.generate(llava.plain, second, copy.deepcopy(dense))
    _same(ways.generate(llava.attached, second, copy.deepcopy(cache)), expected)
    _same(ways.generate(llava.attached, second, cache), expected)


def test_forwards_outside_no_grad(llava: Host):
    with torch.enable_grad():
        got = ways.forward_loop(llava.tiny, llava.attached, lambda: RotateKCache.for_study(**FULL))
        expected = ways.forward_loop(llava.tiny, llava.plain, lambda: _dynamic(llava.plain))
        torch.testing.assert_close(got[0], expected[0], atol=5e-5, rtol=1e-5)
        with pytest.raises(RuntimeError, match="for inference"):
            got[0].sum().backward()


@pytest.mark.parametrize("static", [True, False])
def test_compiled_forwards_with_other_caches(llava: Host, static):
    model = copy.deepcopy(llava.attached)
    inputs = {"input_ids": torch.tensor([[1, 20, 30, 40]])}

    def make():
        text = model.config.get_text_config(decoder=True)
        return StaticCache(config=text, max_cache_len=16) if static else DynamicCache(config=text)

    expected = llava.plain(**inputs, past_key_values=make()).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs, past_key_values=make()).logits, expected)
