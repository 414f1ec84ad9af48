"""The state of a recorded manager after each step.

recording = Recording("run.jsonl")
state = ReplayedState(recording.header)
for step in recording:
    state.apply(step)
    state.sequences[0].tables       # of each group of layers
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from kvpager.recording.format import LIVE_STATES, Counts, Header, Step, TierCounts, Totals

ROOT = -1  # the parent of a block at the front of a prompt
TABLES_MAX = 2**22  # of live sequences: each takes memory, though it is short in a line
_NO_COUNTS = Counts(0, 0, 0, 0, 0, 0)
_NO_TOTALS = Totals(0, 0, 0, 0, 0, 0)


@dataclass(slots=True)
class ReplayedSequence:
    """A live sequence.

    Attributes:
        request: its request, None for blocks that a tier brings.
        cached_tokens: leading tokens whose KV existed when it began.
        lengths: tokens with a slot, for each group.
        tables: block ids for each group: -1 for none, -2 - h for host block h.
    """

    request: int | None
    cached_tokens: int
    lengths: list[int]
    tables: list[list[int]]


@dataclass(slots=True)
class ReplayedRequest:
    """A live request. `state` is one of `LIVE_STATES`."""

    prompt_tokens: int
    max_new_tokens: int
    samples: int
    state: str = "queued"


@dataclass(slots=True)
class ReplayedState:
    """A manager and its requests, as recorded.

    Attributes:
        num_blocks: blocks on the device.
        sequences: the live ones, by number.
        requests: the live ones, by number.
        cached: the published blocks, each with its parent in the prefix tree or `ROOT`.
        decoding: the sequences that grow by one token in each step.
        counts, totals, tiers: as last recorded.
    """

    header: Header
    num_blocks: int = 0
    sequences: dict[int, ReplayedSequence] = field(default_factory=dict)
    requests: dict[int, ReplayedRequest] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    decoding: list[int] = field(default_factory=list)
    counts: Counts = _NO_COUNTS
    totals: Totals = _NO_TOTALS
    tiers: tuple[TierCounts, ...] = ()
    _growing: list[list[int]] = field(default_factory=list)  # lengths of decoding sequences
    _num_begun: int = 0
    _num_arrived: int = 0

    def __post_init__(self) -> None:
        self.num_blocks = self.header.num_blocks

    def apply(self, step: Step) -> None:
        """Apply a step. O(changes + decoding sequences).

        Raises: `ValueError`, which names the line, for a step that does not follow.
        """
        try:
            self._apply_blocks(step)
            self._apply_sequences(step)
            self._apply_requests(step)
        except _Wrong as error:
            raise ValueError(f"line {step.line}: {error}") from None
        self.counts = step.counts or self.counts
        self.totals = step.totals or self.totals
        self.tiers = self.tiers if step.tiers is None else step.tiers

    def holders(self) -> dict[int, list[int]]:
        """Return the sequences that hold each device block, by block. O(table entries)."""
        holders: dict[int, list[int]] = defaultdict(list)
        for number, sequence in self.sequences.items():
            for table in sequence.tables:
                for block in table:
                    if block >= 0:
                        holders[block].append(number)
        return dict(holders)

    def filled(self) -> dict[int, int]:
        """Return the slots in use of each held device block, by block. O(table entries)."""
        size, filled = self.header.block_size, dict[int, int]()
        for sequence in self.sequences.values():
            for length, table in zip(sequence.lengths, sequence.tables, strict=True):
                for column, block in enumerate(table):
                    if block >= 0:
                        mine = min(length - column * size, size)
                        filled[block] = max(filled.get(block, 0), mine)
        return filled

    # ---------------------------------------------------------------- a step

    def _apply_blocks(self, step: Step) -> None:
        if step.num_blocks is not None:
            self.num_blocks = step.num_blocks
        for block in step.uncached:
            if self.cached.pop(block, None) is None:
                raise _Wrong(f"uncached: block {block} is not cached")
        for parent, *blocks in step.cached:
            for block in blocks:
                self._refuse_block(block)
                if parent != ROOT and (parent not in self.cached or parent == block):
                    raise _Wrong(f"cached: block {parent}, the parent of {block}, is not cached")
                self.cached[block] = parent
                parent = block

    def _apply_sequences(self, step: Step) -> None:
        for number in step.end:
            self._sequence(number)
            del self.sequences[number]
        num_groups = len(self.header.windows)
        for number, request, cached in step.begin:
            if number != self._num_begun:
                raise _Wrong(f"begin: sequence {number}, expected {self._num_begun}")
            self._num_begun += 1
            if (len(self.sequences) + 1) * num_groups > TABLES_MAX:
                raise _Wrong(f"begin: more than {TABLES_MAX:,} tables of live sequences")
            tables: list[list[int]] = [[] for _ in range(num_groups)]
            self.sequences[number] = ReplayedSequence(request, cached, [0] * num_groups, tables)
        if step.decode is not None:
            if len(set(step.decode)) < len(step.decode):
                raise _Wrong("decode: a sequence is listed twice")
            self.decoding = list(step.decode)
            self._growing = [self._sequence(number).lengths for number in self.decoding]
        elif step.end:
            self.decoding = [number for number in self.decoding if number in self.sequences]
            self._growing = [self.sequences[number].lengths for number in self.decoding]
        for group in range(num_groups):
            for lengths in self._growing:
                lengths[group] += 1
        for number, tokens, *one in step.len:
            lengths = self._sequence(number).lengths
            for group in one or range(num_groups):
                lengths[self._group(group)] = tokens
        for number, group, kept, blocks in step.blocks:
            table = self._sequence(number).tables[self._group(group)]
            if kept > len(table):
                raise _Wrong(f"blocks: sequence {number} keeps {kept} of {len(table)} blocks")
            for block in blocks:
                self._refuse_block(block)
            table[kept:] = blocks

    def _apply_requests(self, step: Step) -> None:
        for number, prompt_tokens, max_new_tokens, samples in step.new:
            if number < self._num_arrived:
                raise _Wrong(f"new: request {number}, expected at least {self._num_arrived}")
            self._num_arrived = number + 1
            self.requests[number] = ReplayedRequest(prompt_tokens, max_new_tokens, samples)
        for number, state in step.state:
            if number not in self.requests:
                raise _Wrong(f"state: request {number} is not live")
            if state in LIVE_STATES:
                self.requests[number].state = state
            else:
                del self.requests[number]

    def _sequence(self, number: int) -> ReplayedSequence:
        sequence = self.sequences.get(number)
        if sequence is None:
            raise _Wrong(f"sequence {number} is not live")
        return sequence

    def _group(self, group: int) -> int:
        if group >= len(self.header.windows):
            raise _Wrong(f"group {group}: the header has {len(self.header.windows)}")
        return group

    def _refuse_block(self, block: int) -> None:
        if block >= self.num_blocks:
            raise _Wrong(f"block {block}: the pool has {self.num_blocks}")
        if -2 - block >= self.header.num_host_blocks:
            raise _Wrong(f"block {block}: there are {self.header.num_host_blocks} host blocks")


class _Wrong(Exception):
    """A step does not follow from the state before."""
