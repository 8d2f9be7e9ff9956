"""Seals on a GPU: plans and launches of the kernels in `seal_triton.py`, for the Keys and Values of a layer at once."""

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from rotatek_cache.core.attention import UnsupportedError
from rotatek_cache.core.basis import coded_delta_dtype
from rotatek_cache.core.quantization import CLIP_GRID, CodeLayout
from rotatek_cache.core.row_layout import integers
from rotatek_cache.core.seal import Fit, Places, Sealed, SealJob, Shared
from rotatek_kernels.checks import DTYPES, INDEX_DTYPES
from rotatek_kernels.decode import INTERPRETED, MAX_GRID, REMEMBERED, Launch
from rotatek_kernels.forms import encode_integer
from rotatek_kernels.occupancy import H200
from rotatek_kernels.seal_forms import MOST_SPLITS, Block, PlaceArguments, SealArguments, SealForm
from rotatek_kernels.seal_triton import encode, find_ranges, solve, sum_moments

MOST_WIDTH = 256  # of states whose scatter a program holds by tiles
MOST_CHANNELS = 128  # of a basis that a program holds in registers
MOST_ITERATIONS = 5  # the paper's
PANEL = 16
PROGRAMS = H200.multiprocessors  # that moments and ranges are divided among
TOKENS_PER_SPLIT = 256
LARGEST_ALIGN = 16
MAX_TOKENS = 1 << 25
USE = "the codecs in torch store it"


def seal_states(jobs: Sequence[SealJob], places: Places) -> list[Sealed]:
    """Store states as `rotatek_cache.core.seal.seal_states` says.

    At most five launches: moments, solve, ranges, errors of codes, encode; two of them where bases are given. Nothing
    is read on the host.

    Raises:
        TypeError, ValueError: an argument is malformed; nothing was launched then.
        UnsupportedError: there is an `unsupported_reason`.
    """
    reason = unsupported_reason(jobs, places)
    if reason is not None:
        raise UnsupportedError(reason)
    with torch.cuda.device_of(jobs[0].states):
        launches, sealed = plan(jobs, places)
        _run(launches)
    return sealed


_COMPILED: dict[Hashable, list[Any]] = {}


def _run(launches: Sequence[Launch]) -> None:
    """Launch the kernels: as Triton does it where they may have to be compiled, else directly."""
    if INTERPRETED:
        for launch in launches:
            launch.run()
        return
    states, place = launches[0].leading  # of all launches: the others take some of them
    key = (
        states[0].states.device,
        _specialisation(place),
        *(_specialisation(one) for one in states),
        *(value for launch in launches for value in launch.constants.values()),
    )
    compiled = _COMPILED.get(key)
    if compiled is None:
        if len(_COMPILED) >= REMEMBERED:
            _COMPILED.clear()
        _COMPILED[key] = [launch.run() for launch in launches]
        return
    addresses = {id(one): _addresses(one) for one in states}
    place = _addresses(place)
    for launch, kernel in zip(launches, compiled, strict=True):
        chosen = tuple([addresses[id(one)] for one in launch.leading[0]])
        kernel[launch.grid](chosen, place, *launch.constants.values())


def _specialisation(arguments: tuple[Any, ...]) -> Hashable:
    """Tell apart what Triton compiles anew for: which tensors there are, their dtypes and alignments, long integers."""
    return tuple(
        [
            one
            if one is None
            else (one.dtype, one.data_ptr() & 15 == 0)
            if isinstance(one, Tensor)
            else tuple([number >> 31 for number in one])
            for one in arguments
        ]
    )


def _addresses(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Put addresses in the place of tensors: Triton's launcher asks nothing of them then."""
    return tuple([one.data_ptr() if isinstance(one, Tensor) else one for one in arguments])


def unsupported_reason(jobs: Sequence[SealJob], places: Places) -> str | None:
    """Say what of well-formed arguments is sealed by no kernel, naming it; None if all is.

    Raises:
        TypeError, ValueError: an argument is malformed.
    """
    if not jobs:
        raise ValueError("jobs must hold the Keys, the Values or both, got none")
    _check_places(jobs, places)
    states = jobs[0].states
    if states.device.type != "cuda" and not INTERPRETED:
        return (
            f"{jobs[0].name} must be on a GPU, got {states.device}; set TRITON_INTERPRET=1 before Triton is imported "
            f"to try the kernels on a CPU, where {USE}"
        )
    pairs = states.shape[1] * len(places.ranges)
    if pairs > MAX_GRID:
        return f"{jobs[0].name} must have at most {MAX_GRID} heads in all rows, got {pairs}: {USE}"
    if places.tokens > MAX_TOKENS or any(length < 1 for _, length in places.ranges):
        return f"places must have rows of 1 to {MAX_TOKENS} tokens, got {places.ranges}: {USE}"
    return next((reason for job in jobs if (reason := _job_reason(job)) is not None), None)


def _check_places(jobs: Sequence[SealJob], places: Places) -> None:
    first = jobs[0]
    end = 0
    for start, length in places.ranges:
        if start != end:
            raise ValueError(f"places.ranges must follow one another from 0 on, got {places.ranges}")
        end += length
    if not places.ranges:
        raise ValueError("places.ranges must hold a row at least, got none")
    for job in jobs:
        if job.states.dim() != 4 or job.states.shape[:3] != first.states.shape[:3]:
            raise ValueError(
                f"{job.name} must be [B, H, P, D], the first three those of {first.name} "
                f"{tuple(first.states.shape[:3])}, got shape {tuple(job.states.shape)}"
            )
        if job.states.device != first.states.device:
            raise ValueError(f"{job.name} must be on {first.states.device}, got {job.states.device}")
        _check_basis(job, places)
    if (places.token_rows is None) != (places.token_columns is None):
        raise ValueError("places must have token_rows and token_columns, or neither")
    if places.token_rows is None:
        if first.states.shape[0] != 1 or first.states.shape[2] != end:
            raise ValueError(
                f"places without tables need states of one row with the {end} tokens, got {tuple(first.states.shape)}"
            )
        return
    for name in ("token_rows", "token_columns"):
        table: Tensor = getattr(places, name)
        if table.dtype not in INDEX_DTYPES or table.shape != (end,) or table.device != first.states.device:
            raise ValueError(
                f"places.{name} must be int32 or int64 [{end}] on {first.states.device}, got {table.dtype} "
                f"{tuple(table.shape)} on {table.device}"
            )


def _check_basis(job: SealJob, places: Places) -> None:
    _, heads, _, width = job.states.shape
    basis = job.basis
    if job.code is not None and job.code.channels != job.channels:
        raise ValueError(f"{job.name} must have a code of {job.channels} channels, got {job.code}")
    if isinstance(basis, Shared):
        shape = (heads, width, job.channels)
        if basis.encoder.shape != shape:
            raise ValueError(f"the encoder of {job.name} must be {shape}, got {tuple(basis.encoder.shape)}")
        for name, expected in (("low", shape[::2]), ("step", shape[::2]), ("shift", shape[:2])):
            tensor: Tensor | None = getattr(basis, name)
            if (tensor is None) != (job.code is None):
                raise ValueError(f"{job.name} must have {name} exactly where codes are stored, got {job.code}")
            if tensor is not None and (tensor.shape != expected or tensor.dtype != torch.float32):
                raise ValueError(
                    f"{name} of {job.name} must be float32 {expected}, got {tensor.dtype} {tuple(tensor.shape)}"
                )
        return
    if not 1 <= basis.rank <= min(width, job.channels):
        raise ValueError(
            f"rank of {job.name} must be from 1 to the width {width} and the {job.channels} channels, got {basis.rank}"
        )
    if basis.queries is not None:
        rows, q_heads, window, query_width = basis.queries.shape
        right = rows == len(places.ranges) and q_heads % heads == 0 and query_width == width
        if not right or basis.queries.device != job.states.device:
            raise ValueError(
                f"queries of {job.name} must be [{len(places.ranges)}, a multiple of {heads}, W, {width}] on "
                f"{job.states.device}, got {tuple(basis.queries.shape)} on {basis.queries.device}"
            )
        valid = basis.valid
        if valid is not None and (valid.dtype, valid.shape) != (torch.bool, (rows, window)):
            raise ValueError(
                f"valid of {job.name} must be bool {(rows, window)}, got {valid.dtype} {tuple(valid.shape)}"
            )


def _job_reason(job: SealJob) -> str | None:
    width = job.states.shape[-1]
    if job.states.dtype not in DTYPES:
        return f"{job.name} must be float16, bfloat16 or float32, got {job.states.dtype}: {USE}"
    if torch.is_grad_enabled() and job.states.requires_grad:
        return f"{job.name} must not require a gradient: the kernel has no backward; {USE}"
    if job.states.stride(-1) != 1 and width > 1:
        return f"{job.name} must be contiguous in its last dimension, got strides {job.states.stride()}: {USE}"
    if width > MOST_WIDTH:
        return f"{job.name} must have at most {MOST_WIDTH} channels, got {width}: {USE}"
    if job.channels > MOST_CHANNELS and isinstance(job.basis, Fit):
        return f"{job.name} must keep at most {MOST_CHANNELS} coefficients in a fitted basis, got {job.channels}: {USE}"
    if isinstance(job.basis, Fit):
        queries = job.basis.queries
        if queries is not None and (queries.dtype not in DTYPES or queries.stride(-1) != 1):
            return (
                f"queries must be float16, bfloat16 or float32 with channels side by side, got {queries.dtype} and "
                f"strides {queries.stride()}: {USE}"
            )
        if job.code is not None and len(job.code.blocks) != 1:
            return f"{job.name} must have one width of codes in a fitted basis, got {job.code.blocks}: {USE}"
    elif job.basis.encoder.dtype != job.states.dtype:
        return f"the encoder must have the dtype of {job.name} {job.states.dtype}, got {job.basis.encoder.dtype}: {USE}"
    return None


def plan(jobs: Sequence[SealJob], places: Places) -> tuple[list[Launch], list[Sealed]]:
    """Allocate what the seal of these jobs writes, and plan its launches."""
    device = jobs[0].states.device
    heads, rows = jobs[0].states.shape[1], len(places.ranges)
    pairs = heads * rows
    longest = max(length for _, length in places.ranges)
    splits = _splits(pairs * len(jobs), longest)
    forms = [_form(job) for job in jobs]
    made = [_arguments(job, form, places, splits) for job, form in zip(jobs, forms, strict=True)]
    states = tuple(arguments for arguments, _ in made)
    place = _place_arguments(places, splits, longest, device)
    moments = max(form.tiles**2 if form.rank else 1 for form in forms)
    launches = [_launch(sum_moments, (splits * moments, pairs, len(jobs)), states, place, forms, 8)]
    fitted = [index for index, form in enumerate(forms) if form.rank]
    if fitted:
        warps = max(forms[index].padded_width // 32 for index in fitted)  # a column is one number a thread
        launches.append(_launch(solve, (pairs, len(fitted), 1), states, place, forms, max(1, warps), fitted))
    ranged = [index for index in fitted if forms[index].blocks[0].bits]
    for errors in (False, True) if ranged else ():
        chunks = max(-(-forms[index].channels // forms[index].block_c) for index in ranged)
        grid = (splits * chunks, pairs, len(ranged))
        warps = 8 if errors and forms[0].precision == "tf32x3" else 4
        launches.append(_launch(find_ranges, grid, states, place, forms, warps, ranged, ERRORS=errors))
    blocks = max(-(-longest // form.block_n) for form in forms)
    launches.append(_launch(encode, (blocks, pairs, len(jobs)), states, place, forms, 4))
    return launches, [sealed for _, sealed in made]


def _launch(
    kernel: object,
    grid: tuple[int, int, int],
    states: tuple[SealArguments, ...],
    place: PlaceArguments,
    forms: Sequence[SealForm],
    warps: int,
    chosen: Sequence[int] | None = None,
    **constants: bool,
) -> Launch:
    """Plan a launch over the states that are `chosen`."""
    index = range(len(forms)) if chosen is None else chosen
    leading = (tuple(states[i] for i in index), place)
    # Sums that the compiler fused would round another way than the specification's.
    options = {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": False}
    return Launch(kernel, grid, leading, {**constants, "FORMS": tuple(forms[i] for i in index)}, options)


def _splits(pairs: int, longest: int) -> int:
    """Choose the number of programs that share a row's tokens."""
    return max(1, min(MOST_SPLITS.value, PROGRAMS // pairs, -(-longest // TOKENS_PER_SPLIT)))


@functools.cache
def _precision(device: torch.device) -> str:
    """Name how float32 is multiplied: on NVIDIA's tensor cores in three parts, which keep its precision."""
    return "tf32x3" if device.type == "cuda" and torch.version.hip is None else "ieee"


def _form(job: SealJob) -> SealForm:
    width = job.states.shape[-1]
    padded_width = max(16, triton.next_power_of_2(width))
    block_d = min(padded_width, 128)
    strides = job.states.stride()[:3]
    basis = job.basis
    fit = basis if isinstance(basis, Fit) else Fit(rank=0)
    weighted = fit.queries is not None and fit.exponent != 0
    group = fit.queries.shape[1] // job.states.shape[1] if weighted and fit.queries is not None else 0
    half = job.states.dtype.itemsize == 2
    padded_channels = max(16, triton.next_power_of_2(job.channels))
    return SealForm(
        width=width,
        padded_width=padded_width,
        block_d=block_d,
        tiles=-(-padded_width // block_d),
        block_n=64 if half else 32,
        block_k=min(padded_width, 64 if half else 32),
        block_w=16,
        align=math.gcd(LARGEST_ALIGN, *strides),
        rank=fit.rank,
        channels=job.channels,
        padded_channels=padded_channels,
        block_c=min(32, padded_channels),
        block_l=16,
        panel=PANEL,
        weighted=weighted,
        exponent=float(fit.exponent),
        group=group,
        iterations=MOST_ITERATIONS,
        token_width=job.channels if job.code is None else job.code.token_bytes,
        blocks=_blocks(job.code, job.channels),
        clips=CLIP_GRID,
        precision=_precision(job.states.device),
    )


def _blocks(code: CodeLayout | None, channels: int) -> tuple[Block, ...]:
    if code is None:
        return (Block(0, 1, 0, channels, max(16, triton.next_power_of_2(channels)), 0),)
    blocks, offset, channel = [], 0, 0
    for bits, count in code.blocks:
        width = count * bits // 8
        blocks.append(Block(bits, 8 // bits, offset, width, max(16, triton.next_power_of_2(width)), channel))
        offset, channel = offset + width, channel + count
    return tuple(blocks)


def _arguments(job: SealJob, form: SealForm, places: Places, splits: int) -> tuple[SealArguments, Sealed]:
    """Allocate what is written of the Keys or the Values, and list it for the kernels."""
    states, basis, code = job.states, job.basis, job.code
    heads, rows = states.shape[1], len(places.ranges)
    pairs, width, channels = heads * rows, form.width, job.channels

    def wide(*shape: int) -> Tensor:
        return _empty(shape, torch.float32, states.device)

    def own(*shape: int) -> Tensor:
        return _empty(shape, states.dtype, states.device)

    data = _empty(
        (heads, places.tokens, form.token_width), states.dtype if code is None else torch.uint8, states.device
    )
    finite = _empty((pairs,), torch.uint8, states.device)
    arguments: dict[str, Any] = dict.fromkeys(SealArguments._fields)
    arguments |= {
        "states": states,
        "strides": tuple(encode_integer(stride // form.align) for stride in states.stride()[:3]),
        "query_sizes": (),
        "sums": wide(pairs, splits, width),
        "stored": data,
        "finite": finite,
    }
    delta = decoder = None
    if code is not None or isinstance(basis, Shared):
        delta = _empty(
            (heads, rows, width), states.dtype if code is None else coded_delta_dtype(states.dtype), states.device
        )
    if isinstance(basis, Fit):
        encoder, mean = own(heads, rows, width, channels), own(heads, rows, width)
        arguments |= {
            "scatters": wide(pairs, splits, width, width),
            "shifts": wide(pairs, width),
            "scratch": wide(pairs, width * (width + 2 * form.padded_channels + 3)),
            "mean": mean,
        }
        decoder = encoder
        if code is not None:
            decoder = own(heads, rows, width, channels)
            arguments |= {
                "least": wide(pairs, splits, channels),
                "most": wide(pairs, splits, channels),
                "errors": wide(pairs, splits, len(form.clips), channels),
                "decoder": decoder,
            }
        if form.weighted and basis.queries is not None:
            arguments["queries"] = basis.queries
            sizes = (*basis.queries.stride()[:3], basis.queries.shape[2])
            arguments["query_sizes"] = tuple(map(encode_integer, sizes))
            if basis.valid is not None:
                arguments["valid"] = basis.valid.contiguous().view(torch.uint8)
    else:
        encoder, mean = basis.encoder.contiguous(), None
        for name in ("low", "step", "shift"):
            tensor: Tensor | None = getattr(basis, name)
            arguments[name] = None if tensor is None else tensor.contiguous()
    arguments |= {"encoder": encoder, "delta": delta}
    shown = mean if delta is None else delta
    assert shown is not None
    return SealArguments(**arguments), Sealed(data, decoder, shown, finite.view(torch.bool))


def _place_arguments(places: Places, splits: int, longest: int, device: torch.device) -> PlaceArguments:
    starts = lengths = None
    if any(length != longest for _, length in places.ranges):
        starts, lengths = _row_table(places.ranges, device)
    sizes = (len(places.ranges), longest, splits, places.tokens)
    return PlaceArguments(places.token_rows, places.token_columns, starts, lengths, tuple(map(encode_integer, sizes)))


@functools.lru_cache(maxsize=8)
def _row_table(ranges: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Put first tokens and lengths of rows on the device, once for all layers of a prompt."""
    starts, lengths = zip(*ranges, strict=True)
    return integers(starts, device), integers(lengths, device)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)
