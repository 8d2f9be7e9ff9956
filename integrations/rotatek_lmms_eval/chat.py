"""Batches of conversations about images with any vision-language model of transformers and any cache.

chat = Chat.load("rotatek_cache/reader", dtype=torch.bfloat16)
batch = chat.begin([[image]], ["row 1?"], RotateKCache(sparsity=0.75), max_new_tokens=16)
batch.answers                       # ["7 K bar2"]
chat.go_on(batch, ["column B?"])    # the second question, on the same compressed cache
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, Cache

from rotatek_cache import attach

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
ANSWER = "\u27e8answer\u27e9"  # stands for an answer in a rendered conversation


class ChatError(Exception):
    """A model cannot hold such a conversation; the message says why."""


@dataclass
class Conversations:
    """A batch of conversations that share a cache.

    Attributes:
        cache: holds all of `ids` but the last column.
        ids: int64 ``[B, T]``: prompts, answers and follow-ups; rows are padded on the left and inside.
        mask: int64 ``[B, T]``, 0 on padding.
        kinds: the processor's token types by name, ``[B, T]`` (0 is text), where the family has them.
        ends: the token that ended each answer of the last turn; None where it was cut short.
        answers: texts of the last turn.
        max_new_tokens: longest answer.
        options: further arguments of `generate`.
    """

    cache: Cache
    ids: Tensor
    mask: Tensor
    kinds: dict[str, Tensor]
    max_new_tokens: int
    options: dict[str, Any]
    ends: list[int | None] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


class Chat:
    """A vision-language model, attached, with its processor."""

    def __init__(self, model: Any, processor: Any) -> None:
        if getattr(processor, "tokenizer", None) is None:
            raise ChatError(f"{type(processor).__name__} has no tokenizer: this is no vision-language model")
        if not getattr(processor, "chat_template", None):
            name = getattr(model, "name_or_path", "") or type(model).__name__
            raise ChatError(
                f"the processor of '{name}' has no chat template, so nobody knows how it is asked: give it one "
                "(`processor.chat_template`)"
            )
        self.model = model
        self.processor = processor
        self.processor.tokenizer.padding_side = "left"
        if self.processor.tokenizer.pad_token_id is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: Any = "auto",
        device: str | torch.device = "cpu",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
    ) -> "Chat":
        """Load and attach a model by its name or path.

        Raises:
            ChatError: transformers has no such vision-language model, `attach` does not know it, or there is no such
                device.
        """
        check_device(device)
        try:
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
            model = AutoModelForImageTextToText.from_pretrained(
                name, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
            )
            attach(model.to(device).eval())
        except (OSError, ValueError, TypeError, ImportError, KeyError) as error:
            raise ChatError(f"model '{name}' cannot be used: {error}") from error
        return cls(model, processor)

    def begin(
        self,
        images: Sequence[Sequence[Image.Image]],
        questions: Sequence[str],
        cache: Cache,
        *,
        max_new_tokens: int,
        **options: Any,
    ) -> Conversations:
        """Ask the first question of each conversation.

        Args:
            images: those of each conversation; they stand before the question.
            questions: one each.
            cache: an empty one; it goes on with the conversations.
            max_new_tokens: longest answer.
            options: further arguments of `generate`; greedy unless they say otherwise.
        """
        turns = [[_user(question, shown)] for question, shown in zip(questions, images, strict=True)]
        return self.begin_with(turns, cache, max_new_tokens=max_new_tokens, **options)

    def begin_with(
        self, messages: Sequence[Sequence[dict[str, Any]]], cache: Cache, *, max_new_tokens: int, **options: Any
    ) -> Conversations:
        """`begin` with the messages of each conversation as chat templates take them, images and videos inside."""
        inputs = self.processor.apply_chat_template(
            list(messages),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.model.device, self.model.dtype)
        kinds = {name: inputs[name] for name in TOKEN_TYPES if name in inputs}
        greedy = {"do_sample": False, "num_beams": 1}
        batch = Conversations(
            cache, inputs["input_ids"], inputs["attention_mask"], kinds, max_new_tokens, greedy | options
        )
        self._generate(batch, dict(inputs))
        return batch

    def go_on(self, batch: Conversations, questions: Sequence[str]) -> None:
        """Ask each conversation another question; `batch.answers` are those to it, `batch.cache` holds it too."""
        tokenizer = self.processor.tokenizer
        device = batch.ids.device
        kinds = set(getattr(self.model.config.get_text_config(decoder=True), "layer_types", None) or [])
        if len(questions) > 1 and kinds - {"full_attention"}:
            raise ChatError(
                f"this model has {', '.join(sorted(kinds - {'full_attention'}))} layers, in whose window the padding "
                "between answers and later questions would count: hold its conversations one at a time (batch 1)"
            )
        follow = [tokenizer(self._follow_up(text), add_special_tokens=False)["input_ids"] for text in questions]
        # The template closes an answer with the token that has ended it already, unless it was cut short.
        follow = [ids[1:] if ids[:1] == [end] else ids for ids, end in zip(follow, batch.ends, strict=True)]
        width = max(map(len, follow))
        padding = tokenizer.pad_token_id
        ids = torch.tensor([[padding] * (width - len(row)) + row for row in follow], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in follow], device=device)
        batch.ids, batch.mask = torch.cat([batch.ids, ids], 1), torch.cat([batch.mask, mask], 1)
        length = batch.ids.shape[1]
        batch.kinds = {
            name: torch.nn.functional.pad(kind, (0, length - kind.shape[1])) for name, kind in batch.kinds.items()
        }
        self._generate(batch, {"input_ids": batch.ids, "attention_mask": batch.mask} | batch.kinds)

    @torch.inference_mode()
    def _generate(self, batch: Conversations, inputs: dict[str, Any]) -> None:
        prompt = batch.ids.shape[1]
        ids = self.model.generate(
            **inputs,
            past_key_values=batch.cache,
            max_new_tokens=batch.max_new_tokens,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            **batch.options,
        )
        new = ids[:, prompt:]
        ends = torch.isin(new, torch.tensor(self._end_ids(), device=new.device))
        # A row that ended before the others goes on with padding behind its end.
        own = (ends.cumsum(1) - ends.long()) == 0
        batch.ends = [
            int(row[int(end.int().argmax())]) if bool(end.any()) else None for row, end in zip(new, ends, strict=True)
        ]
        batch.ids, batch.mask = ids, torch.cat([batch.mask, own.to(batch.mask)], 1)
        texts = self.processor.tokenizer.batch_decode(
            new.masked_fill(~own, self.processor.tokenizer.pad_token_id), skip_special_tokens=True
        )
        batch.answers = [text.strip() for text in texts]

    def _end_ids(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.processor.tokenizer.eos_token_id
        return [] if ends is None else ends if isinstance(ends, list) else [ends]

    def _follow_up(self, question: str) -> str:
        """What the chat template writes behind an answer to ask `question`."""
        first = _user("?", ())
        answer = {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}
        template = self.processor.apply_chat_template
        before = template([first], add_generation_prompt=True, tokenize=False) + ANSWER
        after: str = template([first, answer, _user(question, ())], add_generation_prompt=True, tokenize=False)
        if not after.startswith(before):
            raise ChatError("the chat template rewrites earlier turns, so that a cache cannot go on with them")
        return after.removeprefix(before)


def check_device(device: str | torch.device) -> None:
    """Raises ChatError if torch cannot put a tensor on `device`."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name; a kind that this build or machine lacks
        raise ChatError(f"device '{device}' cannot be used: {str(error).splitlines()[0]}") from error


def _user(text: str, images: Sequence[Image.Image]) -> dict[str, Any]:
    shown = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}
