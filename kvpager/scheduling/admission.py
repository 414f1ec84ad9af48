"""Who comes onto the device: preempted requests first, then those that wait."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from kvpager.errors import OutOfBlocks
from kvpager.scheduling.request import NOBODY, Live, State
from kvpager.scheduling.request_table import Roster
from kvpager.scheduling.step import Draft

Int32 = NDArray[np.int32]

_LOOK_PAST = 32  # waiting requests that a plan looks past, at the most


class Admission(Roster):
    """The part of a `Scheduler` that decides who begins, and computes prompts."""

    # ---------------------------------------------------------------- who comes onto the device

    def _spare(self, live: Live) -> int:
        """Blocks that have to stay available when this request comes onto the device.

        Where nobody else runs its own worst case has room, and that is all it may ask for. One
        that returns leaves a block for each row, or it would soon have to leave again.
        """
        if not self._running:
            return 0
        spare = int(np.ceil(self.watermark * self._num_usable))
        if live.state is State.WAITING:
            return spare
        num_rows = sum(len(one.samples) for one in self._running)
        return max(spare, num_rows) + len(live.samples)

    def _has_rows(self, live: Live) -> bool:
        return self._num_rows_reserved + live.request.num_samples <= self.max_running

    def _return(self, draft: Draft) -> None:
        """Bring back preempted requests, before anybody new."""
        while self._preempted:
            live = min(self._preempted, key=self._order.rank)
            if self._has_rows(live) and self._come_back(live, draft):
                continue
            if self._running or not self._reclaim(live):
                draft.is_blocked = True
                return

    def _come_back(self, live: Live, draft: Draft) -> bool:
        if live.state is State.DROPPED:
            return self._begin(live, draft)
        # Moves are made before copies, so none may write where a copy made earlier reads.
        if draft.is_prompt_copied or not self._has_budget(live, draft):
            return False
        try:
            draft.moves.append(self._preemption.swap_in(live, self._spare(live)))
        except OutOfBlocks:
            return False
        draft.moved.append(live)
        self._preempted.remove(live)
        self._enter(live)
        if live.is_ready:
            self._decode_more(live, draft)
        else:
            self._compute(live, draft)
        return True

    def _has_budget(self, live: Live, draft: Draft) -> bool:
        if live.is_ready:
            return len(live.samples) <= draft.budget
        samples = self._samples
        remaining = max(int(samples.lengths[n] - samples.computed[n]) for n in live.samples)
        return bool(self._chunk(remaining, draft.budget))

    def _decode_more(self, live: Live, draft: Draft) -> None:
        numbers = np.array(live.samples, np.int32)
        ids = self._samples.pending[numbers]
        try:
            step = self.manager.append(
                self._preemption.handles(live), ids if self.prefix_cache else 1
            )
        except OutOfBlocks:
            return  # a quota: the next step will see
        self._samples.lengths[numbers] += 1
        draft.decode(numbers, ids, step)

    def _begin(self, live: Live, draft: Draft) -> bool:
        """Give a request that waits, or was dropped, its blocks and a first chunk."""
        is_new = live.state is State.WAITING
        live.generation = self._generation  # all of it is computed from now on
        if is_new:
            self._samples.add(live)
        length = self._samples.num_known(live.samples[0])
        remaining = length - self._num_cached(live, length)
        copies = None
        if self._chunk(remaining, draft.budget):
            with suppress(OutOfBlocks):
                copies = self._preemption.begin(live, self._spare(live))
        if copies is None:
            if is_new:
                self._samples.take_back(live)
            return False
        if is_new:
            self._order.remove(live)
            live.leader = None  # or a chain of them would never be let go
        else:
            self._preempted.remove(live)
        draft.copy(copies)
        draft.is_prompt_copied |= len(copies) > 0
        self._totals["reused"] += length - remaining
        self._enter(live)
        self._compute(live, draft)
        return True

    def _num_cached(self, live: Live, length: int) -> int:
        """How many of its first row's leading tokens need no computing now. O(tokens)."""
        if not self.prefix_cache:
            return 0
        ids = self._samples.tokens(live.samples[0], 0, length - 1) if live.samples else None
        namespace, adapter = live.identity
        return self.manager.cached_tokens(
            live.prompt[: length - 1] if ids is None else ids, namespace=namespace, adapter=adapter
        )

    def _admit(self, draft: Draft) -> None:
        """Let waiting requests begin, in their order, as long as there is room for the next."""
        if not draft.budget or self._num_rows_reserved == self.max_running:
            return
        num_passed = 0
        for live in self._order.waiting():
            if not self._has_rows(live) or num_passed == _LOOK_PAST:
                return
            if self.prefix_cache and self._awaits(live):
                num_passed += 1
            elif not self._begin(live, draft):
                return

    def _awaits(self, live: Live) -> bool:
        """Whether somebody computes what its prompt begins with right now.

        It waits for one request at the most, and only while that computes: so not for long.
        """
        if live.leader is None:
            self._find_leader(live)
        leader = live.leader
        if leader is None or leader.state is not State.RUNNING or leader.is_ready:
            return False
        return bool(leader.samples) and self._num_computed(leader) < live.shared

    def _find_leader(self, live: Live) -> None:
        begun = [
            other
            for other in self._running
            if not other.is_ready and other.identity == live.identity
        ]
        if not begun:
            return
        size = self.manager.block_size
        shares = [_num_common(live.prompt[:-1], other.prompt) // size * size for other in begun]
        most = int(np.argmax(shares))
        if shares[most] <= self._num_computed(begun[most]):
            return  # committed already
        if shares[most] >= self._num_cached(live, len(live.prompt)) + size:
            live.leader, live.shared = begun[most], shares[most]

    def _num_computed(self, live: Live) -> int:
        return int(self._samples.computed[live.samples[0]])

    # ---------------------------------------------------------------- prompts, and room

    def _prefill(self, draft: Draft) -> None:
        """A chunk of each prompt that was begun, as far as the budget goes."""
        begun = [live for live in self._running if not live.is_ready]
        for live in sorted(begun, key=self._order.rank):
            if not self._compute(live, draft):
                draft.is_blocked = True
                return

    def _compute(self, live: Live, draft: Draft) -> bool:
        """A chunk of each of the request's rows; whether the budget was enough to go on."""
        samples = self._samples
        for number in live.samples:
            behind = int(samples.behind[number])
            start, length = int(samples.computed[number]), int(samples.lengths[number])
            if behind != NOBODY:
                # One that is behind somebody itself has not computed what it counts as such.
                if samples.behind[behind] != NOBODY or samples.computed[behind] < start:
                    continue
                samples.behind[number] = NOBODY
            if start == length:
                continue
            count = self._chunk(length - start, draft.budget)
            if not count:
                return False
            stop = start + count
            slots = self.manager.slots(samples.handle(number), start, stop)
            is_first = not samples.generated[number]
            draft.compute(
                number,
                samples.tokens(number, start, stop),
                slots,
                wants=is_first and stop == length,
            )
            if is_first:
                self._order.charge(live, count, 0)
        return True

    def _chunk(self, remaining: int, budget: int) -> int:
        """How many tokens of a prompt to compute now."""
        if self.chunked:
            least = min(self.manager.block_size, remaining, self.max_batch_tokens)
            return min(remaining, budget) if budget >= least else 0
        alone = budget == self.max_batch_tokens
        return remaining if remaining <= budget or alone else 0

    def _reclaim(self, but: Live | None = None) -> bool:
        """Take from a swapped request what it still has on the device; whether one had any."""
        for live in sorted(self._preempted, key=self._order.rank, reverse=True):
            if live is but or live.state is not State.SWAPPED:
                continue
            if self._preemption.holds_device_blocks(live):
                self._preemption.drop(live)
                return True
        return False


def _num_common(one: Int32, other: Int32) -> int:
    """How many leading tokens two prompts have in common. O(tokens)."""
    count = min(len(one), len(other))
    differs = (one[:count] != other[:count]).nonzero()[0]
    return int(differs[0]) if len(differs) else count
