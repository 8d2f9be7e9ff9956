"""What the layers of a model are given of prompts, for peers that calibrate and for caches that are filled with it."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from evals.fidelity import Batch, RecordingCache
from rotatek_cache.hf.calls import cache_argument


@torch.inference_mode()
def prefill(model: Any, batch: Batch) -> tuple[RecordingCache, Tensor]:
    """Read a prompt densely; return what was recorded, and the logits ``[B, V]`` of what comes next."""
    recorder = RecordingCache()
    ids = batch.prompt["input_ids"]
    if "pixel_values" not in batch.prompt:  # a model of text alone says nothing of images
        recorder.learn_config(model.config)
        recorder.announce_visual(torch.zeros_like(ids, dtype=torch.bool), ids.shape[1])
    given = cache_argument(model, recorder)
    logits = model(**batch.prompt, position_ids=batch.positions()[0], **given, use_cache=True).logits
    return recorder, logits[:, -1]


def recorded(model: Any, prompts: Iterable[dict[str, Tensor]]) -> Iterator[dict[int, tuple[Tensor, Tensor, Tensor]]]:
    """Yield, for each prompt of one row without padding, Keys, Values and queries by layer."""
    for prompt in prompts:
        mask = torch.ones_like(prompt["input_ids"])
        nothing = mask[:, :0]
        recorder, _ = prefill(model, Batch({**prompt, "attention_mask": mask}, nothing, nothing, nothing))
        yield {layer: (keys, values, queries) for layer, (keys, values, queries, _) in recorder.seen.items()}
