"""What happened to blocks, and what the prefix index offers now: `manager.events`."""

from __future__ import annotations

from kvpager.blocks.event_log import Event
from kvpager.blocks.state import BlockState


class Events:
    """The events of a manager. Its methods are as safe to share as the manager's.

    Writes the event log: `fetch` empties it.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state

    def fetch(self) -> list[Event]:
        """Return what happened since the last call, oldest first. O(events).

        Raises: `ValueError` where the manager was made without `num_events`.
        """
        state = self._state
        with state.lock, state.change:
            if state.log is None:
                raise ValueError("no events are kept; make the manager with num_events=10_000, say")
            state.change.begin()
            return state.log.fetch()

    def published(self) -> list[Event]:
        """Return what the index offers, as `stored` events: where a router begins. O(tokens)."""
        with self._state.lock:
            return list(self._state.index.published())
