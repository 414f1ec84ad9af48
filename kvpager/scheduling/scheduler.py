"""Iteration-level scheduling: which tokens of which requests are computed in the next step.

    scheduler = Scheduler(manager)
    scheduler.submit(Request(name="a", prompt=ids, max_new_tokens=100))
    while scheduler.has_work:
        plan = scheduler.plan()                     # moves, copies, rows, slots, tables
        ...                                         # the data plane obeys, the sampler chooses
        scheduler.complete(plan, parents, tokens)   # which rows go on, each with which token

After Orca (Yu et al., 2022) and vLLM (Kwon et al., 2023). A step takes one token of every row that
decodes, then chunks of prompts: of those that are being computed, of those that were preempted
and return, of those that wait. `complete` is the one way on: a row that is named once continues,
one named several times is forked, one that is not named has ended. Plain decoding, parallel
samples, beams and stopping are the same thing.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvpager import _validate as arguments
from kvpager.errors import OutOfBlocks
from kvpager.plans import Reason, StepPlan
from kvpager.scheduling.admission import Admission
from kvpager.scheduling.request import Live, State
from kvpager.scheduling.request_table import Decoders
from kvpager.scheduling.step import Draft

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


class Scheduler(Admission):
    """Continuous batching over the blocks of one manager, which nobody else takes blocks of.

    Not thread-safe: callers on several threads need a lock. A signal waits for the end of a call.
    If it interrupts the caller before `plan` returns, `step` has the plan.

    Args:
        manager: whose blocks; made without `fences`.
        max_batch_tokens: tokens of a step.
        max_running: rows on the device; a request counts with all it may have. Never more than
            `max_batch_tokens`, so that every row that decodes is in every step.
        max_waiting: `submit` refuses more than so many waiting requests. None: no bound.
        order: who goes first, `"fifo"`, `"priority"` or `"fair"`, or an `Order`.
        watermark: the share of the blocks that stays available when a request begins or returns,
            unless nothing runs: room for those that run to grow.
        prefix_cache: reuse what equal prompts have computed, and offer what is computed.
        costs: what decides whether a preempted request is swapped or computed again.
        max_length: tokens that a row may come to.
        chunked: divide prompts among steps. If not, a prompt that is longer than
            `max_batch_tokens` has its step for itself.
        clock: seconds, for deadlines and ageing.
    """

    # ---------------------------------------------------------------- a step

    def plan(self) -> StepPlan | None:
        """What to compute now; None where there is nothing at all. O(rows + tokens).

        A plan without rows has moves to make or ends to tell; it needs no `complete`.
        Raises: `ValueError` while the last plan is neither completed nor aborted.
        """
        with self._lock, self._change:
            if self._step is not None:
                raise ValueError("a step is under way; complete or abort its plan first")
            now = float(self.clock()) if self._deadlines else 0.0
            self._change.begin()
            self._samples.recycle()
            self._expire(now)
            return self._plan()

    def _plan(self) -> StepPlan | None:
        draft = Draft(self.max_batch_tokens)
        self._decode(draft)
        self._prefill(draft)
        if not draft.is_blocked:
            self._return(draft)
        if not draft.is_blocked:
            self._admit(draft)
        if not (draft.parts or draft.moves or self._ended or self._samples.has_ended):
            return None
        names = self._decoding.names[:] if draft.decoding is not None and self._decoding else None
        plan = draft.finish(self.manager, self._samples, names, self._ended)
        self._ended, self._untold = [], set()
        if draft.parts:
            self._step = plan, draft
            self._totals["steps"] += 1
            self._totals["tokens"] += len(plan.ids)
        return plan

    @property
    def step(self) -> StepPlan | None:
        """Return the current plan, for a caller whose call of `plan` was interrupted. O(1)."""
        return None if self._step is None else self._step[0]

    def _decode(self, draft: Draft) -> None:
        """A token of every row that has all its others; whoever is last makes room."""
        while True:
            numbers, batch, _, shares = self._decoders()
            if not len(numbers):
                return
            ids = self._samples.pending[numbers]
            try:
                step = self.manager.append(batch, ids if self.prefix_cache else 1)
            except OutOfBlocks:
                self._make_room(draft)
                continue
            self._samples.lengths[numbers] += 1
            draft.decode(numbers, ids, step)
            draft.decoding = batch
            for live, count in shares:
                self._order.charge(live, 0, count)
            return

    def _decoders(self) -> Decoders:
        if self._decoding is None:
            samples = self._samples
            numbers = [n for live in self._running if live.is_ready for n in live.samples]
            array = np.array(numbers, np.int32)
            array.flags.writeable = False
            batch = self.manager.batch([samples.handle(n) for n in numbers])
            names = [samples.owner(n).name for n in numbers]
            self._decoding = Decoders(array, batch, names, self._shares())
        return self._decoding

    def _make_room(self, draft: Draft) -> None:
        """Preempt who is last; never the first, so that the first always gets on."""
        draft.is_blocked = True
        *_, last = sorted(self._running, key=self._order.rank)
        if len(self._running) == 1:
            if self._reclaim():
                return
            # Somebody else has taken blocks of this manager: wait for them.
            self._preemption.drop(last)
        elif (plan := self._preemption.preempt(last)) is not None:
            draft.moves.append(plan)
            draft.moved.append(last)
        self._leave(last)
        self._preempted.append(last)

    def _shares(self) -> list[tuple[Live, int]]:
        shares: dict[str | None, tuple[Live, int]] = {}
        for live in self._running:
            if live.is_ready:
                name = self._order.queue_of(live)
                shares[name] = live, shares.get(name, (live, 0))[1] + len(live.samples)
        return list(shares.values())

    # ---------------------------------------------------------------- what came of it

    def complete(self, plan: StepPlan, parents: ArrayLike, tokens: ArrayLike) -> Int32:
        """The step was computed; this is how it goes on. O(rows), more for forks and ends.

        Args:
            plan: the last one.
            parents: int [continuations], ascending: the row of `plan` that each goes on from, one
                of those that want logits.
            tokens: int32 [continuations], the token it goes on with.

        A row that is not named has ended; of a row's continuations the first keeps its sample
        number, the others are forks. Those that have `max_new_tokens` end by themselves, and
        those of a request that was cancelled are left out. A request without samples is finished.

        Returns the sample number of each continuation, int32; -1 where it ended at once.
        Raises: `ValueError`, `TypeError` before anything is changed.
        """
        parents, tokens = _continuations(parents, tokens)
        if not len(plan) and not len(parents):
            return parents.astype(np.int32)
        with self._lock, self._change:
            draft = self._under_way(plan)
            self._refuse_bad_parents(plan, parents)
            self._change.begin()
            self._step = None
            self._commit(plan, draft)
            stopped = [live for live in self._running if live.ending is not None]
            keeps = plan.wants_logits
            for live in stopped:
                keeps = keeps & ~np.isin(plan.samples, live.samples)
                self._end(live, live.ending or Reason.CANCELLED)
            return self._continue(plan, keeps.nonzero()[0], parents, tokens)

    def abort(self, plan: StepPlan) -> list[Hashable]:
        """The step failed: all requests in it end; the others live on. O(their blocks).

        Blocks that were to be moved may not have been: requests that the plan swapped are computed
        again. Returns the names of those that ended. Raises: `ValueError` for another plan.
        """
        with self._lock, self._change:
            if not len(plan) and self._step is None:
                return []
            draft = self._under_way(plan)
            self._change.begin()
            self._step = None
            failed = [self._lives[name] for name in dict.fromkeys(plan.names)]
            for live in failed:
                self._end(live, Reason.FAILED)
            for live in draft.moved:
                if self._lives.get(live.name) is live and live.state is not State.DROPPED:
                    if live.state is State.RUNNING:
                        self._leave(live)
                        self._preempted.append(live)
                    self._preemption.drop(live)
            for live in [live for live in self._running if live.ending is not None]:
                self._end(live, live.ending or Reason.CANCELLED)
            return [live.name for live in failed]

    def _under_way(self, plan: StepPlan) -> Draft:
        if self._step is None or self._step[0] is not plan:
            raise ValueError("this plan is not under way; each is completed or aborted once")
        return self._step[1]

    def _refuse_bad_parents(self, plan: StepPlan, parents: Int64) -> None:
        if not len(parents):
            return
        if parents[0] < 0 or parents[-1] >= len(plan) or np.any(parents[1:] < parents[:-1]):
            raise ValueError(f"parents {parents}: expected rows below {len(plan)}, ascending")
        if not plan.wants_logits[parents].all():
            row = parents[~plan.wants_logits[parents]][0]
            raise ValueError(f"parent {row}: this row's prompt is not computed to its end")
        counts = np.bincount(parents, minlength=len(plan))
        for row in (counts > 1).nonzero()[0].tolist():
            live = self._samples.owner(int(plan.samples[row]))
            total = int(counts[np.isin(plan.samples, live.samples)].sum())
            if total > live.request.num_samples:
                raise ValueError(
                    f"request {live.name!r}: {total} samples, but num_samples is "
                    f"{live.request.num_samples}"
                )

    def _commit(self, plan: StepPlan, draft: Draft) -> None:
        """The KV of the step's tokens is written."""
        samples = self._samples
        samples.computed[plan.samples] = plan.kv_lens
        num_decoding = 0 if draft.decoding is None else len(draft.decoding)
        if self.prefix_cache and draft.decoding is not None:
            self.manager.commit(draft.decoding)
        for number in plan.samples[num_decoding:].tolist():
            if self.prefix_cache:
                self.manager.commit(samples.handle(number), int(samples.computed[number]))
            live = samples.owner(number)
            if not live.is_ready:
                mine = live.samples
                live.is_ready = bool((samples.computed[mine] == samples.lengths[mine]).all())
                self._decoding = None

    def _continue(self, plan: StepPlan, rows: Int64, parents: Int64, tokens: Int32) -> Int32:
        """Each of `rows` goes on as often as it is named, or ends."""
        samples = self._samples
        if np.array_equal(rows, parents):
            numbers = plan.samples[rows]
        else:
            numbers = self._branch(plan, rows, parents)
        going = numbers >= 0
        samples.extend(numbers[going], tokens[going])
        full = going & (samples.generated[numbers] >= samples.limits[numbers])
        if full.any():
            for number in numbers[full].tolist():
                self._end_sample(number)
            numbers[full] = -1
        return numbers

    def _branch(self, plan: StepPlan, rows: Int64, parents: Int64) -> Int32:
        """End the rows that nobody named, fork those named several times."""
        samples = self._samples
        counts = np.bincount(parents, minlength=len(plan))
        for number in plan.samples[rows[counts[rows] == 0]].tolist():
            self._end_sample(number)
        first = np.ones(len(parents), np.bool_)
        first[1:] = parents[1:] != parents[:-1]
        kept = np.isin(parents, rows)
        numbers = np.where(first & kept, plan.samples[parents], -1).astype(np.int32)
        for row in rows[counts[rows] > 1].tolist():
            parent = int(plan.samples[row])
            if samples.generated[parent] + 1 >= samples.limits[parent]:
                continue  # they would end at once
            live, begin = samples.owner(parent), int(np.searchsorted(parents, row))
            handles = self.manager.fork(samples.handle(parent), int(counts[row]) - 1)
            children = [samples.fork(parent, handle) for handle in handles]
            at = live.samples.index(parent) + 1
            live.samples[at:at] = children
            numbers[begin + 1 : begin + 1 + len(children)] = children
            self._decoding = None
        return numbers

    def _end_sample(self, number: int) -> None:
        live = self._samples.owner(number)
        if len(live.samples) == 1:
            self._end(live, Reason.FINISHED)
            return
        self._preemption.end([number])
        self._samples.drop(number)
        live.samples.remove(number)
        self._decoding = None


def _continuations(parents: ArrayLike, tokens: ArrayLike) -> tuple[Int64, Int32]:
    rows = arguments.integers("parents", parents)
    if rows.ndim != 1:
        raise TypeError(f"parents of {rows.dtype} {rows.shape}: expected a list of ints")
    ids = arguments.token_ids(tokens)
    if len(ids) != len(rows):
        raise ValueError(f"{len(rows)} parents, but {len(ids)} tokens: expected one for each")
    return rows.astype(np.int64), ids
