"""A recording, replayed once and reduced to the shown steps."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from kvpager.recording import textfile
from kvpager.recording.format import BLOCKS_MAX, Step
from kvpager.recording.reader import Recording
from kvpager.recording.replay import ReplayedState
from kvpager.report.cells import Cells, Grid
from kvpager.report.lives import Lives
from kvpager.report.moments import Camera, Moment, is_of_user, shown_steps
from kvpager.report.reserved import ReservedPool

FRAMES_MAX = 300  # steps that a page shows
FRAMES_MIN = 20
_BLOCKS_MAX = 10_000_000  # that all frames together add up: about a second
_RESIZED = re.compile(rb'"num_blocks"\s*:\s*(\d{1,9})')


class Run:
    """A recording, read once.

    Attributes:
        grid: the cells of a map, for the pool at its largest.
        moments: the state at the shown steps.
        lives: the lives of requests.
        users: the request of each sequence; -1 - sequence for one of no request.
        num_steps, most_running, most_tokens: counts over all steps.
        is_complete: False if the run stopped early, or still runs.
    """

    def __init__(self, path: Path) -> None:
        """Read the recording. O(recording + frames * blocks).

        Raises: `OSError`; `ValueError`, which names the line, for a bad or an empty recording.
        """
        num_steps, most_blocks = _scanned(path)
        recording = Recording(path)
        header = self.header = recording.header
        most_blocks = max(most_blocks, header.num_blocks)
        if most_blocks <= header.num_reserved:
            raise ValueError(f"{path}: line 1: num_blocks={most_blocks}: expected a block to use")
        self.grid = Grid(most_blocks - header.num_reserved, header.block_size)
        self.lives = Lives()
        self.moments: list[Moment] = []
        self.num_steps = self.most_running = self.most_tokens = 0
        self.users: dict[int, int] = {}
        self._changes: list[tuple[int, int, bool]] = []  # step, sequence, begins
        self._live: set[int] = set()
        self._num_live: Counter[int] = Counter()  # sequences of each request
        self._swapped: set[int] = set()  # requests
        self._longest = 1
        frames = min(FRAMES_MAX, max(FRAMES_MIN, _BLOCKS_MAX // most_blocks))
        self._replay(recording, set(shown_steps(num_steps, frames)))
        if not self.moments:
            raise ValueError(f"{path}: line 2: expected a step, the recording has none")
        self.is_complete = recording.is_complete

    def _replay(self, recording: Recording, shown: set[int]) -> None:
        state = ReplayedState(recording.header)
        camera, step = Camera(state, self.grid), None
        for step in recording:
            if step.end:
                self._note_ends(step, state)
            state.apply(step)
            if state.num_blocks - state.header.num_reserved > self.grid.num_blocks:
                # The scan reads no key twice, and none with escapes.
                raise ValueError(f"line {step.line}: num_blocks={state.num_blocks}: named oddly")
            self._observe(step, state)
            if step.step in shown:
                self.moments.append(camera.moment(step.step, step.t))
        for sequence in self._live:
            self._longest = max(self._longest, *state.sequences[sequence].lengths)
        # The scan saw a cut line, or missed an oddly written one.
        if step is not None and (not self.moments or self.moments[-1].step != step.step):
            self.moments.append(camera.moment(step.step, step.t))

    def _observe(self, step: Step, state: ReplayedState) -> None:
        self.num_steps += 1
        self.most_tokens = max(self.most_tokens, state.counts.tokens)
        if step.begin or step.end or step.new or step.state or step.prefill:
            self.lives.observe(step)
        for sequence, request, _ in step.begin:
            if is_of_user(state, request):
                self._live.add(sequence)
                user = self.users[sequence] = -1 - sequence if request is None else request
                self._num_live[user] += 1
                self._changes.append((step.step, sequence, True))
        for number, name in step.state:
            (self._swapped.add if name == "swapped" else self._swapped.discard)(number)
        if step.begin or step.state:
            num_swapped = sum(self._num_live[number] for number in self._swapped)
            self.most_running = max(self.most_running, len(self._live) - num_swapped)

    def _note_ends(self, step: Step, state: ReplayedState) -> None:
        for sequence in step.end:
            if sequence in self._live:
                self._live.remove(sequence)
                self._num_live[self.users[sequence]] -= 1
                self._changes.append((step.step, sequence, False))
                self._longest = max(self._longest, *state.sequences[sequence].lengths)

    @property
    def max_tokens(self) -> int:
        """Return the tokens of a region: the maximum of a sequence, or the longest one. O(1)."""
        return self.header.max_tokens or self._longest

    def reserve(self) -> tuple[ReservedPool, list[Reserved]]:
        """Run the naive allocator on the same sequences; return it at each moment.

        O(sequences * log regions + frames * blocks).
        """
        size, num_blocks = self.grid.block_size, self.grid.num_blocks
        pool = ReservedPool(num_blocks, -(-self.max_tokens // size), size)
        changes, moments = iter(self._changes), []
        change = next(changes, None)
        for moment in self.moments:
            while change is not None and change[0] <= moment.step:
                (pool.begin if change[2] else pool.end)(change[1])
                change = next(changes, None)
            moments.append(Reserved(pool, moment, self.grid))
        return pool, moments


class Reserved:
    """The naive allocator at a moment: sequences with and without a region."""

    def __init__(self, pool: ReservedPool, moment: Moment, grid: Grid) -> None:
        """Take the state of the pool. O(blocks)."""
        self.running, self.waiting = len(pool.regions), len(pool.waiting)
        self.tokens = sum(min(moment.lengths[each], pool.max_tokens) for each in pool.regions)
        self.cells: Cells = grid.cells(pool.blocks(moment.lengths, moment.requests))
        named = (moment.requests[each] for each in pool.waiting)
        self.waiting_requests = list(dict.fromkeys(each for each in named if each is not None))


def _scanned(path: Path) -> tuple[int, int]:
    """Return the number of steps, if the recording is good, and its largest pool. O(recording)."""
    num_steps = most_blocks = 0
    for text in textfile.lines(path):
        num_steps += b'"step"' in text
        if b'"num_blocks"' in text and (found := _RESIZED.search(text)):
            most_blocks = max(most_blocks, min(int(found[1]), BLOCKS_MAX))
    return num_steps, most_blocks
