"""A captured graph without a GPU: operations are recorded, and repeated on the same tensors as a CUDA graph would.

What the host knew while recording is frozen: numbers, shapes, and which tensor an operation reads.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from rotatek_cache.core.attention import attend_by_heads, reference_attention

# What makes the host wait for a device.
READS = (
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.is_nonzero",
    "aten.equal",
    "aten.masked_select",
    "aten.unique",
    "aten.lift_fresh",  # a tensor of host numbers, which a GPU would be sent
)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.reads: list[str] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for given, argument in zip(func._schema.arguments, args, strict=False):
            if given.alias_info is not None and given.alias_info.is_write:
                self.before.append((argument, argument.clone()))
        if isinstance(kwargs.get("out"), Tensor):
            self.before.append((kwargs["out"], kwargs["out"].clone()))
        out = func(*args, **kwargs)
        if str(func).startswith(READS):
            self.reads.append(str(func))
        outputs = [part for part in tree_flatten(out)[0] if isinstance(part, Tensor)]
        # In inference mode whole functions arrive here, and those that may return a view may have copied.
        inputs = [part for part in tree_flatten((args, kwargs))[0] if isinstance(part, Tensor)]
        storages = {part.untyped_storage().data_ptr() for part in inputs}
        views = func.is_view and all(part.untyped_storage().data_ptr() in storages for part in outputs)
        if not views:
            self.operations.append((func, args, kwargs, outputs))
        return out

    def undo(self) -> None:
        for tensor, before in reversed(self.before):
            tensor.copy_(before)


class RecordedGraph:
    """In the place of `rotatek_cache.hf.decode_graphs.CudaGraph`."""

    made: list["RecordedGraph"] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.replays = 0
        RecordedGraph.made.append(self)

    def capture(self, warm_up: Callable[[], Any], step: Callable[[], Any]) -> Any:
        warm_up()
        # A capture runs nothing: what it writes is put back.
        with _Recorder() as recorder:
            output = step()
        recorder.undo()
        assert not recorder.reads, recorder.reads
        self.operations = recorder.operations
        return output

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, outputs in self.operations:
            again = [part for part in tree_flatten(func(*args, **kwargs))[0] if isinstance(part, Tensor)]
            for kept, new in zip(outputs, again, strict=True):
                if new.data_ptr() != kept.data_ptr() or new.dtype != kept.dtype:
                    kept.copy_(new)


def attend_on_device(query, segments, scale, *, impl="auto", return_lse=True):
    """`attend` by operations that read tables from the device alone, as the kernels do: each segment gathered whole."""
    if any(segment.is_by_heads for segment in segments):
        return attend_by_heads(query, segments, functools.partial(attend_on_device, scale=scale, return_lse=return_lse))
    return reference_attention(query, [_gathered(segment) for segment in segments], scale, return_lse=return_lse)


def _gathered(segment):
    import dataclasses

    from rotatek_cache.core.quantization import HeadCodes

    if segment.batched and segment.mask is None and segment.row_stride == segment.max_length:
        return segment
    columns = torch.arange(segment.max_length)
    slots = segment.starts[:, None] + columns
    if segment.slots is not None:
        slots = segment.slots.gather(1, slots.clamp(max=segment.slots.shape[1] - 1)).long()
    if isinstance(segment.key_code, HeadCodes) or isinstance(segment.value_code, HeadCodes):
        keys, key_code = _plain(segment.keys, segment.key_code)
        values, value_code = _plain(segment.values, segment.value_code)
    else:
        keys, values, key_code, value_code = segment.keys, segment.values, segment.key_code, segment.value_code
    slots = slots.clamp(max=max(0, keys.shape[1] - 1))
    mask = (columns < segment.lengths[:, None])[:, None]
    return dataclasses.replace(
        segment,
        keys=keys[:, slots].flatten(1, 2),
        values=values[:, slots].flatten(1, 2),
        starts=torch.arange(len(segment.starts)) * segment.max_length,
        lengths=torch.full_like(segment.lengths, segment.max_length),
        row_stride=segment.max_length,
        batched=True,
        slots=None,
        mask=mask,
        key_code=key_code,
        value_code=value_code,
    )


def _plain(stored, code):
    from rotatek_cache.core.quantization import HeadCodes

    if not isinstance(code, HeadCodes):
        return (stored if code is None else code.unpack(stored)), None
    return code.unpack(code.split(stored)), None
