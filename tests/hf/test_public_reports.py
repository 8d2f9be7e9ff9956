"""Situations that users of KV caches report in public, each as they would write it, against `DynamicCache`.

docs/reports.md lists them with the reports; this file holds those that no other test had.
"""

import copy
import threading

import pytest
import torch
import ways
from hosts import build_host
from tiny_parts import PAD, TRANSFORMERS, words
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from rotatek_cache import RotateKCache, attach

FAMILIES = ["llava", "qwen2_5_vl"]


def _caches(host, **options):
    """A plain model with a dense cache, and an attached one with a cache of full rank (or `options`)."""
    plain, attached = copy.deepcopy(host.plain), attach(copy.deepcopy(host.plain))
    dense = DynamicCache(config=plain.config.get_text_config(decoder=True))
    return (plain, dense), (attached, RotateKCache(**options or {"sparsity": 0}))


def _like_dynamic_cache(family, situation, tolerance=5e-5, **options):
    host = build_host(family)
    expected, got = (situation(host.tiny, model, cache) for model, cache in _caches(host, **options))
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        if theirs.is_floating_point():
            torch.testing.assert_close(ours.double(), theirs.double(), atol=tolerance, rtol=tolerance)
        else:
            assert torch.equal(ours, theirs)


def _halves(host, situation):
    """Run a situation at half the channels too, which has no reference but finite numbers."""
    model, cache = _caches(host, sparsity=0.5)[1]
    for tensor in situation(host.tiny, model, cache):
        assert tensor.isfinite().all()


class _After(StoppingCriteria):
    """Calls `act` once after `steps` tokens, and stops all rows if it returns True."""

    def __init__(self, steps, act):
        self.steps, self.act = steps, act

    def __call__(self, ids, scores, **kwargs):
        self.steps -= 1
        return torch.full((len(ids),), self.steps == 0 and bool(self.act()))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_a_user_stopped_is_gone_on_with(family):
    def situation(tiny, model, cache):
        inputs, criteria = ways.padded(tiny), StoppingCriteriaList([_After(2, lambda: True)])
        first = ways.generate(model, inputs, cache, stopping_criteria=criteria, max_new_tokens=20)
        assert first.sequences.shape[1] == inputs["input_ids"].shape[1] + 2
        second = ways.generate(model, ways.follow_up(tiny, inputs, first.sequences, words(3, 1)), cache)
        return [first.sequences, second.sequences, torch.stack(second.logits)]

    _like_dynamic_cache(family, situation)
    _halves(build_host(family), situation)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_ended_early_go_on_beside_longer_ones(family):
    """Padding inside the conversation, behind the answer of one row."""
    host = build_host(family)
    inputs = ways.padded(host.tiny)
    length = inputs["input_ids"].shape[1]
    known = ways.generate(host.plain, inputs, DynamicCache(config=host.plain.config.get_text_config(decoder=True)))
    end = int(known.sequences[0, length + 1])

    def situation(tiny, model, cache):
        first = ways.generate(model, inputs, cache, eos_token_id=end)
        answers = first.sequences[:, length:]
        assert (answers[0] == PAD).any()
        second = ways.follow_up(tiny, inputs, first.sequences, words(4, 1))
        second["attention_mask"][:, length : first.sequences.shape[1]] = answers != PAD
        output = ways.generate(model, second, cache)
        return [output.sequences, torch.stack(output.logits)]

    _like_dynamic_cache(family, situation)
    _halves(host, situation)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["assistant_model", "prompt_lookup_num_tokens"])
def test_guesses_in_a_second_turn(family, how):
    def situation(tiny, model, cache):
        inputs = ways.one(tiny)
        first = ways.generate(model, inputs, cache)
        guess = copy.deepcopy(model) if how == "assistant_model" else 3
        turn = ways.follow_up(tiny, inputs, first.sequences, words(4, 1) * 3)
        second = ways.generate(model, turn, cache, max_new_tokens=8, **{how: guess})
        return [second.sequences, torch.stack(second.logits)]

    _like_dynamic_cache(family, situation)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_as_embeddings(family):
    def situation(tiny, model, cache):
        inputs = ways.one(tiny)
        first = ways.generate(model, inputs, cache)
        turn = ways.follow_up(tiny, inputs, first.sequences, words(4, 1))
        embeddings = model.get_input_embeddings()(turn["input_ids"])
        given = {"inputs_embeds": embeddings, "attention_mask": turn["attention_mask"]}
        second = ways.generate(model, given, cache)
        return [second.sequences, torch.stack(second.logits)]

    _like_dynamic_cache(family, situation)
    _halves(build_host(family), situation)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_taken_in_the_middle_of_an_answer(family):
    def situation(tiny, model, cache):
        inputs, copies = ways.padded(tiny), []
        criteria = StoppingCriteriaList([_After(3, lambda: copies.append(copy.deepcopy(cache)))])
        whole = ways.generate(model, inputs, cache, stopping_criteria=criteria, max_new_tokens=7)
        (half,) = copies
        held = half.get_seq_length()
        rest = ways.generate(model, ways.follow_up(tiny, inputs, whole.sequences[:, : held + 1], []), half)
        assert torch.equal(rest.sequences[:, : whole.sequences.shape[1]], whole.sequences[:, : rest.sequences.shape[1]])
        return [whole.sequences, rest.sequences]

    _like_dynamic_cache(family, situation)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float16, 0.05), (torch.bfloat16, 0.4)], ids=str
)
def test_dtypes_on_a_cpu(family, dtype, tolerance):
    """Whole models, and a text model in another dtype than its vision tower's."""

    def situation(tiny, model, cache):
        model.to(dtype)
        inputs = ways.padded(tiny)
        given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        first = ways.generate(model, given, cache)
        second = ways.generate(model, ways.follow_up(tiny, inputs, first.sequences, words(3, 1)), cache)
        assert second.logits[0].isfinite().all()
        return [torch.stack(first.logits[:1])]

    _like_dynamic_cache(family, situation, tolerance)
    _halves(build_host(family), situation)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_model_in_another_dtype_than_the_tower(family):
    def situation(tiny, model, cache):
        model.get_decoder().to(torch.bfloat16)
        model.lm_head.to(torch.bfloat16)
        return [torch.stack(ways.generate(model, ways.padded(tiny), cache).logits[:1])]

    _like_dynamic_cache(family, situation, 0.4)
    _halves(build_host(family), situation)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_weights(family):
    quanto = pytest.importorskip("optimum.quanto")

    def situation(tiny, model, cache):
        quanto.quantize(model, weights=quanto.qint8)
        quanto.freeze(model)
        inputs = ways.padded(tiny)
        first = ways.generate(model, inputs, cache)
        second = ways.generate(model, ways.follow_up(tiny, inputs, first.sequences, words(3, 1)), cache)
        return [first.sequences, second.sequences, torch.stack(second.logits)]

    _like_dynamic_cache(family, situation)
    _halves(build_host(family), situation)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_in_training_mode(family):
    """Before 5.24, transformers takes the cache away from the layers, warns once, and answers without the prompt."""
    host = build_host(family)
    model, cache = _caches(host)[1]
    inputs = ways.one(host.tiny)
    expected = ways.generate(host.attached, inputs, RotateKCache(sparsity=0)).sequences
    model.gradient_checkpointing_enable()
    assert torch.equal(ways.generate(model, inputs, RotateKCache(sparsity=0)).sequences, expected)
    model.train()
    if TRANSFORMERS < (5, 24):
        with pytest.raises(RuntimeError, match=r"did not pass their Keys to this RotateKCache.*Call model.eval\(\)"):
            ways.generate(model, inputs, cache)
        model.eval()
        cache.reset()
    assert torch.equal(ways.generate(model, inputs, cache).sequences, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_sequences_of_a_cached_prompt_say_how(family):
    host = build_host(family)
    inputs, cache = ways.one(host.tiny), RotateKCache(sparsity=0.5)
    first = ways.generate(host.attached, inputs, cache)
    turn = ways.follow_up(host.tiny, inputs, first.sequences, words(4, 1))
    with pytest.raises(ValueError, match=r"call cache.batch_repeat_interleave\(3\) first where each row is repeated"):
        ways.generate(host.attached, turn, copy.deepcopy(cache), do_sample=True, num_return_sequences=3)
    cache.batch_repeat_interleave(3)
    answers = ways.generate(host.attached, turn, cache, do_sample=True, num_return_sequences=3)
    assert len(answers.sequences) == 3


def test_dense_states_that_others_read_are_refused_with_what_to_do():
    host = build_host("llava")
    cache = RotateKCache(sparsity=0.5)
    ways.generate(host.attached, ways.one(host.tiny), cache)
    assert len(cache) == 3
    with pytest.raises(TypeError, match=r"cannot be iterated over .* cache.report\(\) and cache.tensors\(\)"):
        next(iter(cache))
    for name in ("keys", "values"):
        with pytest.raises(AttributeError, match=r"they are compressed: cache.report\(\).* needs a DynamicCache"):
            getattr(cache.layers[0], name)
    with pytest.raises(TypeError, match="not subscriptable"):
        cache[0]  # of DynamicCache neither


def test_one_cache_in_two_threads_is_refused():
    """A forward that is held up in one thread, and another one on the same cache."""
    model, cache = _caches(build_host("llava"), sparsity=0.5)[1]
    inputs = ways.one(build_host("llava").tiny)
    inside, go_on, found = threading.Event(), threading.Event(), []

    def hold(module, args):
        inside.set()
        assert go_on.wait(60)

    handle = model.get_decoder().layers[1].register_forward_pre_hook(hold)

    def first():
        with torch.no_grad():
            found.append(model(**inputs, past_key_values=cache).logits)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(60)
    handle.remove()
    with pytest.raises(RuntimeError, match="another thread is in a forward with this RotateKCache"):
        model(**inputs, past_key_values=cache)
    ways.generate(model, inputs, RotateKCache(sparsity=0.5))  # a cache of its own
    go_on.set()
    thread.join()
    expected = model(**inputs, past_key_values=RotateKCache(sparsity=0.5)).logits
    assert torch.equal(found[0], expected) and cache.get_seq_length() == inputs["input_ids"].shape[1]
