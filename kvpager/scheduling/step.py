"""A step being put together: parts of rows, then one `StepPlan`."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.manager import BlockManager
from kvpager.blocks.sequences import Batch
from kvpager.plans import NO_COPIES, Plan, Reason, Step, StepPlan
from kvpager.scheduling.request import Live, Samples

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


class Part(NamedTuple):
    """Some rows of a step."""

    numbers: Int32
    counts: Int32
    ids: Int32
    slots: Int64
    wants: NDArray[np.bool_]


class Draft:
    """What was decided so far. `budget`: how many more tokens the step may have."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.moves: list[Plan] = []
        self.copies: list[Int32] = []
        self.parts: list[Part] = []
        self.decoding: Batch | None = None  # the rows of the first part, where they decode
        self.moved: list[Live] = []  # requests that were swapped, either way
        self.is_prompt_copied = False
        self.is_blocked = False  # somebody did not get what it needs: nobody new may begin

    def decode(self, numbers: Int32, ids: Int32, step: Step) -> None:
        """These rows take one token each. O(rows)."""
        ones = np.ones(len(numbers), np.int32)
        self.parts.append(Part(numbers, ones, ids, step.slots, ones.astype(np.bool_)))
        self.copy(step.copies)
        self.budget -= len(numbers)

    def compute(self, number: int, ids: Int32, slots: Int64, *, wants: bool) -> None:
        """One row takes a chunk of its prompt. O(tokens)."""
        part = Part(
            np.array([number], np.int32),
            np.array([len(ids)], np.int32),
            ids,
            slots,
            np.array([wants], np.bool_),
        )
        self.parts.append(part)
        self.budget = max(self.budget - len(ids), 0)

    def copy(self, copies: Int32) -> None:
        """Blocks to copy, after those told before. O(1)."""
        if len(copies):
            self.copies.append(copies)

    def finish(
        self,
        manager: BlockManager,
        samples: Samples,
        names: list[Hashable] | None,
        ended: list[tuple[Hashable, Reason]],
    ) -> StepPlan:
        """The step as plain arrays; `names` where the first part's rows are all. O(rows)."""
        part = self._joined()
        numbers = part.numbers
        if names is None or len(names) != len(numbers):
            names = [samples.owner(number).name for number in numbers.tolist()]
        starts = samples.computed[numbers]
        if self.decoding is not None and len(self.decoding) == len(numbers):
            tables = manager.block_tables(self.decoding)
        else:
            tables = manager.block_tables([samples.handle(n) for n in numbers.tolist()])
        return StepPlan(
            moves=self.moves,
            copies=_only(self.copies, NO_COPIES),
            names=names,
            samples=numbers,
            starts=starts,
            counts=part.counts,
            ids=part.ids,
            slots=part.slots,
            kv_lens=starts + part.counts,
            tables=tables,
            wants_logits=part.wants,
            freed=samples.report(),
            ended=ended,
        )

    def _joined(self) -> Part:
        if len(self.parts) == 1:
            return self.parts[0]
        if not self.parts:
            none = np.empty(0, np.int32)
            return Part(none, none, none, np.empty(0, np.int64), np.empty(0, np.bool_))
        return Part(*(np.concatenate(column) for column in zip(*self.parts, strict=True)))


def _only(arrays: list[Int32], otherwise: Int32) -> Int32:
    if not arrays:
        return otherwise
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
