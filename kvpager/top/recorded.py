"""Views of a recording."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from itertools import islice

from kvpager.recording.format import LIVE_STATES, Header, Step
from kvpager.recording.replay import ReplayedState
from kvpager.top.view import Cell, Kind, Row, TierRow, View

_RATE_S = 2.0  # rates are those of this time
_ROWS_MAX = 12
_FREE = Cell(Kind.FREE)


class Player:
    """Replays steps and shows the moment after the last one."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.state = ReplayedState(header)
        self.seconds = 0.0
        self._recent: deque[tuple[float, int]] = deque()  # seconds and tokens of steps
        self._num_steps = 0

    def apply(self, step: Step) -> None:
        """Apply a step. O(changes + decoding sequences). Raises: as `ReplayedState.apply`."""
        self.state.apply(step)
        self.seconds, self._num_steps = step.t, step.step + 1
        tokens = len(self.state.decoding) + sum(part[2] for part in step.prefill)
        self._recent.append((step.t, tokens))
        while self._recent[0][0] < step.t - _RATE_S:
            self._recent.popleft()

    def view(self, cells_max: int) -> View:
        """Return the current moment, with at most `cells_max` cells.

        O(n log n) for n table entries and cached blocks.
        """
        header, state = self.header, self.state
        counts, totals = state.counts, state.totals
        holders = state.holders()
        kinds = Counter(request.state for request in state.requests.values())
        cell_blocks = max(1, -(-state.num_blocks // max(cells_max, 1)))
        return View(
            title=f"{header.model or header.source}, {header.mode}, {self._num_steps} steps",
            seconds=self.seconds,
            blocks={
                "held": counts.held,
                "cached": counts.cached,
                "kept": counts.kept,
                "free": counts.free,
                "host": counts.host,
            },
            block_size=header.block_size,
            tokens=counts.tokens,
            requests={name: kinds[name] for name in LIVE_STATES},
            rates=self._rates(),
            totals={
                "prompt tokens": totals.prefix_query_tokens,
                "found cached": totals.prefix_hit_tokens,
                "evicted": totals.evicted,
                "copied": totals.copied,
                "swapped out": totals.swapped_out,
                "swapped in": totals.swapped_in,
            },
            cells=tuple(self._cells(holders, cell_blocks)),
            cell_blocks=cell_blocks,
            rows=tuple(self._rows(holders)),
            tiers=tuple(
                TierRow(name, *counts)
                for name, counts in zip(header.tiers, state.tiers, strict=False)
            ),
        )

    def _rates(self) -> dict[str, float]:
        if len(self._recent) < 2 or self._recent[-1][0] == self._recent[0][0]:
            return {}
        seconds = self._recent[-1][0] - self._recent[0][0]
        tokens = sum(count for _, count in self._recent) - self._recent[0][1]
        rates = {"steps": (len(self._recent) - 1) / seconds}
        return rates if not tokens else {"tokens": tokens / seconds, **rates}  # none in `simulate`

    def _cells(self, holders: dict[int, list[int]], cell_blocks: int) -> list[Cell]:
        num_blocks, cells = self.state.num_blocks, []
        found: dict[int, Counter[Cell]] = defaultdict(Counter)
        for block in sorted(self.state.cached.keys() | holders.keys()):
            found[block // cell_blocks][self._cell(block, holders)] += 1
        for first in range(0, num_blocks, cell_blocks):
            counts = found[first // cell_blocks]
            counts[_FREE] += min(cell_blocks, num_blocks - first) - counts.total()
            cells.append(counts.most_common(1)[0][0])
        return cells

    def _cell(self, block: int, holders: dict[int, list[int]]) -> Cell:
        mine = holders.get(block)
        if mine is None:
            return Cell(Kind.CACHED)
        if len(mine) > 1:
            return Cell(Kind.SHARED)
        return Cell(Kind.HELD, self.state.sequences[mine[0]].request)

    def _rows(self, holders: dict[int, list[int]]) -> list[Row]:
        blocks, shared, tokens = Counter[int](), Counter[int](), Counter[int]()
        for sequence in self.state.sequences.values():
            if sequence.request is not None:
                tokens[sequence.request] += max(sequence.lengths)
        for mine in holders.values():
            owners = {self.state.sequences[number].request for number in mine}
            for owner in owners - {None}:
                assert owner is not None
                blocks[owner] += 1
                shared[owner] += len(mine) > 1
        return [
            Row(
                number,
                request.state,
                tokens[number],
                request.samples * (request.prompt_tokens + request.max_new_tokens),
                blocks[number],
                shared[number],
            )
            for number, request in islice(self.state.requests.items(), _ROWS_MAX)
        ]
