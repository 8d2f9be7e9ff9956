"""Conversations of several turns in one padded batch are those of each alone, in families with positions of their own.

The models and caches are real (tiny, random); their processor is written out here, since those of most families need
files from the hub. Its words are token ids.
"""

from types import SimpleNamespace

import pytest
import torch
from hosts import build_host
from tiny_parts import END, PAD, SPECIAL
from transformers import BatchFeature, DynamicCache

from rotatek_cache import RotateKCache
from rotatek_cache.hf.chat import Chat, InputError

ENDS = [END, *range(100, 150)]  # of these some row meets one early


class Words:
    """A tokenizer whose words are token ids."""

    pad_token_id, eos_token_id, padding_side = PAD, END, "left"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [int(word) for word in text.split()]}

    def batch_decode(self, ids, skip_special_tokens=True):
        return [" ".join(str(i) for i in row if i not in SPECIAL) for row in ids.tolist()]


class Processor:
    """Renders conversations as their words; an image of a message is a whole `Prompt` of the family."""

    chat_template = "written out below"

    def __init__(self, tiny):
        self.tiny, self.tokenizer = tiny, Words()

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize, **kwargs):
        if tokenize:
            prompts = [turns[0]["content"][0]["image"] for turns in messages]
            return BatchFeature(self.tiny.inputs(*prompts))
        parts = [(turn["role"], turn["content"][-1]["text"]) for turn in messages]
        return "".join(text if role == "assistant" else f" {END} {text} " for role, text in parts)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("kind", ["dense", "ours"])
def test_turns_in_a_padded_batch_are_those_of_each_alone(family, kind):
    host = build_host(family)
    model, tiny = host.attached, host.tiny
    usual = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = ENDS
    try:
        chat = Chat(model, Processor(tiny))
        prompts = [
            tiny.prompt(1, images=(0,)),
            tiny.prompt(2, images=(1,), text=2, tail=3),
            tiny.prompt(3, images=(0,)),
        ]

        def converse(rows):
            text = model.config.get_text_config(decoder=True)
            cache = (
                DynamicCache(config=text) if kind == "dense" else RotateKCache.for_study(rank=16, always_compress=True)
            )
            batch = chat.begin([[prompts[row]] for row in rows], ["?"] * len(rows), cache, max_new_tokens=6)
            answers = [batch.answers]
            for turn in range(2):
                chat.go_on(batch, [f"{20 + row} {30 + turn} " * (row + 1) for row in rows])
                answers.append(batch.answers)
            return list(zip(*answers, strict=True)), batch

        together, batch = converse([0, 1, 2])
        lengths = {len(answer.split()) for row in together for answer in row}
        assert len(lengths) > 1 and (batch.mask == 0).any()  # rows are padded inside
        for row in range(3):
            (alone,), _ = converse([row])
            assert alone == together[row]
    finally:
        model.generation_config.eos_token_id = usual


def test_conversations_of_models_with_windows_go_one_at_a_time():
    host = build_host("gemma3")
    chat = Chat(host.attached, Processor(host.tiny))
    prompts = [host.tiny.prompt(seed, images=(0,)) for seed in (1, 2)]
    batch = chat.begin([[prompt] for prompt in prompts], ["?"] * 2, RotateKCache(rank=16), max_new_tokens=2)
    with pytest.raises(InputError, match=r"sliding_attention layers.*one at a time \(batch 1\)"):
        chat.go_on(batch, ["20", "21"])
    alone = chat.begin([prompts[:1]], ["?"], RotateKCache(rank=16), max_new_tokens=2)
    chat.go_on(alone, ["20"])
    assert alone.answers[0]


def test_a_template_that_rewrites_the_past_is_refused():
    host = build_host("llava")

    class Rewriting(Processor):
        def apply_chat_template(self, messages, **kwargs):
            return f"{len(messages)} turns"

    with pytest.raises(InputError, match="rewrites earlier turns"):
        Chat(host.attached, Rewriting(host.tiny)).follow_up("1 2")


def test_a_processor_without_a_chat_template_is_named():
    with pytest.raises(InputError, match=r"the processor of 'Llava.*' has no chat template"):
        Chat(build_host("llava").attached, SimpleNamespace(tokenizer=Words(), chat_template=None))
    with pytest.raises(InputError, match="has no tokenizer"):
        Chat(None, SimpleNamespace())
    assert torch.is_grad_enabled() is False
