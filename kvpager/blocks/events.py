"""Events of cached blocks, and the published blocks: `manager.events`."""

from __future__ import annotations

from kvpager.blocks.event_log import Event, EventLog
from kvpager.blocks.state import BlockState


class Events:
    """The events of a manager. Thread-safe.

    Writes the event log: `fetch` and `restart` empty it.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state

    def fetch(self) -> list[Event]:
        """Return the events since the last call, oldest first. O(events).

        Raises: `ValueError` if the manager was made without `num_events`.
        """
        state = self._state
        with state.lock, state.change:
            log = self._log
            state.change.begin()
            return log.fetch()

    def restart(self) -> list[Event]:
        """Return `published`, and drop the events before it, for a reader that missed some.

        The next `fetch` continues from there. O(tokens). Raises: as `fetch`.
        """
        state = self._state
        with state.lock, state.change:
            log, stored = self._log, list(state.index.published())
            state.change.begin()
            log.skip()
            return stored

    @property
    def _log(self) -> EventLog:
        if self._state.log is None:
            raise ValueError("num_events=0: no events are logged. Pass num_events=10_000.")
        return self._state.log

    def published(self) -> list[Event]:
        """Return the published blocks as `stored` events, for a router to start from. O(tokens)."""
        with self._state.lock:
            return list(self._state.index.published())
