"""How many programs an attention is cut into, against what was timed on a GPU."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from rotatek_kernels.occupancy import H200, Load, programs_held, split_counts

SWEEP = json.loads((Path(__file__).parents[2] / "evals" / "results" / "gpu_decode_sweep_h200.json").read_text())
TEXT = Load(64, 2 * 128 * 2, coded=False)
# Of a visual token, and programs that a multiprocessor holds (see `test_compile.py`).
KINDS = {"r = 32": (Load(0, (32 + 128) * 2, coded=False), 3), "4 bit": (Load(0, (32 + 32) * 2, coded=True), 10)}
HEADS = 8


def time_at(measured: dict[int, float], splits: int) -> float:
    """The time with so many splits, in a straight line between the two counts measured around it."""
    if splits in measured:
        return measured[splits]
    low, high = next((a, b) for a, b in pairwise(sorted(measured)) if a < splits < b)
    return measured[low] + (measured[high] - measured[low]) * (splits - low) / (high - low)


@pytest.mark.parametrize(
    "row", SWEEP["splits"], ids=[f"{row['batch']}x{row['tokens']}, {row['kind']}" for row in SWEEP["splits"]]
)
def test_the_splits_chosen_are_within_3_percent_of_the_fastest_measured(row):
    load, held = KINDS[row["kind"]]
    splits, text = split_counts(
        [load._replace(tokens=row["tokens"]), TEXT], held * H200.multiprocessors, row["batch"] * HEADS
    )
    measured = {int(count): us for count, us in row["us by splits"].items()}
    print(f"{splits} splits, {time_at(measured, splits):.1f} us; fastest {min(measured.values()):.1f}")  # noqa: T201
    assert text == 1
    assert time_at(measured, splits) <= 1.03 * min(measured.values())


@pytest.mark.parametrize("batch", [1, 3, 8, 13, 64, 200])
@pytest.mark.parametrize("tokens", [4096, 16384, 100_000])
def test_no_count_is_just_above_whole_waves(batch, tokens):
    slots, pairs = 3 * H200.multiprocessors, batch * HEADS
    (splits,) = split_counts([KINDS["r = 32"][0]._replace(tokens=tokens)], slots, pairs)
    waves = pairs * splits / slots
    assert waves <= 1 or waves % 1 == 0 or waves % 1 > 0.5 or splits == 1


def test_every_segment_has_a_split_and_none_more_than_its_tokens_are_worth():
    loads = [Load(40000, 320, coded=False), Load(3, 512, coded=False), Load(300, 320, coded=False)]
    counts = split_counts(loads, 396, 8)
    assert all(count >= 1 for count in counts)
    assert counts[1] == 1
    assert counts[2] <= 2
    assert split_counts([], 396, 8) == []
    assert split_counts([Load(10**6, 320, coded=False)], 396, 10**5) == [1]


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "held"),
    [(162, 71680, 4, 3), (189, 20480, 1, 10), (32, 0, 1, 32), (255, 0, 8, 1), (16, 0, 8, 8), (40, 300_000, 4, 1)],
)
def test_programs_are_bounded_by_what_a_multiprocessor_has(registers, shared, warps, held):
    assert programs_held(H200, registers, shared, warps) == held
