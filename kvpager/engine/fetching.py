"""Requests whose beginning is fetched from tiers below the device."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from numpy.typing import ArrayLike

from kvpager._atomic import Uninterrupted
from kvpager.engine.model_watch import ModelGuard
from kvpager.engine.prompt_saves import PromptSaves
from kvpager.engine.warming import GRACE_S, Warming
from kvpager.plans import LoadBlocks, StepPlan, Transfer
from kvpager.scheduling.request import Request, lora_of_version
from kvpager.scheduling.scheduler import Scheduler
from kvpager.storage.tiers.loading import Fetch
from kvpager.storage.tiers.retaining import Retained
from kvpager.storage.tiers.tiering import Tiering
from kvpager.storage.tiers.tiering_stats import TieringStats

logger = logging.getLogger("kvpager")

_CLEANED_PER_STEP = 64  # blocks offered to the stores, at most
# While a fetch loads, its loaded blocks are attached in parts, because each part costs O(prompt):
# at least `_ATTACHED_MIN` blocks, and 1 / `_ATTACHES` of the prompt.
_ATTACHED_MIN, _ATTACHES = 32, 4
_LAST_SAVES_S = 5.0


class _Held(NamedTuple):
    """A request that waits for a fetch until `deadline`, which may be before the fetch's own.

    In groups of layers a fetch loads the windows of one prompt only. `rest` is the prompt of
    another request that shares it, and begins a fetch of its own afterwards.
    """

    request_id: Hashable
    fetch: Fetch
    deadline: float
    rest: ArrayLike | None = None


class Fetching:
    """Holds requests while their blocks are fetched, and saves blocks that leave next.

    `begin` and the `note_` methods are called under the lock. `between_steps` is a callback of the
    engine's thread: no store makes it wait. After the prefix cache was cleared, for example because
    the model changed, and after a failure, nothing is fetched or saved any more.

    Args:
        scheduler: holds the requests.
        tiering: moves the blocks. Its manager is the scheduler's.
        lock: guards the scheduler; reentrant.
        guard: notices changes of the model; None if it cannot change.
        wake: makes the engine's thread take another step soon. Safe in any thread.
        save_wait_s: how long the end of a request waits until its prompt is saved; None saves
            blocks later.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tiering: Tiering,
        lock: AbstractContextManager[Any],
        guard: ModelGuard | None,
        wake: Callable[[], None],
        save_wait_s: float | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._tiering = tiering
        self._lock, self._uninterrupted = lock, Uninterrupted(lock)
        self._guard = guard
        self._wake = wake
        if guard is not None:
            guard.look()  # each later change is noticed
        self._cache_version = scheduler.cache_version
        self._is_on = True
        self._held: list[_Held] = []
        self._tokens_by_store: dict[Hashable, dict[str, int]] = {}
        self._may_be_dirty = False
        self._saves = None
        if save_wait_s is not None:
            self._saves = PromptSaves(scheduler, tiering, save_wait_s)
        self._warming = Warming(tiering, wake)
        tiering.on_progress = wake

    def begin(self, request: Request) -> None:
        """Fetch the beginning of a request that was queued, and hold it meanwhile. O(tokens)."""
        if self._check_on():
            with self._uninterrupted:  # an interrupt in between would lose the fetch
                self._begin_held(request)

    def _begin_held(self, request: Request) -> None:
        fetch = self._begin(request.request_id, request.prompt)
        if fetch is None:
            return
        is_shared = fetch.blocks is not None and fetch.num_waiting > 1
        try:
            rest = request.prompt if is_shared else None
            self._held.append(_Held(request.request_id, fetch, fetch.wait_until, rest))
            self._scheduler.hold(request.request_id)
        except BaseException:
            self._held = [held for held in self._held if held.fetch is not fetch]
            self._tiering.cancel(fetch)
            raise

    def _begin(self, request_id: Hashable, prompt: ArrayLike) -> Fetch | None:
        namespace, lora = self._scheduler.identity(request_id)
        try:
            return self._tiering.begin(prompt, namespace=namespace, lora=lora)
        except Exception:  # the request is queued already, and can be computed
            logger.exception("request %r: its prefix is not fetched", request_id)
            return None

    def warm(self, prompt: ArrayLike, namespace: str | None, wait_s: float) -> Future[int]:
        """Fetch a prompt without a request. Returns how many tokens were added. O(tokens)."""
        lora = lora_of_version(None, self._cache_version)
        if self._check_on():
            with self._uninterrupted:  # an interrupt in between would lose the fetch
                return self._warming.begin(prompt, namespace, lora, wait_s)
        nothing = Future[int]()
        nothing.set_result(0)
        return nothing

    def retain(self, prompt: ArrayLike, namespace: str | None) -> Retained:
        """Keep the cached blocks of a prompt on the device. O(tokens + live requests).

        Raises: `ValueError` if a live request could not end beside them.
        """
        if not self._check_on():
            return Retained()
        lora = lora_of_version(None, self._cache_version)
        check = self._scheduler.refuse_starvation
        return self._tiering.retentions.begin(prompt, check, namespace=namespace, lora=lora)

    def note_arrival(self) -> None:
        """Release the retained prompts if the prefix cache was cleared. O(1)."""
        self._check_on()

    def note_prompts(self, requests: Iterable[Request]) -> None:
        """Record that prompts of live requests are computed: they may be saved. O(requests)."""
        if self._saves is not None and self._is_on:
            for request in requests:
                self._saves.begin(request.request_id, request.prompt)

    def note_end(self, request_id: Hashable, report: Callable[[], None], *, may_wait: bool) -> None:
        """Record that a request ended: its blocks may be saved. O(1).

        Calls `report`, later if that `may_wait` until the prompt is saved.
        """
        if self._saves is None:
            report()
        else:
            self._saves.end(request_id, report, may_wait=may_wait)
        self._may_be_dirty = self._is_on
        self._tokens_by_store.pop(request_id, None)
        for held in [held for held in self._held if held.request_id == request_id]:
            self._held.remove(held)
            self._tiering.cancel(held.fetch)

    @property
    def is_waiting(self) -> bool:
        """True if the end of a request waits for stores, or the caller of `warm` does. O(1)."""
        if self._warming.is_waiting:
            return True
        return self._saves is not None and self._saves.is_waiting

    def take_tokens_by_store(self, request_id: Hashable) -> dict[str, int]:
        """Return how many tokens were fetched for a request from each store. O(stores)."""
        return self._tokens_by_store.pop(request_id, {})

    def take_transfers(self) -> tuple[Transfer, ...]:
        """Return what followers are to do in the next plan. O(blocks)."""
        return self._tiering.followers.take()

    def note_failed_step(self, plan: StepPlan) -> None:
        """Drop cached prefixes that followers may not have loaded. O(cached blocks).

        Call it after the requests of the step have ended.
        """
        if any(isinstance(transfer, LoadBlocks) for transfer in plan.transfers):
            self._scheduler.clear_prefix_cache()
            self._check_on()

    def stats(self) -> TieringStats:
        """Return current counts of the tiers. O(stores)."""
        return self._tiering.stats()

    def between_steps(self) -> None:
        """Let requests start whose fetch has ended, and save some blocks."""
        if self._is_on and self._scheduler.cache_version != self._cache_version:
            with self._lock:
                self._check_on()
        is_cleaning = self._is_on and self._find_dirty()
        is_saving = self._has_prompts()
        if not (self._held or is_cleaning or is_saving or self.is_waiting):
            return
        if (is_cleaning or is_saving) and self._guard is not None:
            self._guard.look()  # blocks that a changed model computed are not saved
        with self._lock:
            try:
                self._check_on()
                if self._saves is not None:
                    self._saves.copy()  # before fetches take the place of these blocks
                    self._saves.report()
                room = self._end_fetches(self._tiering.step_blocks_max)
                room = self._warming.attach(room)
                if is_cleaning and self._is_on:
                    self._clean(room)
            except Exception:
                self._give_up()

    def _has_prompts(self) -> bool:
        """Return True if prompts have blocks to save at once."""
        if self._saves is None:
            return False
        with self._lock:
            return self._saves.has_blocks

    def _find_dirty(self) -> bool:
        if not (self._may_be_dirty or self._tiering.has_news):
            return False
        with self._lock:
            try:
                self._may_be_dirty = self._tiering.has_dirty()
            except Exception:
                self._give_up()
            return self._may_be_dirty

    def _end_fetches(self, room: int) -> int:
        """End fetches that are done or late. Copies up to `room` blocks; returns the rest."""
        now, waiting = time.monotonic(), list[_Held]()
        for held in list(self._held):
            request_id, fetch = held.request_id, held.fetch
            if not self._scheduler.is_held(request_id):  # it was cancelled
                self._tiering.cancel(fetch)
                continue
            is_done, is_late = fetch.is_done, now >= held.deadline + GRACE_S
            most = max(_ATTACHED_MIN, len(fetch.keys) // _ATTACHES)
            if is_done or is_late or len(fetch.slots) >= most:
                room -= self._attach(request_id, fetch, room)
            if fetch.slots and not room:
                self._wake()  # the next step copies more
            is_waiting = bool(fetch.slots) or not is_done
            if is_late and not is_done and (room or not fetch.slots):
                self._tiering.cancel(fetch)
                is_waiting = False
            if is_waiting:
                waiting.append(held)
            elif (more := self._begin_rest(held)) is not None:
                waiting.append(more)
            else:
                self._scheduler.release(request_id)
        self._held = waiting
        return room

    def _begin_rest(self, held: _Held) -> _Held | None:
        """Begin to fetch what the prompt of another request did not need, unless it was late."""
        if held.rest is None or time.monotonic() >= held.deadline:
            return None
        fetch = self._begin(held.request_id, held.rest)
        if fetch is None:
            return None
        more = _Held(held.request_id, fetch, fetch.wait_until)
        self._held.append(more)  # so that it is cancelled after a failure
        return more

    def _attach(self, request_id: Hashable, fetch: Fetch, room: int) -> int:
        """Attach up to `room` loaded blocks for a request; return how many were copied at most."""
        first = fetch.first
        tokens = self._tokens_by_store.setdefault(request_id, {})
        for store, count in self._tiering.attach(fetch, room, early=True).items():
            tokens[store] = tokens.get(store, 0) + count
        return min(fetch.first - first, room)  # a useless fetch drops all of its blocks

    def _clean(self, room: int) -> None:
        if room:
            self._tiering.clean(min(room, _CLEANED_PER_STEP))
        self._may_be_dirty = not (room and self._tiering.is_clean)
        if self._may_be_dirty and self._tiering.has_room:
            self._wake()

    def _check_on(self) -> bool:
        """Turn off if cached prefixes were dropped; return False if nothing is fetched now."""
        if self._is_on and self._scheduler.cache_version != self._cache_version:
            logger.warning("tiers are not used any more, because the prefix cache was cleared")
            self._turn_off()
        return self._is_on

    def _give_up(self) -> None:
        logger.exception("tiers are not used any more")
        self._turn_off()

    def _turn_off(self) -> None:
        self._is_on = self._may_be_dirty = False
        self._tiering.retentions.end_all()
        held, self._held = self._held, []
        for each in held:
            self._tiering.cancel(each.fetch)
            if self._scheduler.is_held(each.request_id):
                self._scheduler.release(each.request_id)
        if self._saves is not None:
            self._saves.give_up()
        self._warming.give_up()

    def close(self, *, saving: bool, run_plan: Callable[[], object]) -> None:
        """Give up all fetches, and close the stores after the saves under way.

        With `saving`, first saves the idle blocks that are dirty. Saves end after 5 seconds.
        `run_plan` lets followers save theirs.
        """
        ends_at = time.monotonic() + _LAST_SAVES_S
        self._tiering.finish_by(ends_at)
        self._tiering.retentions.end_all()  # so that their blocks are saved
        try:
            if saving:
                self._save_all(ends_at, run_plan)
        except Exception:
            logger.exception("the last blocks are not saved")
        self._turn_off()
        self._tiering.close()

    def _save_all(self, ends_at: float, run_plan: Callable[[], object]) -> None:
        if self._guard is not None:
            self._guard.look()
        progress = threading.Event()
        self._tiering.on_progress = progress.set
        while self._check_on() and (left_s := ends_at - time.monotonic()) > 0:
            progress.clear()
            if not self._tiering.has_room:
                progress.wait(left_s)
                continue
            with self._lock:
                self._tiering.clean(_CLEANED_PER_STEP)
            if self._tiering.followers.has_transfers:
                run_plan()
            if self._tiering.is_clean:
                break
