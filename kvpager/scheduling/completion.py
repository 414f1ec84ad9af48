"""Completion of a step: which rows continue, and with which tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from kvpager import _validate as arguments
from kvpager.plans import Int32, Int64, StepPlan
from kvpager.scheduling.placement import Placement
from kvpager.scheduling.step import StepBuilder


class Completion:
    """Commits the tokens of a computed step, then continues, forks or ends its sequences."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._manager, self._table = placement.manager, placement.table
        self._sequences = placement.table.sequences
        # Blocks behind a window are freed when tokens are committed.
        self._commits = placement.prefix_cache or any(placement.manager.windows)

    def refuse_bad_parents(self, plan: StepPlan, parents: Int64) -> None:
        """Raise `ValueError` unless each parent may continue as often as it is listed. O(rows)."""
        if not len(parents):
            return
        if parents[0] < 0 or parents[-1] >= len(plan) or np.any(parents[1:] < parents[:-1]):
            raise ValueError(
                f"parents={parents}: expected ascending rows of the plan, 0 to {len(plan) - 1}."
            )
        wrong = parents[~plan.needs_logits[parents]]
        if len(wrong):
            raise ValueError(
                f"parents: row {wrong[0]} does not need logits, because its prompt is not "
                "complete. Continue only rows with needs_logits."
            )
        counts = np.bincount(parents, minlength=len(plan))
        for row in (counts > 1).nonzero()[0].tolist():
            state = self._sequences.owner(int(plan.seq_ids[row]))
            total = int(counts[np.isin(plan.seq_ids, state.seq_ids)].sum())
            if total > state.request.n:
                raise ValueError(
                    f"parents: request {state.request_id!r} would have {total} sequences, but n is "
                    f"{state.request.n}. Continue fewer."
                )

    def commit(self, plan: StepPlan, builder: StepBuilder) -> None:
        """Record that the KV of the step's tokens is written. O(rows)."""
        sequences = self._sequences
        sequences.mark_computed(plan.seq_ids, plan.seq_lens)
        decode_batch = builder.decode_batch
        num_decoding = 0 if decode_batch is None else len(decode_batch.seq_ids)
        if self._commits and decode_batch is not None:
            self._manager.commit(decode_batch.batch)
        for seq_id in plan.seq_ids[num_decoding:].tolist():
            if self._commits:
                self._manager.commit(sequences.handle(seq_id), int(sequences.computed[seq_id]))
            state = sequences.owner(seq_id)
            if not state.is_ready:
                self._table.let_decode(state)

    def advance(self, plan: StepPlan, rows: Int64, parents: Int64, tokens: Int32) -> Int32:
        """Continue each of `rows` as often as `parents` lists it; end it if absent. O(rows).

        Returns the sequence id of each continuation, -1 if it ended at once.
        """
        sequences, is_plain = self._sequences, np.array_equal(rows, parents)
        seq_ids = plan.seq_ids[rows] if is_plain else self._branch(plan, rows, parents)
        going = seq_ids >= 0
        sequences.extend(seq_ids[going], tokens[going])
        full = going & (sequences.generated[seq_ids] >= sequences.limits[seq_ids])
        if full.any():
            for seq_id in seq_ids[full].tolist():
                self._placement.end_sequence(seq_id)
            seq_ids[full] = -1
        return seq_ids

    def _branch(self, plan: StepPlan, rows: Int64, parents: Int64) -> Int32:
        """End the rows that `parents` omits, and fork those that it lists several times."""
        sequences = self._sequences
        counts = np.bincount(parents, minlength=len(plan))
        for seq_id in plan.seq_ids[rows[counts[rows] == 0]].tolist():
            self._placement.end_sequence(seq_id)
        first = np.ones(len(parents), np.bool_)
        first[1:] = parents[1:] != parents[:-1]
        kept = np.isin(parents, rows)
        seq_ids = np.where(first & kept, plan.seq_ids[parents], -1).astype(np.int32)
        for row in rows[counts[rows] > 1].tolist():
            parent = int(plan.seq_ids[row])
            if sequences.generated[parent] + 1 >= sequences.limits[parent]:
                continue  # the forks would reach max_new_tokens at once
            begin = int(np.searchsorted(parents, row)) + 1
            children = self._placement.fork(parent, int(counts[row]) - 1)
            seq_ids[begin : begin + len(children)] = children
        return seq_ids


def read_continuations(parents: ArrayLike, tokens: ArrayLike) -> tuple[Int64, Int32]:
    """Return both as arrays of equal length. O(rows). Raises: `TypeError`, `ValueError`."""
    rows = arguments.integers("parents", parents)
    if rows.ndim != 1:
        raise TypeError(
            f"parents: expected a list of ints, got {rows.dtype} of shape {rows.shape}."
        )
    ids = arguments.token_ids(tokens)
    if len(ids) != len(rows):
        raise ValueError(
            f"tokens: got {len(ids)} for {len(rows)} parents. Pass one token per parent."
        )
    return rows.astype(np.int64), ids
