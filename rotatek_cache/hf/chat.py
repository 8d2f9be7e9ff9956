"""Conversations about images with any vision-language model of transformers and any cache, in batches.

chat = Chat.load()                  # the reader that comes with the package; or a name, or a path
batch = chat.begin([[image]], ["row 1?"], RotateKCache(sparsity=0.75), max_new_tokens=16)
batch.answers                       # ["7 K bar2"]
chat.go_on(batch, ["column B?"])    # the second question, on the same compressed cache
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Cache,
)

from rotatek_cache.hf.attach import attach
from rotatek_cache.hf.calls import cache_argument

READER = Path(__file__).parents[1] / "reader"
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
ANSWER = "\u27e8answer\u27e9"  # stands for an answer in a rendered conversation


class InputError(Exception):
    """A model, image, device or other input that cannot be used; the message says what and why."""


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
    """A vision-language model, attached, with its processor.

    Args:
        model, processor: as transformers loads them.
        name: of the model, for messages.
        template_needed: whether to refuse a processor without a chat template; otherwise such a one is asked by a
            placeholder for each image and the question behind them, and conversations have one turn.
    """

    def __init__(self, model: Any, processor: Any, name: str = "", *, template_needed: bool = True) -> None:
        self.name = name or getattr(model, "name_or_path", "") or type(model).__name__
        if getattr(processor, "tokenizer", None) is None:
            raise InputError(f"{type(processor).__name__} has no tokenizer: this is no vision-language model")
        self.has_template = bool(getattr(processor, "chat_template", None))
        if template_needed and not self.has_template:
            raise InputError(
                f"the processor of '{self.name}' has no chat template, which says how the model is asked: give it one "
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
        name: str | Path | None = None,
        *,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        template_needed: bool = True,
        visual_token_ids: Sequence[int] | None = None,
    ) -> "Chat":
        """Load and attach a model by its name or path; None is the reader that comes with the package.

        Args:
            name: what `from_pretrained` of transformers takes.
            dtype: a torch dtype or its name; "auto" is the checkpoint's, and float32 for None.
            device: what torch takes; "auto" is CUDA where there is one.
            attn_implementation: of the vision tower and of dense attention.
            trust_remote_code: run code that comes with a checkpoint.
            template_needed: as in `Chat`.
            visual_token_ids: as in `attach`.

        Raises:
            InputError: transformers has no such vision-language model, `attach` does not know it, or there is no such
                device or dtype.
        """
        source = str(READER if name is None else name)
        wanted = torch.float32 if name is None and dtype == "auto" else _dtype(dtype)
        where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        check_device(where)
        if not trust_remote_code:  # such a model may have a class of its own
            _check_is_vlm(source)
        processor = _load_processor(source, trust_remote_code=trust_remote_code)
        try:
            model = AutoModelForImageTextToText.from_pretrained(
                source, dtype=wanted, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
            )
            model = model.to(where).eval()
        except (OSError, ValueError, RuntimeError, TypeError, ImportError, KeyError, SafetensorError) as error:
            raise InputError(f"model '{source}' cannot be loaded: {_first_sentence(error)}") from error
        try:
            attach(model, visual_token_ids=visual_token_ids)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error
        return cls(model, processor, source, template_needed=template_needed)

    def inputs(self, messages: Sequence[Sequence[dict[str, Any]]]) -> Any:
        """Render conversations, images and videos inside, to arguments of the model."""
        inputs = self.processor.apply_chat_template(
            list(messages),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        return inputs.to(self.model.device, self.model.dtype)

    def prompt(self, images: Sequence[Image.Image], question: str) -> Any:
        """Render one question about `images`, which stand before it, to arguments of the model."""
        if self.has_template:
            return self.inputs([[user_turn(question, images)]])
        placeholders = getattr(self.processor, "image_token", "<image>") * len(images)
        inputs = self.processor(images=list(images), text=[f"{placeholders}\n{question}"], return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)

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
        turns = [[user_turn(question, shown)] for question, shown in zip(questions, images, strict=True)]
        return self.begin_with(self.inputs(turns), cache, max_new_tokens=max_new_tokens, **options)

    def begin_with(self, inputs: Any, cache: Cache, *, max_new_tokens: int, **options: Any) -> Conversations:
        """Return `begin` with what `inputs` or `prompt` has rendered."""
        kinds = {name: inputs[name] for name in TOKEN_TYPES if name in inputs}
        greedy = {"do_sample": False, "num_beams": 1}
        batch = Conversations(
            cache, inputs["input_ids"], inputs["attention_mask"], kinds, max_new_tokens, greedy | options
        )
        self._generate(batch, dict(inputs))
        return batch

    def go_on(self, batch: Conversations, questions: Sequence[str]) -> None:
        """Ask each conversation another question; `batch.answers` are those to it, `batch.cache` holds it too."""
        device = batch.ids.device
        kinds = set(getattr(self.model.config.get_text_config(decoder=True), "layer_types", None) or [])
        if len(questions) > 1 and kinds - {"full_attention"}:
            raise InputError(
                f"this model has {', '.join(sorted(kinds - {'full_attention'}))} layers, in whose window the padding "
                "between answers and later questions would count: hold its conversations one at a time (batch 1)"
            )
        follow = [self.follow_up(text) for text in questions]
        # The template closes an answer with the token that has ended it already, unless it was cut short.
        follow = [ids[1:] if ids[:1] == [end] else ids for ids, end in zip(follow, batch.ends, strict=True)]
        width = max(map(len, follow))
        padding = self.processor.tokenizer.pad_token_id
        ids = torch.tensor([[padding] * (width - len(row)) + row for row in follow], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in follow], device=device)
        batch.ids, batch.mask = torch.cat([batch.ids, ids], 1), torch.cat([batch.mask, mask], 1)
        self.answer(batch)

    def answer(self, batch: Conversations) -> None:
        """Let the model write on from where each conversation stands."""
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
            **cache_argument(self.model, batch.cache),
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

    def follow_up(self, question: str) -> list[int]:
        """Render what the chat template writes behind an answer to ask `question`, as token ids.

        Raises:
            InputError: there is no template, or it rewrites earlier turns.
        """
        if not self.has_template:
            raise InputError(f"the processor of '{self.name}' has no chat template, so there are no later turns")
        first = user_turn("?", ())
        answer = {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}
        template = self.processor.apply_chat_template
        before = template([first], add_generation_prompt=True, tokenize=False) + ANSWER
        after: str = template([first, answer, user_turn(question, ())], add_generation_prompt=True, tokenize=False)
        if not after.startswith(before):
            raise InputError("the chat template rewrites earlier turns, so that a cache cannot go on with them")
        ids: list[int] = self.processor.tokenizer(after.removeprefix(before), add_special_tokens=False)["input_ids"]
        return ids


def check_device(device: str | torch.device) -> None:
    """Raise an InputError if torch cannot put a tensor on `device`."""
    try:
        torch.empty(0, dtype=torch.bool, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name; a kind that this build or machine lacks
        raise InputError(f"device '{device}' cannot be used: {str(error).splitlines()[0]}") from error


def open_image(path: Path) -> Image.Image:
    """Read the image file at `path`, or raise an InputError."""
    if not path.is_file():
        raise InputError(f"there is no image file '{path}'")
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"'{path}' cannot be read as an image: {error}") from error


def user_turn(text: str, images: Sequence[Image.Image]) -> dict[str, Any]:
    """Write a question about `images`, which stand before it, as a message for a chat template."""
    shown = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def _dtype(given: torch.dtype | str) -> torch.dtype | str:
    if given == "auto" or isinstance(given, torch.dtype):
        return given
    dtype = getattr(torch, given, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype must be 'auto' or the name of a floating torch dtype, got '{given}'")
    return dtype


def _check_is_vlm(source: str) -> None:
    if (source.startswith((".", "/", "~")) or source.count("/") > 1) and not Path(source).is_dir():
        raise InputError(f"there is no folder '{source}' with a model")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(
            f"there is no model '{source}' that transformers can load: {_first_sentence(error)}"
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise InputError(
            f"model '{source}' ({config.model_type}) is no vision-language model: transformers has no "
            "image-text-to-text class for it"
        )


def _load_processor(source: str, *, trust_remote_code: bool) -> Any:
    message = f"model '{source}' has no processor for images and text (AutoProcessor): "
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, TypeError, AttributeError, KeyError) as error:
        raise InputError(message + _first_sentence(error)) from error
    missing = [name for name in ("image_processor", "tokenizer") if getattr(processor, name, None) is None]
    if missing:
        raise InputError(f"{message}what is saved with it lacks {' and '.join(missing).replace('_', ' ')}")
    return processor


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
