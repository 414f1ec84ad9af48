"""Who is live, and where: the part of a `Scheduler` that knows requests, not steps."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from heapq import heapify, heappop, heappush
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpager import _validate as arguments
from kvpager._atomic import Change
from kvpager.blocks.manager import BlockManager
from kvpager.blocks.sequences import Batch
from kvpager.errors import BrokenInvariant, QueueFull
from kvpager.plans import Reason, StepPlan
from kvpager.scheduling.preemption import Preemption, PreemptionCosts
from kvpager.scheduling.queue import Order, make_order
from kvpager.scheduling.request import Live, Request, Samples, State, blocks_needed, read_prompt
from kvpager.scheduling.step import Draft

Int32 = NDArray[np.int32]


class Decoders(NamedTuple):
    """The rows that decode, kept as long as they are the same."""

    numbers: Int32
    batch: Batch
    names: list[Hashable]
    shares: list[tuple[Live, int]]  # somebody of each queue, and how many rows the queue has


class SchedulerStats(NamedTuple):
    """A moment's counts, in requests unless the name says otherwise; totals since the beginning."""

    num_waiting: int
    num_running: int
    num_running_rows: int
    num_preempted: int
    total_steps: int
    total_tokens: int  # computed, prompts and decoding, again after a preemption included
    total_reused_tokens: int  # of prompts, found in the prefix index
    total_preempted_by_swap: int
    total_preempted_by_recompute: int


class Roster:
    """The state of a `Scheduler`, which documents the arguments."""

    def __init__(
        self,
        manager: BlockManager,
        *,
        max_batch_tokens: int = 2048,
        max_running: int = 256,
        max_waiting: int | None = None,
        order: str | Order = "fifo",
        watermark: float = 0.01,
        prefix_cache: bool = True,
        costs: PreemptionCosts | None = None,
        max_length: int | None = None,
        chunked: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not isinstance(manager, BlockManager):
            raise TypeError(f"manager: expected a BlockManager, got {type(manager).__name__}")
        if manager.has_fences:
            raise ValueError("manager: a step's plans are applied in order; make it without fences")
        arguments.number("watermark", watermark, at_least=0, at_most=1)
        if watermark == 1:
            raise ValueError(f"watermark {watermark}: expected a share, 0 <= watermark < 1")
        self.manager = manager
        self.max_batch_tokens = arguments.count("max_batch_tokens", max_batch_tokens, at_least=1)
        rows = arguments.count("max_running", max_running, at_least=1)
        self.max_running = min(rows, self.max_batch_tokens)
        self.max_waiting = (
            None if max_waiting is None else arguments.count("max_waiting", max_waiting, at_least=1)
        )
        self.max_length = (
            None if max_length is None else arguments.count("max_length", max_length, at_least=1)
        )
        self.watermark = watermark
        self.prefix_cache = arguments.flag("prefix_cache", prefix_cache)
        self.chunked = arguments.flag("chunked", chunked)
        self.clock = clock
        self._lock: AbstractContextManager[Any] = threading.RLock()
        self._change = Change(self)
        self._order = make_order(order)
        self._samples = Samples()
        self._preemption = Preemption(
            manager, self._samples, costs or PreemptionCosts(), by_ids=prefix_cache
        )
        stats = manager.stats()
        usable = stats.num_held + stats.num_cached + stats.num_kept + stats.num_free
        self._num_reserved = stats.num_blocks - usable  # the null block, if there is one
        self._lives: dict[Hashable, Live] = {}
        self._running: list[Live] = []  # by when they came onto the device
        self._preempted: list[Live] = []
        self._deadlines: list[tuple[float, int, Hashable]] = []
        self._ended: list[tuple[Hashable, Reason]] = []
        self._untold: set[Hashable] = set()  # names in `_ended`
        self._num_submitted = 0
        self._generation = 0
        self._num_rows_reserved = 0
        self._step: tuple[StepPlan, Draft] | None = None
        self._decoding: Decoders | None = None  # None: to be made anew
        self._totals = Counter[str]()

    # ---------------------------------------------------------------- requests come and go

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn. O(prompt).

        Raises: `QueueFull`; `TypeError`, `ValueError` for a name in use (or whose end no plan has
        told yet) and for what could never be served: a prompt that is empty or too long, more
        samples than rows, more blocks than there are.
        """
        prompt = read_prompt(request)
        name = request.name
        with self._lock, self._change:
            if name in self._lives or name in self._untold:
                raise ValueError(f"request {name!r}: the name is in use; choose another")
            self._refuse_impossible(request, len(prompt))
            if self.max_waiting is not None and len(self._order) >= self.max_waiting:
                raise QueueFull(len(self._order), self.max_waiting)
            now = float(self.clock())
            self._change.begin()
            live = Live(request, prompt, self._num_submitted, now, self._generation)
            self._num_submitted += 1
            self._lives[name] = live
            self._order.enter(live)
            self._order.push(live)
            if request.deadline is not None:
                heappush(self._deadlines, (request.deadline, live.arrival, name))

    def _refuse_impossible(self, request: Request, num_prompt: int) -> None:
        name, length = request.name, num_prompt + request.max_new_tokens
        if request.num_samples > self.max_running:
            raise ValueError(
                f"request {name!r}: {request.num_samples} samples, but at most "
                f"{self.max_running} rows run; ask for fewer, or raise max_running"
            )
        what = f"a prompt of {num_prompt} and {request.max_new_tokens} new tokens"
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"request {name!r}: {what} are more than max_length {self.max_length}; "
                "shorten the prompt or lower max_new_tokens"
            )
        need = blocks_needed(request, num_prompt, self.manager.block_size)
        if need > self._num_usable:
            raise ValueError(
                f"request {name!r}: {what} in {request.num_samples} samples may need {need} "
                f"blocks, the pool has {self._num_usable}; ask for less, or make the pool larger"
            )
        ceiling = self.manager.ceiling(request.namespace)
        if ceiling is not None and need > ceiling:
            raise ValueError(
                f"request {name!r}: {what} in {request.num_samples} samples may need {need} "
                f"blocks, its namespace may have {ceiling}; ask for less or raise the quota"
            )

    def cancel(self, name: Hashable) -> bool:
        """End a request, whatever its state; whether it was live. O(its blocks + waiting).

        While its step is being computed it ends with `complete`.
        """
        return self._stop(name, Reason.CANCELLED)

    def finish(self, name: Hashable) -> bool:
        """As `cancel`, for a request that has all it wants: it ends as `FINISHED`."""
        return self._stop(name, Reason.FINISHED)

    def _stop(self, name: Hashable, reason: Reason) -> bool:
        with self._lock, self._change:
            live = self._lives.get(name)
            if live is None or live.ending is not None:
                return False
            self._change.begin()
            if self._step is not None and live.state is State.RUNNING:
                live.ending = reason
            else:
                self._end(live, reason)
            return True

    def _end(self, live: Live, reason: Reason) -> None:
        """The request's life is over: everything it holds is given back."""
        self._preemption.end(live.samples)
        for number in live.samples:
            self._samples.drop(number)
        live.samples.clear()
        if live.state is State.WAITING:
            self._order.remove(live)
        elif live.state is State.RUNNING:
            self._leave(live)
        else:
            self._preempted.remove(live)
        self._order.leave(live)
        del self._lives[live.name]
        if len(self._deadlines) > 2 * len(self._lives) + 64:  # most of them are of ended requests
            self._deadlines = [entry for entry in self._deadlines if entry[2] in self._lives]
            heapify(self._deadlines)
        self._ended.append((live.name, reason))
        self._untold.add(live.name)

    def _enter(self, live: Live) -> None:
        self._running.append(live)
        self._num_rows_reserved += live.request.num_samples
        self._decoding = None

    def _leave(self, live: Live) -> None:
        self._running.remove(live)
        self._num_rows_reserved -= live.request.num_samples
        self._decoding = None

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, arrival, name = heappop(self._deadlines)
            live = self._lives.get(name)
            if live is not None and live.arrival == arrival:
                self._end(live, Reason.EXPIRED)

    def forget_prefixes(self) -> None:
        """Share nothing computed so far with what begins from now on: a model changed, say.

        Requests that run, or are swapped, go on with what they have. O(requests + cached blocks).
        """
        with self._lock, self._change:
            self._change.begin()
            self._generation += 1
            for live in self._lives.values():
                if live.state is State.WAITING:
                    live.generation = self._generation
            self.manager.drop_cached()

    # ---------------------------------------------------------------- reading

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun. O(1)."""
        return len(self._order)

    @property
    def num_running(self) -> int:
        """Requests on the device. O(1)."""
        return len(self._running)

    @property
    def num_preempted(self) -> int:
        """Requests that were taken off the device and will return. O(1)."""
        return len(self._preempted)

    @property
    def has_work(self) -> bool:
        """Whether anything lives, or `plan` has an end to tell. O(1)."""
        return bool(self._lives or self._ended or self._samples.has_ended)

    @property
    def names(self) -> list[Hashable]:
        """The live requests, by arrival. O(requests)."""
        return list(self._lives)

    def stats(self) -> SchedulerStats:
        """Counts of now and totals. O(running)."""
        return SchedulerStats(
            num_waiting=self.num_waiting,
            num_running=self.num_running,
            num_running_rows=sum(len(live.samples) for live in self._running),
            num_preempted=self.num_preempted,
            total_steps=self._totals["steps"],
            total_tokens=self._totals["tokens"],
            total_reused_tokens=self._totals["reused"],
            total_preempted_by_swap=self._preemption.num_swapped,
            total_preempted_by_recompute=self._preemption.num_dropped,
        )

    @property
    def _num_usable(self) -> int:
        return self.manager.num_blocks - self._num_reserved

    def check(self) -> None:
        """Recount everything, the manager's books included. O(blocks + tokens).

        Raises: `BrokenInvariant`, naming the broken law.
        """
        self.manager.check()
        self._order.check()
        places = [(live, {State.RUNNING}) for live in self._running]
        places += [(live, {State.SWAPPED, State.DROPPED}) for live in self._preempted]
        for live, states in places:
            if live.state not in states:
                raise BrokenInvariant(
                    f"scheduler: {live.name!r} is {live.state.name}, listed elsewhere"
                )
        listed = len(self._order) + len(self._running) + len(self._preempted)
        if listed != len(self._lives):
            raise BrokenInvariant(f"scheduler: {listed} are listed, but {len(self._lives)} live")
        reserved = sum(live.request.num_samples for live in self._running)
        if reserved != self._num_rows_reserved or reserved > self.max_running:
            raise BrokenInvariant(
                f"scheduler: {self._num_rows_reserved} rows reserved of {self.max_running}, "
                f"but {reserved} are"
            )
        for live in self._lives.values():
            self._check_live(live)
        self._samples.check(self._lives.values())

    def _check_live(self, live: Live) -> None:
        samples, name = self._samples, live.name
        if (live.state is State.WAITING) != (not live.samples):
            raise BrokenInvariant(f"scheduler: {name!r} is {live.state.name} with {live.samples}")
        if len(live.samples) > live.request.num_samples:
            raise BrokenInvariant(f"scheduler: {name!r} has {len(live.samples)} samples")
        has_blocks = live.state in (State.RUNNING, State.SWAPPED)
        for number in live.samples:
            handle = samples.handles[number]
            if (handle is not None) != has_blocks:
                raise BrokenInvariant(f"scheduler: {name!r} is {live.state.name}, blocks or not")
            length = 0 if handle is None else len(handle)
            computed = int(samples.computed[number])
            if length != samples.lengths[number] or not 0 <= computed <= length:
                raise BrokenInvariant(f"scheduler: sample {number}: {computed} of {length} tokens")
            if samples.generated[number] >= samples.limits[number]:
                raise BrokenInvariant(f"scheduler: sample {number} has all its tokens and lives")
