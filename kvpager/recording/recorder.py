"""Records a manager, and optionally a scheduler and tiers, step by step.

with Recorder.open("run.jsonl", manager, Described("manager")) as recorder:
    ...                         # allocate, append, free
    recorder.step()             # writes a line with what changed
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from os import PathLike
from typing import Any, NamedTuple, Protocol

import numpy as np

import kvpager
from kvpager.blocks.changes import ManagerChanges
from kvpager.blocks.manager import BlockManager
from kvpager.blocks.sequences import SequenceHandle
from kvpager.plans import Reason, StepPlan
from kvpager.recording.format import Header, encoded
from kvpager.recording.writer import RecordingWriter
from kvpager.scheduling.progress import RequestChanges

_TIERS_EVERY_S = 0.1
TierTotals = Iterable[tuple[int | None, int, int]]  # as `TierCounts`


class Described(NamedTuple):
    """The parts of a header that the manager cannot give; see `Header`."""

    source: str
    mode: str = "paged"
    block_bytes: int | None = None
    max_tokens: int | None = None
    policy: str | None = None
    eviction: str | None = None
    model: str | None = None
    tiers: tuple[str, ...] = ()


class Requests(Protocol):
    """Requests that hold the sequences of a manager; `Progress` has those of a scheduler."""

    def look(
        self, ended: Iterable[tuple[Hashable, Reason]], changes: ManagerChanges
    ) -> RequestChanges:
        """Return what changed since the last look; `ended` as in `StepPlan`."""

    def owners(self) -> dict[SequenceHandle, int]:
        """Return the request of each sequence."""

    def handle(self, seq_id: int) -> SequenceHandle | None:
        """Return the handle of a sequence of a plan."""


class Recorder:
    """Appends a line for each step. An error in it never reaches the caller.

    Not thread-safe: call it where steps are made.

    Args:
        writer: receives the lines; `close` closes it.
        manager: each step records how it differs from the step before.
        requests: the requests that hold its sequences; None without requests.
        tiers: returns the counts of each store; None without tiers.
    """

    def __init__(
        self,
        writer: RecordingWriter,
        manager: BlockManager,
        requests: Requests | None = None,
        tiers: Callable[[], TierTotals] | None = None,
    ) -> None:
        self._writer, self._requests, self._tiers = writer, requests, tiers
        self._changes = manager.queries.changes()
        self._began = time.monotonic()
        self._num_groups = len(manager.windows)
        self._num_steps = 0
        self._decoding: list[int] = []
        self._last: dict[str, Any] = {"num_blocks": manager.num_blocks}
        self._tiers_due = 0.0

    @classmethod
    def open(
        cls,
        path: str | PathLike[str],
        manager: BlockManager,
        described: Described,
        requests: Requests | None = None,
        tiers: Callable[[], TierTotals] | None = None,
    ) -> Recorder:
        """Open a file, and return a recorder of `manager`. O(blocks).

        Raises: `OSError`, `ValueError` as `RecordingWriter`; `TypeError` for another manager.
        """
        if not isinstance(manager, BlockManager):
            raise TypeError(f"record: {type(manager).__name__} cannot be recorded. Leave it out.")
        stats = manager.stats()
        accounted = stats.num_held + stats.num_cached + stats.num_kept + stats.num_free
        header = Header(
            kvpager=kvpager.__version__,
            started=round(time.time(), 3),
            block_size=stats.block_size,
            num_blocks=stats.num_blocks,
            num_reserved=stats.num_blocks - accounted,
            num_host_blocks=stats.num_host_blocks,
            windows=manager.windows,
            **described._asdict(),
        )
        return cls(RecordingWriter(path, header), manager, requests, tiers)

    def step(self, plan: StepPlan | None = None, *, is_needed: bool = True) -> None:
        """Append a line for the step of `plan`, or for the current state. O(changes), mostly.

        `Changes.look` gives the exact cost. With `is_needed=False`, appends a line only after a
        change. Never raises: an error ends the recording.
        """
        if not self._writer.is_open:
            return
        try:
            fields = self._fields(plan)
            if is_needed or len(fields) > 2:  # more than a number and a time
                self._writer.write(encoded(fields))
                self._num_steps += 1
        except Exception as error:
            self._writer.give_up(repr(error))

    def follow(self, manager: BlockManager) -> None:
        """Record `manager` from the next step on, in place of the present one. O(1).

        Both must have the same block size and number of layer groups.
        """
        manager.queries.changes(self._changes)

    def close(self) -> None:
        """Append the last changes and the end, and close the file. See `RecordingWriter.close`."""
        self._tiers_due = 0.0
        self.step(is_needed=False)
        self._writer.write(encoded({"closed": self._num_steps}))
        self._writer.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------- a step

    def _fields(self, plan: StepPlan | None) -> dict[str, Any]:
        changes = self._changes.look()
        now = time.monotonic()
        fields: dict[str, Any] = {"step": self._num_steps, "t": round(now - self._began, 6)}
        self._add_blocks(changes, fields)
        self._add_requests(changes, plan, fields)
        if self._tiers is not None and now >= self._tiers_due:
            self._tiers_due = now + _TIERS_EVERY_S
            self._add_if_new("tiers", [list(tier) for tier in self._tiers()], fields)
        return fields

    def _add_blocks(self, changes: ManagerChanges, fields: dict[str, Any]) -> None:
        self._add_if_new("num_blocks", changes.num_blocks, fields)
        lists = {
            "uncached": changes.unpublished,
            "cached": changes.published,
            "end": changes.ended,
            "len": [self._length(*each) for each in changes.lengths],
            "blocks": changes.tables,
        }
        fields.update({name: value for name, value in lists.items() if value})
        if changes.ended:
            ended = set(changes.ended)
            self._decoding = [number for number in self._decoding if number not in ended]
        if changes.grown != self._decoding:
            fields["decode"] = self._decoding = changes.grown
        self._add_if_new("counts", changes.counts, fields)
        self._add_if_new("totals", changes.totals, fields)

    def _length(self, number: int, group: int, tokens: int) -> tuple[int, ...]:
        return (number, tokens) if self._num_groups == 1 else (number, tokens, group)

    def _add_requests(
        self, changes: ManagerChanges, plan: StepPlan | None, fields: dict[str, Any]
    ) -> None:
        requests, owners = self._requests, {}
        if requests is not None:
            arrived, states = requests.look(() if plan is None else plan.ended, changes)
            if arrived:
                fields["new"] = arrived
            if states:
                fields["state"] = states
            if changes.begun:
                owners = requests.owners()
        if changes.begun:
            fields["begin"] = [
                (number, owners.get(sequence), cached) for number, sequence, cached in changes.begun
            ]
        if requests is not None and plan is not None and len(plan):
            parts = self._prefill(plan, requests, {each.number for each in changes.begun})
            if parts:
                fields["prefill"] = parts

    def _prefill(
        self, plan: StepPlan, requests: Requests, begun: set[int]
    ) -> list[tuple[int, int, int]]:
        """Return the parts of prompts in a plan: (sequence, first token, tokens)."""
        is_part = (plan.num_scheduled > 1) | ~plan.needs_logits
        rows = np.flatnonzero(is_part).tolist() if not begun else range(len(plan))
        parts = []
        for row in rows:
            handle = requests.handle(int(plan.seq_ids[row]))
            number = None if handle is None else self._changes.number(handle)
            if number is not None and (is_part[row] or number in begun):
                parts.append((number, int(plan.num_computed[row]), int(plan.num_scheduled[row])))
        return parts

    def _add_if_new(self, name: str, value: Any, fields: dict[str, Any]) -> None:
        if self._last.get(name) != value:
            self._last[name] = fields[name] = value
