"""Corners that users reach: odd masks, contradicting options, rows and crops, and work that must not grow."""

import copy
import threading
from pathlib import Path

import pytest
import torch

from rotatek_cache import FitOptions, LayerKV, RotateKCache, detach
from rotatek_cache.cache.coordinator import Coordinator
from rotatek_cache.cache.visual_positions import VisualPositions
from rotatek_cache.calibration.gather import calibrate
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.codecs.fingerprint import fingerprint


def prefilled(host, *prompts, **options):
    """A cache that holds the prompts, and their inputs."""
    inputs = host.tiny.inputs(*prompts)
    cache = RotateKCache.for_study(**options)
    host.attached(**inputs, past_key_values=cache, use_cache=True)
    return cache, inputs


def test_a_mask_per_head_is_refused(llava):
    cache, inputs = prefilled(llava, llava.tiny.prompt(1), sparsity=0)
    mask = torch.ones(1, 4, 1, inputs["input_ids"].shape[1] + 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attention_mask must be \[rows, 1, queries, tokens\]"):
        llava.attached(input_ids=torch.tensor([[20]]), attention_mask=mask, past_key_values=cache)


def test_text_hidden_from_the_prompt_and_shown_later_is_refused(llava):
    inputs = llava.tiny.inputs(llava.tiny.prompt(1))
    inputs["attention_mask"][:, 2:5] = 0
    cache = RotateKCache(sparsity=0)
    llava.attached(**inputs, past_key_values=cache, use_cache=True)
    shown = torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
    hidden = shown.clone()
    hidden[:, 2:5] = 0
    token = torch.tensor([[20]])
    llava.attached(input_ids=token, attention_mask=hidden, past_key_values=copy.deepcopy(cache))
    full = torch.ones(1, 1, 1, shown.shape[1], dtype=torch.bool)
    with pytest.raises(ValueError, match="attention_mask shows positions that it hid from the whole prompt"):
        llava.attached(input_ids=token, attention_mask=full, past_key_values=cache)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsity": 0.5, "key_bits": 8.0}, ValueError, "key_bits must be None, 8, 4, 2, 'fp8' or 'auto', got 8.0"),
        ({"sparsity": 0.5, "basis": 3}, TypeError, "basis must be a name or the path of a basis file, got int"),
        ({"sparsity": 0.5, "basis": Path("nowhere.safetensors")}, ValueError, "nowhere.safetensors does not exist"),
    ],
)
def test_contradicting_options_are_named(options, error, words):
    with pytest.raises(error, match=words):
        RotateKCache.for_study(**options)


@pytest.mark.parametrize("name", ["sparsity", "value_sparsity"])
def test_automatic_bits_of_too_high_a_sparsity_name_it(llava, name):
    options = {"sparsity": 0.5, name: 0.98, "key_bits" if name == "sparsity" else "value_bits": "auto"}
    with pytest.raises(ValueError, match=f"{name}=0.98 leaves 10 bits for a token of head width 32.*at most 0.96875"):
        prefilled(llava, llava.tiny.prompt(1), always_compress=True, **options)


def test_a_visual_mask_shorter_than_the_prompt_is_refused():
    cache = RotateKCache(sparsity=0.5, visual_mask=torch.ones(1, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match="visual_mask must cover the prompt: it has 20 positions, the prompt 30"):
        cache.update(torch.zeros(1, 1, 30, 8), torch.zeros(1, 1, 30, 8), 0)


def test_rows_of_an_emptied_cache_are_selected(llava):
    cache, inputs = prefilled(llava, llava.tiny.prompt(1), llava.tiny.prompt(2, text=2), sparsity=0.5)
    cache.crop(-cache.get_seq_length())
    cache.batch_select_indices([1])
    one = {name: tensor[1:] for name, tensor in inputs.items()}
    expected = llava.attached(**one, past_key_values=RotateKCache(sparsity=0.5)).logits
    torch.testing.assert_close(llava.attached(**one, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("index", [torch.tensor([False, True]), [1], torch.tensor([1])], ids=str)
def test_rows_are_selected_by_flags_lists_and_numbers(llava, index):
    prompts = llava.tiny.prompt(1), llava.tiny.prompt(2, text=2)
    cache, inputs = prefilled(llava, *prompts, sparsity=0)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    token = torch.tensor([[20], [21]])
    both = llava.attached(input_ids=token, attention_mask=mask, past_key_values=copy.deepcopy(cache)).logits
    cache.batch_select_indices(index)
    one = llava.attached(input_ids=token[1:], attention_mask=mask[1:], past_key_values=cache).logits
    torch.testing.assert_close(one[0], both[1], atol=1e-4, rtol=1e-4)


def test_a_positive_crop_is_the_length_to_keep_in_every_kind_of_layer():
    from hosts import build_host

    host = build_host("gemma3")
    cache, inputs = prefilled(host, host.tiny.prompt(1, tail=20), sparsity=0)
    length = inputs["input_ids"].shape[1]
    cache.activate_past_recording()
    host.attached(input_ids=torch.tensor([[20, 21, 22]]), past_key_values=cache)
    cache.crop(length + 1)
    assert {layer.get_seq_length() for layer in cache.layers} == {length + 1}


def test_energy_never_costs_more_than_dense(llava):
    prompts = llava.tiny.prompt(1, images=(0, 1)), llava.tiny.prompt(2, images=(0,))
    for energy in (0.5, 0.9, 0.99, 1.0):
        cache, _ = prefilled(llava, *prompts, energy=energy)
        for layer in cache.report().layers:
            for segment in layer.segments:
                dense = segment.value_bytes  # as wide as the Keys here
                assert segment.key_bytes + segment.basis_bytes < dense
    assert cache.report().layers[0].kept_dense


def test_a_crop_to_nothing_leaves_nothing_and_the_cache_can_start_again(llava):
    cache, inputs = prefilled(llava, llava.tiny.prompt(1), sparsity=0.5)
    held = cache.nbytes()
    cache.crop(-cache.get_seq_length())
    assert cache.nbytes() == 0
    llava.attached(**inputs, past_key_values=cache, use_cache=True)
    assert cache.nbytes() == held


def test_copies_of_a_cache_share_a_calibrated_basis(llava, tmp_path):
    state = Calibration(fingerprint(llava.attached), "llava")
    calibrate(llava.attached, [llava.tiny.inputs(llava.tiny.prompt(1))], state).write_basis(tmp_path / "b.safetensors")
    cache, _ = prefilled(llava, llava.tiny.prompt(1), sparsity=0.5, basis=tmp_path / "b.safetensors")
    twin = copy.deepcopy(cache)
    assert twin.layers[0].kv.sealer.calibrated is cache.layers[0].kv.sealer.calibrated


def test_what_a_step_looks_through_does_not_grow_with_the_answer():
    positions = VisualPositions()
    positions.announce(0, 10, (torch.arange(10) < 8)[None])
    kv = LayerKV(FitOptions(sparsity=0), positions, 0)
    kv.append(torch.randn(1, 1, 10, 8), torch.randn(1, 1, 10, 8))
    Coordinator(positions).observe(kv, torch.randn(1, 1, 10, 8), None)
    for _ in range(100):
        positions.announce(kv.length, kv.length + 1, None)
        kv.append(torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8))
    assert len(positions.flags) == 2


def test_large_segments_are_fitted_head_by_head_with_the_same_result(llava, monkeypatch):
    from rotatek_cache.codecs import coefficients

    options = {"rank": 16, "basis": "pca", "always_compress": True}
    whole, _ = prefilled(llava, llava.tiny.prompt(1), **options)
    monkeypatch.setattr(coefficients, "LARGE", 1)
    parts, _ = prefilled(llava, llava.tiny.prompt(1), **options)
    for one, other in zip(whole.layers, parts.layers, strict=True):
        torch.testing.assert_close(one.kv.segments[0].keys.data, other.kv.segments[0].keys.data, atol=1e-4, rtol=1e-3)


def test_an_interrupted_forward_leaves_no_trace(llava):
    model = copy.deepcopy(llava.attached)
    model.set_attn_implementation("eager")
    inputs = llava.tiny.inputs(llava.tiny.prompt(1))

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.language_model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs, past_key_values=RotateKCache(sparsity=0))
    handle.remove()
    assert len(model(**inputs, output_attentions=True).attentions) == 3
    handle = model.model.language_model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs, past_key_values=RotateKCache(sparsity=0))
    handle.remove()
    assert detach(model).config.text_config._attn_implementation == "eager"


def test_a_hook_that_fails_before_ours_breaks_nothing(llava):
    model = copy.deepcopy(llava.attached)
    inputs = llava.tiny.inputs(llava.tiny.prompt(1))

    def fail(*_):
        raise ValueError("mine")

    handle = model.model.register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(ValueError, match="mine"):
        model(**inputs, past_key_values=RotateKCache(sparsity=0))
    handle.remove()
    expected = llava.plain(**inputs).logits
    torch.testing.assert_close(model(**inputs, past_key_values=RotateKCache(sparsity=0)).logits, expected)


def test_another_cache_in_another_thread_is_refused_where_it_would_meet_the_wrong_masks(llava):
    model = copy.deepcopy(llava.attached)
    model.set_attn_implementation("eager")
    inputs = llava.tiny.inputs(llava.tiny.prompt(1))
    inside, done = threading.Event(), threading.Event()

    def wait(*_):
        if threading.current_thread() is other:
            inside.set()
            done.wait(30)

    def run():
        with torch.no_grad():
            model(**inputs, past_key_values=RotateKCache(sparsity=0))

    other = threading.Thread(target=run)
    model.model.language_model.layers[1].register_forward_pre_hook(wait)
    other.start()
    assert inside.wait(30)
    with pytest.raises(RuntimeError, match="another thread is in a forward with a RotateKCache"):
        model(**inputs)
    done.set()
    other.join()
    torch.testing.assert_close(model(**inputs).logits, llava.plain(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_a_compiled_forward_takes_the_cache(llava):
    inputs = llava.tiny.inputs(llava.tiny.prompt(1))
    expected = llava.plain(**inputs).logits
    compiled = torch.compile(copy.deepcopy(llava.attached).forward, backend="eager")
    cache = RotateKCache(sparsity=0)
    torch.testing.assert_close(compiled(**inputs, past_key_values=cache).logits, expected)
    assert compiled(input_ids=torch.tensor([[20]]), past_key_values=cache).logits.shape[1] == 1
    torch.compiler.reset()


def filled(options: FitOptions, visual: torch.Tensor, seed: int = 0) -> LayerKV:
    """A sealed layer of two KV heads of width 16 with these visual positions ``[B, T]``."""
    generator = torch.Generator().manual_seed(seed)
    batch, tokens = visual.shape
    keys, values, queries = (torch.randn(batch, 2, tokens, 16, generator=generator) for _ in range(3))
    positions = VisualPositions()
    positions.announce(0, tokens, visual)
    kv = LayerKV(options, positions, 0)
    kv.append(keys, values)
    Coordinator(positions).observe(kv, queries, None)
    return kv


def test_an_image_below_break_even_stays_dense_beside_one_that_is_compressed():
    visual = torch.zeros(2, 64, dtype=torch.bool)
    visual[0, 1:50], visual[1, 55:58] = True, True
    kv = filled(FitOptions(rank=8), visual)
    assert [segment.lengths.tolist() for segment in kv.segments] == [[49, 0]]
    assert kv.kept_dense == [(1, 3)] and kv.dense_tokens() == 2 * 64 - 49
