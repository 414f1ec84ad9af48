"""Records the pool of a patch: a step for each forward pass of its rows."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable
from os import PathLike

from kvpager.blocks.changes import ManagerChanges
from kvpager.blocks.manager import BlockManager
from kvpager.blocks.sequences import SequenceHandle
from kvpager.integrations.huggingface.cache.generate_calls import GenerateCalls
from kvpager.plans import Reason
from kvpager.recording.recorder import Described, Recorder
from kvpager.scheduling.progress import RequestChanges


class PoolRecorder:
    """Records one pool at a time: the first one, and the next one once that is freed.

    Pools are freed with their last cache, unless they keep prompts. The caller holds the lock of
    all pools.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        block_size: int,
        described: Described,
        calls: GenerateCalls,
    ) -> None:
        """Open the file. O(1). Raises: `OSError`, `ValueError` as `RecordingWriter`."""
        self._nothing = BlockManager(1, block_size)  # recorded if there is no pool
        self._recorder = Recorder.open(path, self._nothing, described, RowRequests(calls))
        self._manager: weakref.ref[BlockManager] | None = None

    def step(self, manager: BlockManager) -> None:
        """Record that rows of a pool got slots. O(changes). Never raises."""
        followed = None if self._manager is None else self._manager()
        if followed is None:
            self._manager = weakref.ref(manager)
            self._recorder.follow(manager)
        elif followed is not manager:
            return
        self._recorder.step()

    def close(self) -> None:
        """Record what is left, and close the file. Idempotent."""
        if self._manager is None or self._manager() is None:
            self._recorder.follow(self._nothing)
        self._recorder.close()


class RowRequests:
    """Each row of a call counts as a request, which has the number of its sequence."""

    def __init__(self, calls: GenerateCalls) -> None:
        self._calls = calls
        self._owners: dict[SequenceHandle, int] = {}

    def look(
        self, ended: Iterable[tuple[Hashable, Reason]], changes: ManagerChanges
    ) -> RequestChanges:
        """Return the rows that began and those that ended. O(changes)."""
        call = self._calls.current()
        longest = 0 if call is None else call.num_columns
        lengths = {number: length for number, _, length in changes.lengths}
        lengths.update(dict.fromkeys(changes.grown, 1))  # of sequences that begin
        self._owners = {each.sequence: each.number for each in changes.begun}
        arrived = []
        for number in self._owners.values():
            length = lengths.get(number, 0)
            arrived.append((number, length, max(longest - length, 1), 1))
        states = [(number, Reason.FINISHED.value) for number in changes.ended]
        return RequestChanges(arrived, states + [(number, "running") for number, *_ in arrived])

    def owners(self) -> dict[SequenceHandle, int]:
        """Return the requests of the sequences that began at the last look. O(1)."""
        return self._owners

    def handle(self, seq_id: int) -> SequenceHandle | None:
        """Return None: there are no plans."""
        return None
