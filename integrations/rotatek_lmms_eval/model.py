"""The lmms-eval model "rotatek": any vision-language model of transformers, answering from a `RotateKCache`.

    lmms-eval --model rotatek --model_args pretrained=Qwen/Qwen2.5-VL-7B-Instruct,sparsity=0.75 --tasks chartqa \
        --batch_size 8

Model arguments beside those of `RotateK` are the options of `RotateKCache`; a comma inside one is written as a
semicolon (`tokens=vl_cache:0.4;uniform=0.8`). `cache=dense` answers from the dense cache, for comparison.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval import utils
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers import Cache, DynamicCache

from rotatek_cache import RotateKCache
from rotatek_cache.hf.chat import Chat

# What tasks give to `generate`; the rest of their settings is about other ways of answering.
PASSED = ("temperature", "top_p", "num_beams", "do_sample")


def manifest() -> ModelManifest:
    """Name the model to lmms-eval's entry point."""
    return ModelManifest("rotatek", chat_class_path=f"{__name__}.RotateK")


class RotateK(lmms):
    """A model of transformers with a compressed cache.

    Args:
        pretrained: name or path of the model.
        device: a torch device; "auto" is this process's GPU where there is one.
        batch_size: requests answered at once.
        dtype: "auto" (the checkpoint's) or the name of a torch dtype.
        cache: "rotatek", or "dense" for the model's usual cache.
        max_new_tokens: longest answer of tasks that set none.
        attn_implementation: of the vision tower and of dense attention.
        trust_remote_code: run code that comes with a checkpoint.
        options: those of `RotateKCache`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = "auto",
        batch_size: int | str = 1,
        dtype: str = "auto",
        cache: str = "rotatek",
        max_new_tokens: int = 1024,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if cache not in ("rotatek", "dense"):
            raise ValueError(f"cache must be 'rotatek' or 'dense', got {cache!r}")
        if cache == "dense" and options:
            raise ValueError(f"cache=dense takes no options of RotateKCache, got {', '.join(options)}")
        for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
            if not str(value).isdigit() or int(value) < 1:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype must be 'auto' or the name of a torch dtype, got {dtype!r}")
        if unknown := [name for name in options if name not in CACHE_OPTIONS]:
            raise ValueError(
                f"unknown model arguments {', '.join(map(repr, unknown))}; known are {', '.join(OWN)}, and the options "
                f"of RotateKCache: {', '.join(CACHE_OPTIONS)}"
            )
        self.options = {
            name: value.replace(";", ",") if isinstance(value, str) else value for name, value in options.items()
        }
        self.dense = cache == "dense"
        self.batch_size = int(batch_size)
        self.max_new_tokens = int(max_new_tokens)
        wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        where = self.accelerator.device if device in (None, "auto", "cuda") else str(device)
        if not self.dense:
            RotateKCache(**self.options)  # wrong options should not wait for the model
        self.chat = Chat.load(
            pretrained,
            dtype=wanted,
            device=where,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of processes; lmms-eval deals the requests out to them."""
        return self._world_size

    @property
    def device(self) -> torch.device:
        """Where lmms-eval puts what the processes tell one another."""
        return torch.device(self.chat.model.device)

    def _new_cache(self) -> Cache:
        if self.dense:
            return DynamicCache(config=self.chat.model.config.get_text_config(decoder=True))
        return RotateKCache(**self.options)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer requests of any tasks, in their order."""
        # Requests with other settings of `generate` go into other batches.
        ordered = utils.Collator(
            [request.args for request in requests],
            lambda arguments: (arguments[4], arguments[3]),
            group_fn=lambda arguments: arguments[2],
            grouping=True,
        )
        answers: list[str] = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as progress:
            for chunk in ordered.get_batched(n=self.batch_size, batch_fn=None):
                contexts, to_messages, settings, documents, tasks, splits = zip(*chunk, strict=True)
                messages = [
                    ChatMessages(messages=make(self.task_dict[task][split][document])).to_hf_messages()
                    for make, document, task, split in zip(to_messages, documents, tasks, splits, strict=True)
                ]
                given = dict(settings[0])
                batch = self.chat.begin_with(
                    self.chat.inputs(messages),
                    self._new_cache(),
                    max_new_tokens=int(given.get("max_new_tokens", self.max_new_tokens)),
                    **_sampling(given),
                )
                for context, answer in zip(contexts, batch.answers, strict=True):
                    cut = _until(answer, given.get("until"))
                    answers.append(cut)
                    self.cache_hook.add_partial("generate_until", (context, settings[0]), cut)
                progress.update(len(chunk))
        return ordered.get_original(answers)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refuse them: the model generates."""
        raise NotImplementedError("the model 'rotatek' generates; tasks with log-likelihoods need another model")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refuse them: the model answers single questions."""
        raise NotImplementedError("the model 'rotatek' answers single questions; tasks of several rounds are not run")


def _names(function: Any) -> list[str]:
    """List the arguments that `function` takes by name."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind != inspect.Parameter.VAR_KEYWORD]


OWN = _names(RotateK)
CACHE_OPTIONS = _names(RotateKCache)


def _sampling(given: dict[str, Any]) -> dict[str, Any]:
    """Choose arguments of `generate`; greedy at temperature 0, which tasks set together with arguments of sampling."""
    chosen = {name: given[name] for name in PASSED if given.get(name) is not None}
    if chosen.get("do_sample", True) and chosen.get("temperature", 0) > 0:
        return chosen | {"do_sample": True}
    return {"do_sample": False, "num_beams": chosen.get("num_beams", 1)}


def _until(answer: str, ends: str | Sequence[str] | None) -> str:
    """Cut the answer at the first of the texts that end it."""
    for end in [ends] if isinstance(ends, str) else ends or []:
        answer = answer.split(end, maxsplit=1)[0]
    return answer.strip()
