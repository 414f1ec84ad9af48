"""Drops cached prefixes when the model that computed them changes."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any, Protocol

from kvpager.scheduling.scheduler import Scheduler

logger = logging.getLogger("kvpager")


class ModelState(Protocol):
    """The state of a model at one moment."""

    @property
    def version(self) -> int:
        """A number that differs after each change of the model. O(1)."""

    @property
    def doubt(self) -> str | None:
        """The reason why changes may go unnoticed, or None. O(1)."""


class ModelWatch(Protocol):
    """Detects changes of a model."""

    def look(self) -> ModelState:
        """Compare the whole model with its last known state."""

    def glance(self) -> ModelState:
        """Compare a small part of the model with its last known state, a new part each time."""


class ModelGuard:
    """Keeps requests from sharing prefixes that another state of the model computed.

    `between_steps` checks the model before each step, without the lock. It checks the whole model
    if a request may start, and a part of it otherwise. `catch_up` checks again if a request arrived
    meanwhile, because its caller may have changed the model just before.

    Args:
        watch: detects changes of the model.
        scheduler: owns the cached prefixes.
        lock: guards the scheduler; reentrant.
    """

    def __init__(
        self, watch: ModelWatch, scheduler: Scheduler, lock: AbstractContextManager[Any]
    ) -> None:
        self._watch = watch
        self._scheduler = scheduler
        self._lock = lock
        self._state: ModelState | None = None  # at the last check
        self._has_arrivals = False  # since the last check began
        self.num_changes = 0

    @property
    def doubt(self) -> str | None:
        """The reason why requests share no prefixes now, or None. O(1)."""
        return None if self._state is None else self._state.doubt

    def between_steps(self) -> None:
        """Check the model, and drop cached prefixes if it changed."""
        self._has_arrivals = False
        self._look()

    def look(self) -> None:
        """Check the whole model, and drop cached prefixes if it changed. Call without the lock."""
        self._judge(self._watch.look())

    def note_arrival(self) -> None:
        """Record that the scheduler got a request. Call under the lock. O(1)."""
        self._has_arrivals = True

    def catch_up(self) -> None:
        """Check again if a request arrived during the last check. Call under the lock."""
        if self._has_arrivals:
            self._look()

    def _look(self) -> None:
        scheduler = self._scheduler
        begins = scheduler.num_waiting + scheduler.num_preempted
        if not begins + scheduler.num_running:
            return
        self._judge(self._watch.look() if begins else self._watch.glance())

    def _judge(self, state: ModelState) -> None:
        before, self._state = self._state, state
        is_new = before is not None and before.version != state.version
        if state.doubt is not None and (before is None or before.doubt != state.doubt):
            logger.warning("requests share no prefixes: %s", state.doubt)
        if is_new or state.doubt is not None:
            self.num_changes += is_new
            with self._lock:
                self._scheduler.clear_prefix_cache()
