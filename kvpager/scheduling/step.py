"""A step under construction: parts of rows, joined into one `StepPlan`."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpager.blocks.protocol import CacheManager
from kvpager.blocks.sequences import Batch
from kvpager.errors import OutOfBlocks, OutOfQuota
from kvpager.plans import (
    NO_COPIES,
    AppendPlan,
    CopyPlan,
    GroupStep,
    Int32,
    Int64,
    StepPlan,
    Transfer,
)
from kvpager.scheduling.request import RequestState
from kvpager.scheduling.request_table import RequestTable


class Part(NamedTuple):
    """Some rows of a step; the fields are those of `StepPlan`."""

    seq_ids: Int32
    num_scheduled: Int32
    token_ids: Int32
    slot_mapping: Int64  # [tokens], or [groups, tokens]
    needs_logits: NDArray[np.bool_]


class DecodeBatch(NamedTuple):
    """The sequences that decode, and what a step of them needs."""

    seq_ids: Int32
    batch: Batch
    request_ids: list[Hashable]
    charges: list[tuple[RequestState, int]]  # per queue: a request and the number of rows


class StepBuilder:
    """The rows, swaps and copies decided so far for one step.

    Args:
        max_tokens: maximum tokens of the step.
        min_chunk: minimum tokens of a prompt's chunk, unless fewer remain or `max_tokens` is lower.
            None never splits prompts; a prompt longer than `max_tokens` gets a step of its own.
    """

    def __init__(self, max_tokens: int, min_chunk: int | None) -> None:
        self.budget = max_tokens  # tokens that the step still has room for
        self.swaps: list[CopyPlan] = []
        self.copies: list[Int32] = []
        self.parts: list[Part] = []
        self.decode_batch: DecodeBatch | None = None  # the first part, if it decodes
        self.swapped: list[RequestState] = []  # requests swapped out or in by this step
        self.is_prompt_copied = False
        self.is_blocked = False  # a request found no room, so no other may start
        self.over_quota: set[str | None] = set()  # namespaces whose requests may not start
        self._max_tokens = max_tokens
        self._min_chunk = min_chunk

    def note_refusal(self, error: OutOfBlocks) -> None:
        """Note the namespace if its quota is the reason of a refusal. O(1)."""
        if isinstance(error, OutOfQuota):
            self.over_quota.add(error.namespace)

    def chunk(self, remaining: int) -> int:
        """Return how many of a prompt's `remaining` tokens fit in the step. O(1)."""
        if self._min_chunk is not None:
            least = min(self._min_chunk, remaining, self._max_tokens)
            return min(remaining, self.budget) if self.budget >= least else 0
        is_alone = self.budget == self._max_tokens
        return remaining if remaining <= self.budget or is_alone else 0

    def decode(self, seq_ids: Int32, token_ids: Int32, step: AppendPlan) -> None:
        """Add rows of one token each. O(rows)."""
        ones = np.ones(len(seq_ids), np.int32)
        self.parts.append(Part(seq_ids, ones, token_ids, step.slots, ones.astype(np.bool_)))
        self.copy(step.copies)
        self.budget -= len(seq_ids)

    def compute(
        self, seq_id: int, token_ids: Int32, slot_mapping: Int64, needs_logits: bool
    ) -> None:
        """Add a row that computes a chunk of its tokens. O(tokens)."""
        row = np.array([seq_id], np.int32), np.array([len(token_ids)], np.int32)
        self.parts.append(Part(*row, token_ids, slot_mapping, np.array([needs_logits], np.bool_)))
        self.budget = max(self.budget - len(token_ids), 0)

    def copy(self, copies: Int32) -> None:
        """Append blocks to copy. O(1)."""
        if len(copies):
            self.copies.append(copies)

    def finish(
        self, manager: CacheManager, table: RequestTable, transfers: tuple[Transfer, ...]
    ) -> StepPlan:
        """Return the plan, which also reports what ended since the last plan. O(rows)."""
        part, sequences, decode_batch = self._joined(), table.sequences, self.decode_batch
        seq_ids = part.seq_ids
        if decode_batch is not None and len(decode_batch.seq_ids) == len(seq_ids):
            request_ids = decode_batch.request_ids[:]
            tables = manager.block_tables(decode_batch.batch)
        else:
            listed = seq_ids.tolist()
            request_ids = [sequences.owner(seq_id).request_id for seq_id in listed]
            tables = manager.block_tables([sequences.handle(seq_id) for seq_id in listed])
        num_computed = sequences.computed[seq_ids]
        first, others = _by_group(part.slot_mapping, tables)
        return StepPlan(
            swaps=self.swaps,
            copies=np.concatenate(self.copies) if self.copies else NO_COPIES,
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
            transfers=transfers,
        )

    def _joined(self) -> Part:
        if len(self.parts) == 1:
            return self.parts[0]
        if not self.parts:
            none = np.empty(0, np.int32)
            return Part(none, none, none, np.empty(0, np.int64), np.empty(0, np.bool_))
        return Part(*(np.concatenate(column, axis=-1) for column in zip(*self.parts, strict=True)))


def _by_group(slot_mapping: Int64, block_tables: Int32) -> tuple[GroupStep, tuple[GroupStep, ...]]:
    """Return the arrays of the first group of layers, and of the other groups. O(groups)."""
    if block_tables.ndim == 2:
        return GroupStep(slot_mapping, block_tables), ()
    # A step without rows has no slots; reshape gives each group an empty array.
    first, *others = map(GroupStep, slot_mapping.reshape(len(block_tables), -1), block_tables)
    return first, tuple(others)
