"""Where coded tokens lie after any sequence of prompts, steps, crops and selections: sinks, the last ones, codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotatek_cache.cache import token_counts
from rotatek_cache.cache.token_counts import TokenCounts
from rotatek_cache.cache.visual_positions import VisualPositions

SINKS, RECENT, ROWS, MOST = token_counts.SINK_TOKENS, 5, 3, 200
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _short_window():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_counts, "RECENT_TOKENS", RECENT)
        patch.setattr(token_counts, "DENSE_COLUMNS", SINKS + RECENT)
        yield


class Cache:
    """Buffers whose states are the numbers of the tokens, a different hundred thousand for each row."""

    def __init__(self) -> None:
        self.counts = TokenCounts((0,) * ROWS, CPU)
        self.dense = torch.full((ROWS, SINKS + RECENT), -1)
        self.codes = torch.full((ROWS, MOST), -1)
        self.offset = torch.arange(ROWS) * 100_000

    def numbers(self, own: torch.Tensor) -> torch.Tensor:
        before = torch.tensor(self.counts.rows)[:, None]
        return self.offset[:, None] + before + own.cumsum(1) - 1

    def arrive(self, visible: torch.Tensor) -> None:
        new = self.numbers(visible)
        arrival = self.counts.arrival(visible.shape[1], None if bool(visible.all()) else visible)
        self.codes[arrival.coded.rows, arrival.coded.target] = new[arrival.coded.rows, arrival.coded.source]
        self.dense[arrival.dense.rows, arrival.dense.target] = new[arrival.dense.rows, arrival.dense.source]
        self.counts = arrival.counts

    def step(self) -> None:
        new = self.numbers(torch.ones(ROWS, 1))[:, 0].long()
        step = self.counts.step
        assert self.counts.after_a_replay.rows == step.counts.rows
        self.codes[self.counts.batch, step.code_column] = new
        self.dense[self.counts.batch, step.column] = new
        self.counts = step.counts

    def crop(self, rows: tuple[int, ...]) -> None:
        back = self.counts.cut(rows)
        self.dense[back.back.rows, back.back.target] = self.codes[back.back.rows, back.back.source]
        self.counts = back.counts

    def select(self, index: torch.Tensor) -> None:
        self.counts = self.counts.selected(index)
        self.dense, self.codes, self.offset = self.dense[index], self.codes[index], self.offset[index]

    def check(self) -> None:
        counts = self.counts
        assert counts.on_device.tolist() == list(counts.rows)
        for row, count in enumerate(counts.rows):
            length = int(counts.dense_lengths[row])
            held = sorted((self.dense[row, :length] - self.offset[row]).tolist())
            assert held == sorted({*range(min(count, SINKS)), *range(max(0, count - RECENT), count)})
            coded = int(counts.code_lengths[row])
            assert coded == counts.coded[row] and coded + length == count
            read = (self.codes[row, :coded] - self.offset[row]).tolist()
            assert read == list(range(SINKS, count - RECENT))
        if counts.most:
            tokens = counts.dense_tokens() + self.offset[:, None]
            for row, length in enumerate(counts.dense_lengths.tolist()):
                assert torch.equal(tokens[row, :length], self.dense[row, :length])


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.lists(st.integers(1, 9), min_size=ROWS, max_size=ROWS), st.integers(0, 2**16)),
        st.tuples(st.just("step"), st.integers(1, 7), st.none()),
        st.tuples(st.just("crop"), st.integers(0, 8), st.none()),
        st.tuples(st.just("select"), st.permutations(range(ROWS)), st.none()),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(MOVES)
def test_sinks_and_the_last_tokens_are_dense_and_all_between_are_codes(moves):
    cache = Cache()
    for kind, much, seed in moves:
        if kind == "arrive":
            generator = torch.Generator().manual_seed(seed)
            visible = torch.rand(ROWS, max(much) + 1, generator=generator) < 0.7
            cache.arrive(visible)
        elif kind == "step":
            for _ in range(much):
                cache.step()
        elif kind == "crop":
            cache.crop(tuple(max(0, count - much) for count in cache.counts.rows))
        else:
            cache.select(torch.tensor(much))
        cache.check()


def test_places_are_logical_positions_without_padding():
    positions = VisualPositions()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    seen = positions.see(0, 5, 2, mask[:, None, None] & causal)
    assert torch.equal(seen, mask)
    # A second turn of two tokens, of which the second row has one.
    turn = torch.tensor([[1, 1], [0, 1]], dtype=torch.bool)
    again = positions.see(5, 7, 2, torch.cat([mask, turn], 1)[:, None, None].expand(-1, 1, 2, -1))
    assert torch.equal(again, turn)
    tokens = torch.arange(7).expand(2, -1)
    assert positions.places_of(tokens)[0].tolist() == [2, 3, 4, 5, 6, 7, 8]  # those to come follow one another
    assert positions.places_of(tokens)[1].tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert positions.own_before(4, 2) == (2, 4) and positions.own_before(6, 2) == (4, 5)
    assert positions.own_before(9, 2) == (7, 8)
    whole = torch.cat([mask, turn, torch.ones(2, 1, dtype=torch.bool)], 1)
    assert positions.shows_own(whole) and positions.shows_own(torch.ones_like(whole))
    assert not positions.shows_own(whole & (torch.arange(8) != 4))
    assert positions.see(7, 9, 2, None) is None
