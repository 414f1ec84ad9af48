"""Records the replay of a trace: a step for each request, while it holds its blocks."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from os import PathLike

from kvpager.blocks.changes import ManagerChanges
from kvpager.blocks.manager import BlockManager
from kvpager.blocks.sequences import SequenceHandle
from kvpager.plans import Reason
from kvpager.recording.recorder import Described, Recorder
from kvpager.scheduling.progress import RequestChanges


class TraceRecorder:
    """A recorder, and the requests of a trace, one of which runs at a time.

    Raises: `OSError`, `ValueError` as `RecordingWriter`.
    """

    def __init__(self, path: str | PathLike[str], manager: BlockManager, policy: str) -> None:
        self._recorder = Recorder.open(path, manager, Described("simulate", eviction=policy), self)
        self._running: tuple[int, int, SequenceHandle] | None = None
        self._ended: int | None = None

    def step(self, number: int, num_tokens: int, sequence: SequenceHandle) -> None:
        """Record request `number`, which holds `sequence` now. O(changes)."""
        self._running = number, num_tokens, sequence
        self._recorder.step()
        self._ended, self._running = number, None

    def close(self) -> None:
        """Record the end of the last request, and close the file."""
        self._recorder.close()

    # ---------------------------------------------------------------- what a recorder asks

    def look(
        self, ended: Iterable[tuple[Hashable, Reason]], changes: ManagerChanges
    ) -> RequestChanges:
        """Return that the request before has ended, and that this one runs. O(1)."""
        states = [] if self._ended is None else [(self._ended, Reason.FINISHED.value)]
        self._ended = None
        if self._running is None:
            return RequestChanges([], states)
        number, num_tokens, _ = self._running
        return RequestChanges([(number, num_tokens, 1, 1)], [*states, (number, "running")])

    def owners(self) -> dict[SequenceHandle, int]:
        """Return the sequence of the request that runs. O(1)."""
        return {} if self._running is None else {self._running[2]: self._running[0]}

    def handle(self, seq_id: int) -> SequenceHandle | None:
        """Return None: there are no plans."""
        return None
