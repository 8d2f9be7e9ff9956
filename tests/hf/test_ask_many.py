"""Many questions about one cached prompt, as a batch whose rows share what the prompt stores."""

import copy

import pytest
import torch
import ways
from checks import reached_storages
from hosts import Host, build_host
from tiny_models import FAMILIES
from tiny_parts import PAD, Prompt, words
from transformers import DynamicCache

from rotatek_cache import RotateKCache
from rotatek_cache.hf.cache import RotateKLayer
from rotatek_cache.hf.calls import cache_name

CACHE = cache_name()
QUESTIONS = [words(4, 1), words(9, 2), words(6, 3)]  # of different lengths
ROWS = [0, 1, 0]
OPTIONS = [
    {"sparsity": 0},
    {"sparsity": 0.5, "tokens": "vl_cache:0.5"},
    {"sparsity": 0.5, "tokens": "divprune:0.5"},
    {"rank": 16, "key_bits": 4, "value_bits": 4, "value_sparsity": 0.5, "basis_bits": 8},
    {"energy": 0.9},
    {"budget": "0.95x"},
]


def padded(questions):
    longest = max(map(len, questions))
    ids = torch.tensor([[PAD] * (longest - len(question)) + question for question in questions])
    mask = torch.tensor([[0] * (longest - len(question)) + [1] * len(question) for question in questions])
    return ids, mask


def answer(host: Host, asked, **options):
    """Generate from what `ask_many` returned."""
    inputs = {name: value for name, value in asked.items() if name != CACHE}
    return ways.generate(host.attached, inputs, asked[CACHE], **options)


def asked_alone(host: Host, prompt, cache: RotateKCache, question, row: int):
    """One question about one row, on a copy of the cache: logits ``[steps, V]``."""
    alone = copy.deepcopy(cache)
    alone.batch_select_indices(torch.tensor([row]))
    ids = torch.cat([prompt["input_ids"][row : row + 1], torch.tensor([question])], 1)
    mask = torch.nn.functional.pad(prompt["attention_mask"][row : row + 1], (0, len(question)), value=1)
    return torch.stack(ways.generate(host.attached, {"input_ids": ids, "attention_mask": mask}, alone).logits)[:, 0]


def check_as_alone(host: Host, prompt, cache: RotateKCache) -> None:
    questions = questions_for(cache)
    held, state = cache.nbytes(), [tensor.clone() for tensor in cache.tensors()]
    asked = cache.ask_many(*padded(questions), rows=ROWS)
    many = asked[CACHE]
    assert many.get_seq_length() == cache.get_seq_length() and many.batch_size == 3
    together = torch.stack(answer(host, asked).logits)
    for number, (question, row) in enumerate(zip(questions, ROWS, strict=True)):
        expected = asked_alone(host, prompt, cache, question, row)
        torch.testing.assert_close(together[:, number], expected, atol=5e-5, rtol=1e-4)
    assert cache.nbytes() == held  # it stays as it is
    assert all(torch.equal(now, then) for now, then in zip(cache.tensors(), state, strict=True))


def questions_for(cache: RotateKCache):
    """Questions of different lengths, or of one where layers with a sliding window allow no padding."""
    has_stock = any(not isinstance(layer, RotateKLayer) for layer in cache.layers)
    return [question[:4] for question in QUESTIONS] if has_stock else QUESTIONS


@pytest.mark.parametrize("family", FAMILIES)
def test_every_question_is_answered_as_if_it_were_alone(family):
    host = build_host(family)
    prompt, cache = ways.padded(host.tiny), RotateKCache(sparsity=0.5, basis="pca")
    ways.generate(host.attached, prompt, cache, max_new_tokens=1)
    check_as_alone(host, prompt, cache)


def test_padding_is_refused_where_layers_have_a_sliding_window():
    host = build_host("gemma3")
    prompt, cache = ways.one(host.tiny), RotateKCache(sparsity=0.5)
    ways.generate(host.attached, prompt, cache, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"layers \[0\] have transformers' own .*questions of one length together"):
        cache.ask_many(*padded(QUESTIONS))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_with_every_kind_of_storage(llava: Host, options):
    prompt, cache = ways.padded(llava.tiny), RotateKCache(**options)
    ways.generate(llava.attached, prompt, cache, max_new_tokens=1)  # budgets want to know the whole prompt
    check_as_alone(llava, prompt, cache)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_at_full_rank_as_the_dense_cache(family):
    """The conversation of each row, read whole by the model as transformers has it."""
    host = build_host(family)
    prompts = [host.tiny.prompt(1, images=(0,)), host.tiny.prompt(2, images=(1,), text=2, tail=3)]
    cache = RotateKCache(sparsity=0)
    ways.generate(host.attached, host.tiny.inputs(*prompts), cache, max_new_tokens=1)
    questions = questions_for(cache)
    together = answer(host, cache.ask_many(*padded(questions), rows=ROWS))
    for number, (question, row) in enumerate(zip(questions, ROWS, strict=True)):
        whole = host.tiny.inputs(Prompt(prompts[row].ids + question, prompts[row].images))
        dense = DynamicCache(config=host.plain.config.get_text_config())
        expected = ways.generate(host.plain, whole, dense)
        assert torch.equal(together.sequences[number, -ways.NEW :], expected.sequences[0, -ways.NEW :])


def test_nothing_of_the_prompt_is_copied(llava: Host):
    prompt, cache = llava.tiny.inputs(llava.tiny.prompt(1, images=(0, 1), text=60)), RotateKCache(sparsity=0.5)
    llava.attached(**prompt, past_key_values=cache)
    many = cache.ask_many(torch.tensor([words(5, seed) for seed in range(50)]))[CACHE]
    mine, theirs = ({t.untyped_storage().data_ptr() for t in held.tensors()} for held in (cache, many))
    for layer in cache.layers:
        states = [layer.kv.text.keys, layer.kv.text.values]
        states += [part.data for segment in layer.kv.segments for part in (segment.keys, segment.values)]
        assert all(state.untyped_storage().data_ptr() in mine & theirs for state in states)
    assert many.nbytes() == sum(reached_storages(many, {}, set()).values())
    tables = many.nbytes(beside=cache)
    assert tables == many.nbytes() - sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in many.tensors()}[at]
        for at in mine & theirs
    )
    per_row = 3 * 2 * (8 + 4 + 8) + prompt["input_ids"].shape[1] * 10  # tables by layer and segment; ids and flags
    assert tables < 50 * per_row + 8192  # where text lies, once
    assert str(many.report()).count("16/32") == 3  # text is no line of its own


def test_the_prompt_may_go_on_after_it_has_lent_its_text(llava: Host):
    prompt, cache = ways.padded(llava.tiny), RotateKCache(sparsity=0.5, basis="pca")
    first = ways.generate(llava.attached, prompt, cache)
    alone = copy.deepcopy(cache)
    expected = answer(llava, copy.deepcopy(cache).ask_many(*padded(QUESTIONS), rows=ROWS, conversation=first.sequences))
    asked = cache.ask_many(*padded(QUESTIONS), rows=ROWS, conversation=first.sequences)
    # In every way in which columns could be written over: fewer tokens, other rows, more tokens.
    for held in (cache, alone):
        held.crop(-3)
        held.reorder_cache(torch.tensor([1, 0]))
    mask = torch.nn.functional.pad(prompt["attention_mask"].flip(0), (0, 6), value=1)
    new = torch.tensor([words(5, 8), words(5, 9)])
    mask = mask[:, : cache.get_seq_length() + 5]
    got, same = (llava.attached(new, attention_mask=mask, past_key_values=held).logits for held in (cache, alone))
    assert torch.equal(got, same)
    assert torch.equal(torch.stack(answer(llava, asked).logits), torch.stack(expected.logits))


def test_after_an_answer_and_in_more_turns(llava: Host):
    """What generate returned is the conversation, its last token included; the batch goes on as any other does."""
    prompt, cache = ways.padded(llava.tiny), RotateKCache(sparsity=0.5, basis="pca")
    first = ways.generate(llava.attached, prompt, cache)
    assert first.sequences.shape[1] == cache.get_seq_length() + 1
    asked = cache.ask_many(*padded(QUESTIONS), rows=ROWS, conversation=first.sequences)
    output = answer(llava, asked)
    for number, (question, row) in enumerate(zip(QUESTIONS, ROWS, strict=True)):
        alone = copy.deepcopy(cache)
        alone.batch_select_indices(torch.tensor([row]))
        ids = torch.cat([first.sequences[row : row + 1], torch.tensor([question])], 1)
        more = ids.shape[1] - prompt["input_ids"].shape[1]
        mask = torch.nn.functional.pad(prompt["attention_mask"][row : row + 1], (0, more), value=1)
        one = ways.generate(llava.attached, {"input_ids": ids, "attention_mask": mask}, alone)
        got = torch.stack(output.logits)[:, number]
        torch.testing.assert_close(got, torch.stack(one.logits)[:, 0], atol=5e-5, rtol=1e-4)
        second = torch.tensor([words(5, 20)])
        one = ways.generate(
            llava.attached,
            {
                "input_ids": torch.cat([one.sequences, second], 1),
                "attention_mask": torch.nn.functional.pad(mask, (0, ways.NEW + 5), value=1),
            },
            alone,
        )
        if number == 0:
            many = copy.deepcopy(asked[CACHE])
            both = ways.generate(
                llava.attached,
                {
                    "input_ids": torch.cat([output.sequences, second.expand(3, -1)], 1),
                    "attention_mask": torch.nn.functional.pad(asked["attention_mask"], (0, ways.NEW + 5), value=1),
                },
                many,
            )
        torch.testing.assert_close(
            torch.stack(both.logits)[:, number], torch.stack(one.logits)[:, 0], atol=5e-5, rtol=1e-4
        )


def test_a_prompt_that_ends_in_an_image(llava: Host):
    ids, content = llava.tiny.image(0, torch.Generator().manual_seed(3))
    prompt, cache = llava.tiny.inputs(Prompt([*words(5, 1), *ids], [content])), RotateKCache(sparsity=0.5, basis="pca")
    llava.attached(**prompt, past_key_values=cache)
    dense = cache.nbytes()
    with pytest.raises(ValueError, match=r"ends in an image, .*call cache.seal\(\) first"):
        cache.ask_many(*padded(QUESTIONS))
    cache.seal()
    assert cache.nbytes() < 0.9 * dense
    asked = cache.ask_many(*padded(QUESTIONS))
    together = torch.stack(answer(llava, asked).logits)
    for number, question in enumerate(QUESTIONS):
        expected = asked_alone(llava, prompt, cache, question, 0)
        torch.testing.assert_close(together[:, number], expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"sparsity": 0}, {"sparsity": 0.5, "basis": "pca"}, {"budget": "0.95x"}], ids=str)
def test_an_image_at_the_end_is_sealed_on_demand_as_text_behind_it_seals_it(llava: Host, options):
    """In a batch of which one row waits; a basis without weights comes out the same, whoever asks for it."""
    ids, content = llava.tiny.image(0, torch.Generator().manual_seed(3))
    waits = Prompt([*words(5, 1), *ids], [content])
    prompt = llava.tiny.inputs(waits, llava.tiny.prompt(2, images=(1,), text=2, tail=3))
    caches = [RotateKCache(**options), RotateKCache(**options)]
    for cache in caches:
        llava.attached(**prompt, past_key_values=cache)
    caches[0].seal()
    caches[0].seal()  # nothing waits any more
    text = torch.tensor([words(3, 1), words(3, 2)])
    for cache in caches:
        mask = torch.nn.functional.pad(prompt["attention_mask"], (0, 3), value=1)
        llava.attached(text, attention_mask=mask, past_key_values=cache)
    if "budget" in options:  # divided by what was there
        assert caches[0].coordinator.planner.made is not None
        return
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        (mine,), (theirs,) = one.kv.segments, other.kv.segments
        if one is caches[0].layers[0]:  # what later layers see follows from how this one was read
            torch.testing.assert_close(mine.keys.data, theirs.keys.data)
        assert mine.positions.tolist() == theirs.positions.tolist()
        assert one.kv.text.length == other.kv.text.length


def test_tokens_chosen_by_attention_need_text_behind_the_image(llava: Host):
    ids, content = llava.tiny.image(0, torch.Generator().manual_seed(3))
    prompt = llava.tiny.inputs(Prompt([*words(5, 1), *ids], [content]))
    cache = RotateKCache(sparsity=0.5, tokens="vl_cache:0.5")
    llava.attached(**prompt, past_key_values=cache)
    with pytest.raises(ValueError, match="chosen by the attention of text behind the image"):
        cache.seal()


def test_beams_and_crops_of_the_batch(llava: Host):
    prompt, cache = ways.padded(llava.tiny), RotateKCache(sparsity=0.5, basis="pca")
    llava.attached(**prompt, past_key_values=cache)
    asked = cache.ask_many(*padded(QUESTIONS), rows=ROWS)
    many, length = asked[CACHE], cache.get_seq_length()
    first = torch.stack(answer(llava, asked).logits)
    many.crop(length - many.get_seq_length())  # asked again, on the same storage
    assert torch.equal(torch.stack(answer(llava, asked).logits), first)
    many.crop(5 - many.get_seq_length())
    assert many.get_seq_length() == 5 and many.layers[0].kv.text.length == 0
    asked = cache.ask_many(*padded(QUESTIONS), rows=ROWS)
    asked[CACHE].crop(-2)  # before it was asked
    asked[CACHE].layers[0].kv.views(None)
    asked = cache.ask_many(*padded(QUESTIONS), rows=ROWS)
    asked[CACHE].batch_repeat_interleave(2)
    beams = answer(llava, asked, num_beams=2, output_logits=False)
    assert beams.sequences.shape[0] == 3


def test_a_saved_prompt_is_asked_many_questions(llava: Host, tmp_path):
    prompt, cache = ways.padded(llava.tiny), RotateKCache(sparsity=0.5, basis="pca")
    llava.attached(**prompt, past_key_values=cache)
    cache.save(tmp_path / "prompt")
    expected = answer(llava, cache.ask_many(*padded(QUESTIONS), rows=ROWS))
    loaded = RotateKCache.load(tmp_path / "prompt")
    asked = loaded.ask_many(*padded(QUESTIONS), rows=ROWS)
    asked[CACHE].save(tmp_path / "many")  # and what was asked is saved, the prompt in it once
    assert (tmp_path / "many").stat().st_size < 1.5 * (tmp_path / "prompt").stat().st_size
    asked[CACHE] = RotateKCache.load(tmp_path / "many")
    assert torch.equal(torch.stack(answer(llava, asked).logits), torch.stack(expected.logits))


def test_images_of_the_prompt_that_come_again_are_refused(llava: Host):
    prompt, cache = ways.one(llava.tiny), RotateKCache(sparsity=0.5)
    llava.attached(**prompt, past_key_values=cache)
    asked = cache.ask_many(*padded(QUESTIONS))
    with pytest.raises(ValueError, match=r"have 0 placeholders: .* Leave it out"):
        llava.attached.generate(**asked, pixel_values=prompt["pixel_values"], max_new_tokens=2)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_question_that_repeats_the_prompt_is_refused(llava: Host, tmp_path, loaded):
    prompt, cache = ways.padded(llava.tiny), RotateKCache(sparsity=0.5)
    ways.generate(llava.attached, prompt, cache, max_new_tokens=1)
    if loaded:
        cache.save(tmp_path / "one")
        cache = RotateKCache.load(tmp_path / "one")
    question = torch.tensor([words(4, 1)] * 2)
    again = torch.cat([prompt["input_ids"], question], 1)
    mask = torch.cat([prompt["attention_mask"], torch.ones_like(question)], 1)
    for extra in (0, 3):  # padded by another tokenizer call, or as it was
        ids = torch.nn.functional.pad(again, (extra, 0), value=PAD)
        seen = torch.nn.functional.pad(mask, (extra, 0))
        with pytest.raises(ValueError, match=r"number 0 begins with all \d+ tokens .*leave out the images"):
            cache.ask_many(ids, seen)
    assert cache.ask_many(question)


def test_what_cannot_be_asked_is_named(llava: Host):
    cache = RotateKCache(sparsity=0.5)
    ids, mask = padded(QUESTIONS)
    with pytest.raises(ValueError, match="holds no prompt to ask about"):
        cache.ask_many(ids)
    prompt = ways.padded(llava.tiny)
    llava.attached(**prompt, past_key_values=cache)
    with pytest.raises(ValueError, match=r"holds 2 rows and there are 3 questions: .*rows=\[0, 0, 1\]"):
        cache.ask_many(ids, mask)
    for rows in ([0, 1], [0, 1, 2], [0, -1, 0], [0, 0.7, 1.2], [True, False, True], torch.rand(3), 1):
        with pytest.raises(ValueError, match="rows: expected 3 numbers from 0 to 1"):
            cache.ask_many(ids, mask, rows=rows)
    with pytest.raises(ValueError, match="expected questions padded on the left"):
        cache.ask_many(ids, mask.flip(1), rows=ROWS)
    with pytest.raises(ValueError, match=r"expected the shape of questions \[3, 9\], got \[3, 4\]"):
        cache.ask_many(ids, mask[:, :4], rows=ROWS)
    with pytest.raises(ValueError, match=r"expected a tensor of ids \[questions, tokens\], got \[9\]"):
        cache.ask_many(ids[0])
    with pytest.raises(ValueError, match=r"expected at least one, of one token or more, got \[3, 0\]"):
        cache.ask_many(ids[:, :0], rows=ROWS)
    with pytest.raises(ValueError, match="conversation: expected a tensor of ids, got list"):
        cache.ask_many(ids, mask, rows=ROWS, conversation=prompt["input_ids"].tolist())
    ways.generate(llava.attached, ways.follow_up(llava.tiny, prompt, prompt["input_ids"], words(3, 1)), cache)
    with pytest.raises(ValueError, match=r"conversation: expected ids \[2, at least .*those known are"):
        cache.ask_many(ids, mask, rows=ROWS)
