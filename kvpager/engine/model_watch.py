"""Cached prompts are dropped when the model that computed them changes."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any, Protocol

from kvpager.scheduling.scheduler import Scheduler

logger = logging.getLogger("kvpager")


class ModelState(Protocol):
    """A model at a moment."""

    @property
    def version(self) -> int:
        """Return a number that is another one after each change of the model. O(1)."""

    @property
    def doubt(self) -> str | None:
        """Return why the state cannot be told, or None if it can. O(1)."""


class ModelWatch(Protocol):
    """Tells whether a model is the same as before."""

    def look(self) -> ModelState:
        """Compare all of the model with the last look."""

    def glance(self) -> ModelState:
        """Compare a small part of the model with the last look, another part each time."""


class ModelGuard:
    """Lets requests share nothing that another state of the model computed.

    `between_steps` looks at the model before each step, under no lock. Before a request begins, all
    of the model is looked at; while requests only continue, a part of it. `catch_up` looks again if
    a request came meanwhile: its caller may have changed the model just before.

    Args:
        watch: tells whether the model changed.
        scheduler: has the cached prompts.
        lock: over the scheduler, reentrant.
    """

    def __init__(
        self, watch: ModelWatch, scheduler: Scheduler, lock: AbstractContextManager[Any]
    ) -> None:
        self._watch = watch
        self._scheduler = scheduler
        self._lock = lock
        self._state: ModelState | None = None  # at the last look
        self._has_arrivals = False  # since the beginning of the last look
        self.num_changes = 0

    @property
    def doubt(self) -> str | None:
        """Return why requests share no prompts now, or None if they do. O(1)."""
        return None if self._state is None else self._state.doubt

    def between_steps(self) -> None:
        """Look at the model, and drop cached prompts if it changed."""
        self._has_arrivals = False
        self._look()

    def note_arrival(self) -> None:
        """Note that a request waits, after the scheduler has it. Call under the lock. O(1)."""
        self._has_arrivals = True

    def catch_up(self) -> None:
        """Look at the model again if a request came during the last look. Call under the lock."""
        if self._has_arrivals:
            self._look()

    def _look(self) -> None:
        scheduler = self._scheduler
        begins = scheduler.num_waiting + scheduler.num_preempted
        if not begins + scheduler.num_running:
            return
        state = self._watch.look() if begins else self._watch.glance()
        before, self._state = self._state, state
        is_new = before is not None and before.version != state.version
        if state.doubt is not None and (before is None or before.doubt != state.doubt):
            logger.warning("requests share no prompts: %s", state.doubt)
        if is_new or state.doubt is not None:
            self.num_changes += is_new
            with self._lock:
                scheduler.clear_prefix_cache()
