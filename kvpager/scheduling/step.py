"""A step that is put together: parts of rows, then one `StepPlan`."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.protocol import CacheManager
from kvpager.blocks.sequences import Batch
from kvpager.errors import OutOfBlocks, OutOfQuota
from kvpager.plans import NO_COPIES, GroupStep, Int32, Int64, Plan, Step, StepPlan
from kvpager.scheduling.request import RequestState
from kvpager.scheduling.request_table import RequestTable


class Part(NamedTuple):
    """Some rows of a step."""

    seq_ids: Int32
    num_scheduled: Int32
    token_ids: Int32
    slot_mapping: Int64  # [tokens], or [groups, tokens]
    needs_logits: NDArray[np.bool_]


class Decoders(NamedTuple):
    """The rows that decode."""

    seq_ids: Int32
    batch: Batch
    request_ids: list[Hashable]
    shares: list[tuple[RequestState, int]]  # a request of each queue, and the rows of that queue


class Draft:
    """What was decided so far of a step.

    Args:
        max_tokens: tokens that the step may have.
        least: tokens of a chunk of a prompt, unless the prompt or the step has fewer. None:
            prompts are not divided, and one longer than `max_tokens` has a step for itself.
    """

    def __init__(self, max_tokens: int, least: int | None) -> None:
        self.budget = max_tokens  # tokens that may still be added
        self.swaps: list[Plan] = []
        self.copies: list[Int32] = []
        self.parts: list[Part] = []
        self.decoders: Decoders | None = None  # the rows of the first part, if they decode
        self.moved: list[RequestState] = []  # requests that were swapped, either way
        self.is_prompt_copied = False
        self.is_blocked = False  # a request did not get what it needs: no new one may begin
        self.over_quota: set[str | None] = set()  # namespaces: none of their requests may begin
        self._max_tokens = max_tokens
        self._least = least

    def note_refusal(self, error: OutOfBlocks) -> None:
        """Note whose quota has no room for a request, if that is why it got no blocks. O(1)."""
        if isinstance(error, OutOfQuota):
            self.over_quota.add(error.namespace)

    def chunk(self, remaining: int) -> int:
        """Return how many of a prompt's `remaining` tokens the step has room for. O(1)."""
        if self._least is not None:
            least = min(self._least, remaining, self._max_tokens)
            return min(remaining, self.budget) if self.budget >= least else 0
        is_alone = self.budget == self._max_tokens
        return remaining if remaining <= self.budget or is_alone else 0

    def decode(self, seq_ids: Int32, token_ids: Int32, step: Step) -> None:
        """Add rows that take one token each. O(rows)."""
        ones = np.ones(len(seq_ids), np.int32)
        self.parts.append(Part(seq_ids, ones, token_ids, step.slots, ones.astype(np.bool_)))
        self.copy(step.copies)
        self.budget -= len(seq_ids)

    def compute(
        self, seq_id: int, token_ids: Int32, slot_mapping: Int64, *, needs_logits: bool
    ) -> None:
        """Add a row that takes a chunk of its prompt. O(tokens)."""
        part = Part(
            np.array([seq_id], np.int32),
            np.array([len(token_ids)], np.int32),
            token_ids,
            slot_mapping,
            np.array([needs_logits], np.bool_),
        )
        self.parts.append(part)
        self.budget = max(self.budget - len(token_ids), 0)

    def copy(self, copies: Int32) -> None:
        """Add blocks to copy, after those added before. O(1)."""
        if len(copies):
            self.copies.append(copies)

    def finish(self, manager: CacheManager, table: RequestTable) -> StepPlan:
        """Return the step as plain arrays, and tell of what ended since the last one. O(rows)."""
        part, sequences, decoders = self._joined(), table.sequences, self.decoders
        seq_ids = part.seq_ids
        if decoders is not None and len(decoders.seq_ids) == len(seq_ids):
            request_ids, tables = decoders.request_ids[:], manager.block_tables(decoders.batch)
        else:
            listed = seq_ids.tolist()
            request_ids = [sequences.owner(seq_id).request_id for seq_id in listed]
            tables = manager.block_tables([sequences.handle(seq_id) for seq_id in listed])
        num_computed = sequences.computed[seq_ids]
        first, others = _by_group(part.slot_mapping, tables)
        return StepPlan(
            swaps=self.swaps,
            copies=_only(self.copies, NO_COPIES),
            request_ids=request_ids,
            seq_ids=seq_ids,
            num_computed=num_computed,
            num_scheduled=part.num_scheduled,
            token_ids=part.token_ids,
            slot_mapping=first.slot_mapping,
            seq_lens=num_computed + part.num_scheduled,
            block_tables=first.block_tables,
            needs_logits=part.needs_logits,
            freed=sequences.report(),
            ended=table.take_ended(),
            more_groups=others,
        )

    def _joined(self) -> Part:
        if len(self.parts) == 1:
            return self.parts[0]
        if not self.parts:
            none = np.empty(0, np.int32)
            return Part(none, none, none, np.empty(0, np.int64), np.empty(0, np.bool_))
        return Part(*(np.concatenate(column, axis=-1) for column in zip(*self.parts, strict=True)))


def _by_group(slot_mapping: Int64, block_tables: Int32) -> tuple[GroupStep, tuple[GroupStep, ...]]:
    """Return those of the first group of layers, and those of the others. O(groups)."""
    if block_tables.ndim == 2:
        return GroupStep(slot_mapping, block_tables), ()
    # A step without rows has no slots, of any shape.
    first, *others = map(GroupStep, slot_mapping.reshape(len(block_tables), -1), block_tables)
    return first, tuple(others)


def _only(arrays: list[Int32], otherwise: Int32) -> Int32:
    if not arrays:
        return otherwise
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
