"""Count the programs that a GPU holds at once, and choose into how many an attention is cut."""

from collections.abc import Sequence
from typing import NamedTuple

TOKENS_PER_SPLIT = 256  # below this a split costs more than it brings: it projects the queries and merges a state
MOST_WAVES = 8  # tried; with more, what the last one leaves empty no longer matters


class Processor(NamedTuple):
    """A GPU, as far as programs share it.

    Attributes:
        multiprocessors: of the whole GPU.
        registers, shared, threads: of each; shared memory in bytes.
        programs: most of them at once, whatever they take.
        warp: threads.
    """

    multiprocessors: int
    registers: int
    shared: int
    threads: int
    programs: int = 32
    warp: int = 32


H200 = Processor(multiprocessors=132, registers=65536, shared=228 << 10, threads=2048)
# The interpreter runs programs one by one; a few splits take the same way as on a GPU.
INTERPRETER = Processor(multiprocessors=2, registers=65536, shared=228 << 10, threads=2048)
RESERVED_SHARED = 1024  # bytes that CUDA takes of each program's share
REGISTER_UNIT = 8  # registers of a thread are given out in multiples


def programs_held(processor: Processor, registers: int, shared: int, warps: int) -> int:
    """Count the programs that a multiprocessor holds at once.

    Args:
        processor: the GPU.
        registers: of a thread.
        shared: bytes of shared memory of a program.
        warps: of a program.
    """
    threads = warps * processor.warp
    of_program = max(1, -(-registers // REGISTER_UNIT) * REGISTER_UNIT * threads)
    return max(
        1,
        min(
            processor.registers // of_program,
            processor.shared // (shared + RESERVED_SHARED),
            processor.threads // threads,
            processor.programs,
        ),
    )


class Pace(NamedTuple):
    """The rule by which the time of programs goes with what they read and with what else runs; fitted to one H200.

    The unit is a byte at the rate at which each of all programs that fit reads numbers (10.6 GB/s there).

    Attributes:
        latency: share of a program's time that stays where nothing else runs. The rest is waiting for memory, which
            goes with the number of programs.
        spread: by how much programs that begin together end apart, as a share of their time; others that wait for
            memory make up for it.
        start: what a program takes before its first Key, in bytes.
        merge: what one more state to merge takes, in bytes.
    """

    latency: float
    spread: float
    start: int
    merge: int


NUMBERS = Pace(latency=0.25, spread=0.0, start=16 << 10, merge=1 << 10)
CODES = Pace(latency=1.0, spread=0.2, start=0, merge=1 << 9)  # bound by instructions, which nothing else slows
CODE_WORK = 2  # bytes of numbers that take as long as unpacking and multiplying one code does


class Load(NamedTuple):
    """The tokens of a segment that one (row, KV head, tile of queries) reads.

    Attributes:
        tokens: most of a row.
        work: of a token: bytes of numbers, and `CODE_WORK` for each code.
        coded: whether codes are the greater part of it.
    """

    tokens: int
    work: int
    coded: bool

    @property
    def most_splits(self) -> int:
        """Splits that are worth their start."""
        return max(1, -(-self.tokens // TOKENS_PER_SPLIT))


def split_counts(loads: Sequence[Load], slots: int, pairs: int) -> list[int]:
    """Choose the number of programs that share each segment's tokens, per (row, KV head, tile of queries).

    Programs run in waves of as many as the GPU holds, and a wave that is begun takes as long as a full one where the
    programs are bound by instructions, nearly so where they share memory. So the count that ends soonest fills whole
    waves. It follows from numbers that the host knows.

    Args:
        loads: of each segment.
        slots: programs that the whole GPU holds at once.
        pairs: of rows, KV heads and tiles.
    """
    if not loads:
        return []
    work = [load.tokens * load.work for load in loads]
    pace = CODES if loads[work.index(max(work))].coded else NUMBERS
    most = min(sum(load.most_splits for load in loads), max(len(loads), MOST_WAVES * slots // pairs))
    tried = [_dealt(loads, work, count) for count in range(len(loads), most + 1)]
    return min(tried, key=lambda counts: _time(work, counts, pace, slots, pairs))


def _dealt(loads: Sequence[Load], work: Sequence[int], count: int) -> list[int]:
    """Deal `count` splits out by work, one at least to each segment."""
    total = max(1, sum(work))
    return [max(1, min(round(count * one / total), load.most_splits)) for load, one in zip(loads, work, strict=True)]


def _time(work: Sequence[int], counts: Sequence[int], pace: Pace, slots: int, pairs: int) -> float:
    """Estimate how long all programs take, up to what does not depend on their number."""
    longest = max(one / count for one, count in zip(work, counts, strict=True)) + pace.start
    # Shorter programs, such as those of a text segment, fill what the longest leave free.
    waves = pairs * (sum(work) + pace.start * sum(counts)) / (longest * slots)
    full, part = divmod(waves, 1.0)
    last = pace.latency + (1 - pace.latency) * part if part > 0 else 0.0
    return longest * (full + last + pace.spread) + pace.merge * max(counts)
