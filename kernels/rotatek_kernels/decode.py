"""Fused attention over segment views: plans and launches of the kernels (`attend_triton.py`, `merge_triton.py`)."""

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rotatek_cache.core.attention import UnsupportedError
from rotatek_cache.core.segments import SegmentView
from rotatek_kernels import checks
from rotatek_kernels.attend_triton import attend_splits, project_queries
from rotatek_kernels.checks import arguments_key, check_arguments, check_scale
from rotatek_kernels.forms import STATE_ALIGN, MergeArguments, MergingArguments, SegmentArguments, encode_integer
from rotatek_kernels.merge_triton import merge_splits
from rotatek_kernels.occupancy import H200, INTERPRETER, Load, Processor, programs_held, split_counts
from rotatek_kernels.shapes import SEGMENTS_PER_LAUNCH, BlockSizes, SegmentShape, Shapes, shapes_of

UNIT = STATE_ALIGN.value
REMEMBERED = 1024  # shapes; layouts and kernels of a shape
LENGTH_STEP = 64  # splits are chosen for lengths in steps of so many tokens, not anew for each that text grows by
MAX_GRID = 65535  # programs along the second and third dimension of a grid
MAX_GROUP = 64  # query heads of a KV head
INTERPRETED = not isinstance(attend_splits, triton.runtime.JITFunction)
NO_STRIDES = (encode_integer(0), encode_integer(0))


class Launch(NamedTuple):
    """A kernel with everything that its launch needs.

    Attributes:
        kernel: of Triton.
        grid: of programs.
        leading: its arguments up to the constants.
        constants: that it is compiled for, in the order of its parameters.
        options: for Triton.
    """

    kernel: Any
    grid: tuple[int, int, int]
    leading: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by name."""
        return {**dict(zip(self.kernel.arg_names, self.leading, strict=False)), **self.constants}

    def run(self) -> Any:
        """Launch as Triton does it: look at all arguments, and compile if need be; return the compiled kernel."""
        return self.kernel[self.grid](*self.leading, **self.constants, **self.options)

    def compile(self) -> Any:
        """Return the compiled kernel without running it."""
        return self.kernel.warmup(*self.leading, grid=self.grid, **self.constants, **self.options)


class Part(NamedTuple):
    """A launch of a `Layout`, but for addresses, scale and lengths.

    Attributes:
        segments: which of them.
        grid: of programs.
        integers: that the kernel is given.
        constants: that it is compiled for, in the order of its parameters.
        values: of the constants.
    """

    segments: slice
    grid: tuple[int, int, int]
    integers: tuple[int, ...]
    constants: dict[str, Any]
    values: tuple[Any, ...]


class Layout(NamedTuple):
    """Places of the states of all splits, and the launches that compute them.

    Attributes:
        places: of each segment: first split, splits, where its states and projected queries begin; encoded.
        numbers: of all states and their log-sum-exps, which lie behind them.
        largest: of the integers in it.
        parts: the launches over segments.
        projects: what launches before each of them; empty where each program projects its queries.
        merge: the launch that merges; None where the last program does.
    """

    places: tuple[tuple[int, int, int, int], ...]
    numbers: int
    largest: int
    parts: tuple[Part, ...]
    projects: tuple[Part, ...]
    merge: Part | None


@dataclass(slots=True)
class Prepared:
    """Results worked out once for arguments of some types, shapes and strides, and used again for all such.

    Nothing of it depends on where tensors lie or, but for `layouts`, on lengths: addresses are read in each call.

    Attributes:
        reason: why the kernel does not read them; None if it does.
        shapes: what follows from their shapes; None if there is a reason.
        slots: programs that the GPU holds at once, known once the kernel is compiled.
        layouts: by lengths in steps of `LENGTH_STEP`.
        compiled: the kernels of all launches, by what Triton compiles anew for: alignments and ranges of integers.
    """

    reason: str | None
    shapes: Shapes | None
    slots: int | None = None
    layouts: dict[tuple[int, ...], Layout] = field(default_factory=dict)
    compiled: dict[Hashable, list[Any]] = field(default_factory=dict)


def decode_attention(
    query: Tensor,
    segments: Sequence[SegmentView],
    scale: float,
    *,
    sizes: BlockSizes | None = None,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend as `rotatek_cache.attend` does, fused: one pass over what the segments store.

    A segment is read as it lies, coefficients as numbers or as codes; the queries are projected inside, and coded
    Values are summed as coefficients, which the merge rotates back once. The segments of a layer share a launch (up to
    `SEGMENTS_PER_LAUNCH` of them), whose partial states a second kernel merges; with `counters`, and one query a row,
    the programs that end last do that, and there is one launch. Nothing is read on the host, so that a step can be
    captured in a CUDA graph; a row whose length is negative counts as empty.

    Not gained: there is no backward, and float32 runs without tensor cores.

    Args:
        query: ``[B, H_q, Q, D]`` after RoPE; float16, bfloat16 or float32 on a GPU (on the CPU under
            ``TRITON_INTERPRET=1``).
        segments: views of what the cache stores: numbers in the query's dtype or packed codes, last dimensions
            contiguous; their KV heads divide ``H_q``. Masks are ``[B, Q, max_length]``. Ranks are multiples of 8.
        scale: factor on ``q . k``.
        sizes: of blocks, in place of the table's (to compare them).
        counters: int32 zeros, at least one for each row and KV head, on the query's device; left zero. No other call
            that may run at the same time, on another stream or in another graph, may be given the same.

    Returns:
        Output ``[B, Q, H_q, D_v]`` in the query's dtype and natural log-sum-exp ``[B, H_q, Q]`` in float32. A query
        that sees no token has output 0 and log-sum-exp -inf.

    Raises:
        TypeError, ValueError: an argument is malformed; nothing was launched then.
        UnsupportedError: there is an `unsupported_reason`.
    """
    if isinstance(query, Tensor) and query.dim() and query.stride(-1) != 1:
        query = query.contiguous()
    prepared = _prepare(query, segments, sizes, counters)
    check_scale(scale)
    if prepared.shapes is None:
        raise UnsupportedError(prepared.reason)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(query):
        return _run(prepared, prepared.shapes, query, segments, float(scale), counters)


def unsupported_reason(query: Tensor, segments: Sequence[SegmentView]) -> str | None:
    """Say why this kernel does not read arguments that are well formed; None if it does.

    Raises:
        TypeError, ValueError: an argument is malformed.
    """
    return _prepare(query, segments, None).reason


_REMEMBERED: dict[Hashable, Prepared] = {}


def _prepare(
    query: Tensor, segments: Sequence[SegmentView], sizes: BlockSizes | None, counters: Tensor | None = None
) -> Prepared:
    """Check the arguments, once for each `arguments_key`."""
    key: Hashable = None
    try:
        counted = None if counters is None else (counters.dtype, counters.shape, counters.stride(), counters.device)
        key = (arguments_key(query, segments), sizes, counted)
        prepared = _REMEMBERED.get(key)
    except (AttributeError, TypeError):
        prepared = None  # something is not of its type, which the checks will name
    if prepared is not None:
        return prepared
    check_arguments(query, segments)
    reason = checks.unsupported_reason(query, segments) or _launch_reason(query, segments)
    if counters is not None:
        _check_counters(counters, query, segments)
    prepared = Prepared(reason, None if reason else shapes_of(query, segments, sizes, counted=counters is not None))
    if key is not None:
        _keep(_REMEMBERED, key, prepared)
    return prepared


def _check_counters(counters: Tensor, query: Tensor, segments: Sequence[SegmentView]) -> None:
    needed = query.shape[0] * segments[0].heads
    if not isinstance(counters, Tensor) or counters.dtype != torch.int32:
        raise TypeError(f"counters must be a tensor of int32, got {getattr(counters, 'dtype', type(counters))}")
    if counters.dim() != 1 or counters.shape[0] < needed or not counters.is_contiguous():
        raise ValueError(
            f"counters must be one for each row and KV head, at least {needed} side by side, got shape "
            f"{tuple(counters.shape)} with strides {counters.stride()}; make them with torch.zeros"
        )
    if counters.device != query.device:
        raise ValueError(f"counters must be on the device of the query, {query.device}, got {counters.device}")


def _keep(memory: dict, key: Hashable, value: Any) -> None:
    if len(memory) >= REMEMBERED:
        memory.clear()
    memory[key] = value


def _launch_reason(query: Tensor, segments: Sequence[SegmentView]) -> str | None:
    """Say what Triton needs besides, if it is not so."""
    heads = segments[0].heads
    if query.device.type != "cuda" and not INTERPRETED:
        return (
            f"query must be on a GPU, got {query.device}; on the CPU use impl='cpp' or 'torch', or set "
            "TRITON_INTERPRET=1 before Triton is imported"
        )
    batch, q_heads = query.shape[:2]
    if batch > MAX_GRID or heads > MAX_GRID:
        return f"query must have at most {MAX_GRID} rows and KV heads, got {batch} and {heads}"
    if q_heads // heads > MAX_GROUP:
        return f"segments[0].keys must have a KV head for each {MAX_GROUP} query heads, got {heads} for {q_heads}"
    for index, segment in enumerate(segments):
        for state in ("keys", "values"):
            stored = getattr(segment, state)
            if stored.dtype == torch.uint8 and any(stride % 2 for stride in stored.stride()[:-1]):
                return (
                    f"segments[{index}].{state} must lie an even number of bytes apart, since codes are read two bytes "
                    f"at a time, got strides {stored.stride()}; copy them, or use impl='torch'"
                )
    return None


def _run(
    prepared: Prepared,
    shapes: Shapes,
    query: Tensor,
    segments: Sequence[SegmentView],
    scale: float,
    counters: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels: as Triton does it where they may have to be compiled, else directly."""
    if prepared.slots is None:
        prepared.slots = _slots(shapes, query, segments, scale, counters)
    layout = _layout(prepared, shapes, query, segments)
    states, out, lse = _outputs(shapes, layout, query)
    given = (query, states, out, lse, counters)
    attended = [_attended_tensors(segments[shape.order], shape) for shape in shapes.segments]
    merged = [_merged_tensors(segments[shape.order], shape) for shape in shapes.segments]
    sizes = [_sizes(segments[shape.order], shape) for shape in shapes.segments]
    if INTERPRETED:
        for launch in _launches(shapes, layout, scale, given, attended, merged, sizes):
            launch.run()
        return out, lse
    # Triton's launcher takes addresses in place of tensors, and asks nothing of them then.
    addresses = [_addresses(tensors) for tensors in (given, *attended, *merged)]
    key = _specialisation(addresses, layout.largest, sizes)
    compiled = prepared.compiled.get(key)
    if compiled is None:
        launches = _launches(shapes, layout, scale, given, attended, merged, sizes)
        _keep(prepared.compiled, key, [launch.run() for launch in launches])
    else:
        _run_compiled(compiled, shapes, layout, scale, addresses, sizes)
    return out, lse


def _run_compiled(
    compiled: Sequence[Any],
    shapes: Shapes,
    layout: Layout,
    scale: float,
    addresses: Sequence[tuple[int | None, ...]],
    sizes: Sequence[tuple[int, ...]],
) -> None:
    """Launch kernels that were compiled for arguments of these types, alignments and ranges of integers.

    Args:
        compiled: the kernels.
        shapes, layout, scale: of the call.
        addresses: of query, states, output, log-sum-exp and counters, then of what each segment attends to and merges.
        sizes: of each segment.
    """
    query, states, out, lse, counters = addresses[0]
    count = len(sizes)
    attended = tuple(
        [
            (*addresses[1 + index], layout.places[index], sizes[index], shape.basis_strides)
            for index, shape in enumerate(shapes.segments)
        ]
    )
    merged = tuple(
        [
            (*addresses[1 + count + index], layout.places[index], shape.merge_strides)
            for index, shape in enumerate(shapes.segments)
        ]
    )
    merging = None if layout.merge else (counters, out, lse, merged)
    kernels = iter(compiled)
    for part in layout.projects:
        next(kernels)[part.grid](query, states, attended[part.segments], scale, part.integers, *part.values)
    for part, kernel in zip(layout.parts, kernels, strict=False):  # the last kernel may merge
        kernel[part.grid](query, states, attended[part.segments], scale, part.integers, merging, *part.values)
    if layout.merge:
        compiled[-1][layout.merge.grid](states, out, lse, merged, layout.merge.integers, *layout.merge.values)


def _addresses(tensors: tuple[Tensor | None, ...]) -> tuple[int | None, ...]:
    return tuple([None if tensor is None else tensor.data_ptr() for tensor in tensors])


def _specialisation(
    addresses: Sequence[tuple[int | None, ...]], largest: int, sizes: Sequence[tuple[int, ...]]
) -> Hashable:
    """Tell apart what Triton compiles anew for, beyond what `arguments_key` and a layout's splits hold.

    That is which addresses are multiples of 16 and which integers need more than 32 bits; mostly all and none.
    """
    bits = 0
    for one in addresses:
        for address in one:
            if address is not None:
                bits |= address
    aligned: Hashable = None
    if bits & 15:
        aligned = tuple([tuple([address is None or address & 15 == 0 for address in one]) for one in addresses])
    wide: Hashable = None
    if max(largest, *map(max, sizes)) >> 31:
        wide = (largest, *[tuple([number >> 31 for number in one]) for one in sizes])
    return aligned, wide


def plan(
    shapes: Shapes,
    query: Tensor,
    segments: Sequence[SegmentView],
    scale: float,
    slots: int,
    counters: Tensor | None = None,
) -> tuple[list[Launch], Tensor, Tensor]:
    """Plan the launches that decode arguments of `shapes` on a GPU that holds `slots` programs at once.

    Returns:
        The launches, output ``[B, Q, H_q, D_v]`` and log-sum-exp ``[B, H_q, Q]``.
    """
    layout = _lay_out(shapes, _splits(shapes, query, segments, slots))
    states, out, lse = _outputs(shapes, layout, query)
    attended = [_attended_tensors(segments[shape.order], shape) for shape in shapes.segments]
    merged = [_merged_tensors(segments[shape.order], shape) for shape in shapes.segments]
    sizes = [_sizes(segments[shape.order], shape) for shape in shapes.segments]
    return _launches(shapes, layout, scale, (query, states, out, lse, counters), attended, merged, sizes), out, lse


def _slots(
    shapes: Shapes, query: Tensor, segments: Sequence[SegmentView], scale: float, counters: Tensor | None
) -> int:
    """Count the programs that the GPU holds at once of the kernel that this needs, which is compiled for it."""
    processor = _processor(query.device)
    if INTERPRETED:
        return processor.multiprocessors
    held = []
    for launch in plan(shapes, query, segments, scale, processor.multiprocessors, counters)[0]:
        if launch.kernel is not attend_splits:
            continue
        compiled = launch.compile()
        compiled.run  # noqa: B018 - loads it, which tells its registers
        held.append(programs_held(processor, compiled.n_regs, compiled.metadata.shared, compiled.metadata.num_warps))
    return processor.multiprocessors * min(held, default=1)


@functools.cache
def _processor(device: torch.device) -> Processor:
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    return Processor(
        multiprocessors=found.multi_processor_count,
        registers=getattr(found, "regs_per_multiprocessor", H200.registers),  # older versions of torch do not tell
        shared=found.shared_memory_per_multiprocessor,
        threads=found.max_threads_per_multi_processor,
        warp=found.warp_size,
    )


def _splits(shapes: Shapes, query: Tensor, segments: Sequence[SegmentView], slots: int) -> tuple[int, ...]:
    loads = [Load(segments[shape.order].max_length, shape.work, shape.coded) for shape in shapes.segments]
    return tuple(split_counts(loads, slots, query.shape[0] * shapes.heads * shapes.tiles))


def _layout(prepared: Prepared, shapes: Shapes, query: Tensor, segments: Sequence[SegmentView]) -> Layout:
    key = tuple([-(-segments[shape.order].max_length // LENGTH_STEP) for shape in shapes.segments])
    layout = prepared.layouts.get(key)
    if layout is None:
        assert prepared.slots is not None
        layout = _lay_out(shapes, _splits(shapes, query, segments, prepared.slots))
        _keep(prepared.layouts, key, layout)
    return layout


def _lay_out(shapes: Shapes, splits: tuple[int, ...]) -> Layout:
    """Give each segment's states a place: one allocation for all that only the kernels see, log-sum-exps last."""
    states_of_split = shapes.batch * shapes.q_heads * shapes.positions
    places, first_split, first = [], 0, 0
    for shape, count, projections in zip(shapes.segments, splits, shapes.projections, strict=True):
        first_projection = first + -(-states_of_split * count * shape.form.state_width // UNIT)
        places.append(
            (
                encode_integer(first_split),
                encode_integer(count),
                encode_integer(first),
                encode_integer(first_projection),
            )
        )
        first_split += count
        first = first_projection + -(-projections // UNIT)
    common = (encode_integer(shapes.positions), encode_integer(sum(splits)), encode_integer(first))
    parts, projects = [], []
    for start in range(0, len(splits), SEGMENTS_PER_LAUNCH):
        part = slice(start, start + SEGMENTS_PER_LAUNCH)
        programs = sum(splits[part])
        integers = (*common, encode_integer(programs), encode_integer(sum(splits[:start])), *shapes.query_strides)
        constants = {"FORMS": shapes.forms[part], **shapes.constants}
        grid = (programs * shapes.tiles, shapes.heads, shapes.batch)
        parts.append(Part(part, grid, integers, constants, tuple(constants.values())))
        if shapes.project_constants is not None:
            integers = (common[0], *shapes.query_strides)
            constants = {"FORMS": shapes.forms[part], **shapes.project_constants}
            grid = (len(shapes.forms[part]) * shapes.tiles, shapes.heads, shapes.batch)
            projects.append(Part(part, grid, integers, constants, tuple(constants.values())))
    constants = {"FORMS": shapes.merge_forms, **shapes.merge_constants}
    grid = (shapes.q_heads * shapes.positions, shapes.batch, shapes.merge_blocks)
    return Layout(
        places=tuple(places),
        numbers=first * UNIT + states_of_split * sum(splits),
        largest=max(*common, *(number for part in parts for number in part.integers)),
        parts=tuple(parts),
        projects=tuple(projects),
        merge=None if shapes.one_launch else Part(slice(None), grid, common, constants, tuple(constants.values())),
    )


def _outputs(shapes: Shapes, layout: Layout, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, q_heads, positions, _ = query.shape
    return (
        _empty((layout.numbers,), torch.float32, query.device),
        _empty((batch, positions, q_heads, shapes.value_width), query.dtype, query.device),
        _empty((batch, q_heads, positions), torch.float32, query.device),
    )


def _launches(
    shapes: Shapes,
    layout: Layout,
    scale: float,
    given: tuple[Tensor | None, ...],
    attended: Sequence[tuple[Tensor | None, ...]],
    merged: Sequence[tuple[Tensor | None, ...]],
    sizes: Sequence[tuple[int, ...]],
) -> list[Launch]:
    """List the launches, given query, states, output, log-sum-exp, counters or None, and the segments' tensors."""
    query, states, out, lse, counters = given
    arguments = [
        SegmentArguments._make((*tensors, place, size, shape.basis_strides))
        for tensors, place, size, shape in zip(attended, layout.places, sizes, shapes.segments, strict=True)
    ]
    to_merge = tuple(
        [
            MergeArguments._make((*tensors, place, shape.merge_strides))
            for tensors, place, shape in zip(merged, layout.places, shapes.segments, strict=True)
        ]
    )
    merge = layout.merge
    merging = None if merge else MergingArguments(counters, out, lse, to_merge)
    launches = []
    for part in layout.projects:
        projected_by = (query, states, tuple(arguments[part.segments]), scale, part.integers)
        launches.append(Launch(project_queries, part.grid, projected_by, part.constants, shapes.project_options))
    for part in layout.parts:
        leading = (query, states, tuple(arguments[part.segments]), scale, part.integers, merging)
        launches.append(Launch(attend_splits, part.grid, leading, part.constants, shapes.options))
    if merge:
        merged_by = (states, out, lse, to_merge, merge.integers)
        launches.append(Launch(merge_splits, merge.grid, merged_by, merge.constants, shapes.merge_options))
    return launches


def _attended_tensors(segment: SegmentView, shape: SegmentShape) -> tuple[Tensor | None, ...]:
    """List what `SegmentArguments` holds of a segment's tensors, in its order."""
    mask, basis = segment.mask, segment.basis
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    starts, lengths, rows = segment.starts, segment.lengths, segment.basis_rows
    if not shape.packed_tables:
        starts, lengths, rows = starts.contiguous(), lengths.contiguous(), None if rows is None else rows.contiguous()
    stored = (segment.keys, segment.values, *shape.heads, segment.slots, starts, lengths, mask)
    if basis is None or basis.B is None:
        return (*stored, None, None, None, None)
    return (*stored, basis.B, basis.delta, basis.scale, rows)


def _merged_tensors(segment: SegmentView, shape: SegmentShape) -> tuple[Tensor | None, ...]:
    """List what `MergeArguments` holds of a segment's tensors, in its order."""
    basis = segment.value_basis
    if basis is None or basis.B is None:
        return (None, None, None, None, None)
    rows = segment.basis_rows
    if rows is not None and not shape.packed_tables:
        rows = rows.contiguous()
    return (basis.B, basis.delta, basis.scale, rows, shape.heads[1])


def _sizes(segment: SegmentView, shape: SegmentShape) -> tuple[int, ...]:
    """List `SegmentArguments.sizes` of a segment."""
    mask = segment.mask
    strides = NO_STRIDES if mask is None else (encode_integer(mask.stride(0)), encode_integer(mask.stride(1)))
    return (encode_integer(segment.max_length), *strides, *shape.strides)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)
