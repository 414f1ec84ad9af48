"""What changed in a scheduler's requests between two looks: `scheduler.progress()`."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple

from kvpager.blocks.sequences import SequenceHandle
from kvpager.plans import Reason
from kvpager.scheduling.request import RequestState, Status
from kvpager.scheduling.request_table import RequestTable

_NAMES = {
    Status.WAITING: "queued",
    Status.RUNNING: "running",
    Status.SWAPPED: "swapped",
    Status.DROPPED: "dropped",
}
_HELD = "fetching"  # a held request waits for its blocks from a tier


class RequestChanges(NamedTuple):
    """What changed since the last look. Requests are numbered by arrival.

    Attributes:
        arrived: (request, prompt tokens, maximum new tokens, samples) of new requests.
        states: (request, state): "queued", "fetching", "running", "swapped", "dropped", or the
            reason of its end. A new request that is not listed is queued.
    """

    arrived: list[tuple[int, int, int, int]]
    states: list[tuple[int, str]]


class Progress:
    """Compares the live requests with those of the last look.

    A request that ended before it was looked at is not reported.
    """

    def __init__(self, table: RequestTable) -> None:
        self._table = table
        self._next = 0  # number of the next request to arrive
        self._numbers: dict[Hashable, int] = {}  # of the live requests
        self._states: dict[int, str] = {}
        self._held: list[RequestState] = []
        self._version = -1

    def look(
        self, ended: Iterable[tuple[Hashable, Reason]], changes: object = None
    ) -> RequestChanges:
        """Return what changed; `ended` as in `StepPlan`. O(changes + preempted + held requests).

        O(running requests) if the set of decoding sequences has changed. `changes` of the manager
        are ignored: the scheduler knows all of them.
        """
        states: list[tuple[int, str]] = []
        # No plan reports the requests that end when an engine is closed.
        for request_id, reason in [*ended, *self._table.unreported]:
            number = self._numbers.pop(request_id, None)
            if number is not None:
                del self._states[number]
                states.append((number, reason.value))
        arrived = self._arrived()
        table, moved = self._table, self._released()
        if table.version != self._version:
            self._version = table.version
            moved += table.running
        for state in [*moved, *table.preempted]:
            name = _NAMES[state.status]
            if self._states.get(state.arrival, name) != name:
                self._states[state.arrival] = name
                states.append((state.arrival, name))
        states += [(state.arrival, _HELD) for state in arrived if state.is_held]
        return RequestChanges([_described(state) for state in arrived], states)

    def _arrived(self) -> list[RequestState]:
        arrived = []
        for state in reversed(self._table.live.values()):
            if state.arrival < self._next:
                break
            arrived.append(state)
        for state in reversed(arrived):
            self._next = state.arrival + 1
            self._numbers[state.request_id] = state.arrival
            self._states[state.arrival] = _HELD if state.is_held else _NAMES[Status.WAITING]
            if state.is_held:
                self._held.append(state)
        return arrived[::-1]

    def _released(self) -> list[RequestState]:
        """Return the requests that are held no longer, and forget them."""
        held, self._held = self._held, []
        released: list[RequestState] = []
        for state in held:
            if self._table.is_live(state):
                (self._held if state.is_held else released).append(state)
        return released

    def owners(self) -> dict[SequenceHandle, int]:
        """Return the request of each sequence with blocks. O(sequences)."""
        handles = self._table.sequences.handles
        return {
            handle: state.arrival
            for state in [*self._table.running, *self._table.preempted]
            for handle in map(handles.__getitem__, state.seq_ids)
            if handle is not None
        }

    def handle(self, seq_id: int) -> SequenceHandle | None:
        """Return the handle of a sequence of a plan. O(1)."""
        return self._table.sequences.handles[seq_id]


def _described(state: RequestState) -> tuple[int, int, int, int]:
    request = state.request
    return state.arrival, len(state.prompt), request.max_new_tokens, request.n
