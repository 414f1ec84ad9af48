"""Moves slots between memory and a place, through NIXL.

NIXL cannot take back a transfer. A late one keeps its buffer and its slot until NIXL says that it
has ended. So no transfer touches the caller's memory: bytes pass through buffers.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kvpager.integrations.nixl.places import Place

logger = logging.getLogger("kvpager")

_AT_ONCE = 8  # transfers of a call
_BUFFERS_MAX, _BUFFER_BYTES_MAX = 64, 64 << 20
_PAUSE_S = 1e-4  # between two looks at a transfer: NIXL has no call that waits
_CLOSE_S = 10.0


class Job(Protocol):
    """A slot to read or to write, and what follows. Just one of `end` and `give_up` is called."""

    slot: int
    operation: str  # "READ" or "WRITE"

    def begin(self, buffer: memoryview) -> None:
        """Prepare the buffer for the transfer."""

    def end(self, buffer: memoryview, moved: bool) -> None:
        """Use the buffer after the transfer, and release the slot.

        `moved`: NIXL says that all bytes were moved.
        """

    def give_up(self) -> None:
        """Release the slot: the transfer did not begin, or it was late and has ended now."""


@dataclass(slots=True)
class _Transfer:
    job: Job
    buffer: memoryview
    handle: Any  # None if NIXL refused it
    state: str = "PROC"


class Mover:
    """Carries out jobs. All methods may be called from any thread."""

    def __init__(self, agent: Any, backend: str, place: Place, slot_bytes: int) -> None:
        """Register buffers and the place with the agent. Closes the place if that fails.

        Raises: `OSError` if NIXL refuses them.
        """
        self._agent, self._backends, self._place = agent, [backend], place
        count = max(2, min(_BUFFERS_MAX, _BUFFER_BYTES_MAX // slot_bytes))
        memory = mmap.mmap(-1, count * slot_bytes)  # starts at a page, for direct I/O
        whole = memoryview(memory)
        self._buffers = [whole[n * slot_bytes :][:slot_bytes] for n in range(count)]
        self._num_buffers = count
        self._changed = threading.Condition()
        self._late: list[_Transfer] = []
        self._closed = self._released = False
        self._registered: list[Any] = []
        try:
            for kind, regions in (
                ("DRAM", [(_address(whole), len(whole), 0, "")]),
                (place.kind, place.registered()),
            ):
                self._registered.append(agent.register_memory(regions, kind, self._backends))
        except Exception as error:  # NIXL's errors have no common class
            self._release()
            raise OSError(f"backend={backend!r}: NIXL refused the memory ({error})") from error

    def run(self, jobs: Sequence[Job], deadline: float) -> bool:
        """Carry out jobs, in order, until the deadline. O(bytes).

        Returns False if the mover was closed meanwhile. Raises nothing of its own.
        """
        waiting, running = deque(jobs), deque[_Transfer]()
        try:
            while waiting or running:
                if waiting and len(running) < _AT_ONCE:
                    buffer = self._take(deadline, wait=not running)
                    if buffer is not None:
                        running.append(self._begin(waiting.popleft(), buffer))
                        continue
                if not running:
                    break
                self._finish(running, deadline)
        finally:
            with self._changed:
                self._late += running
            for job in waiting:
                job.give_up()
        return not self._closed

    def close(self) -> None:
        """Wait for transfers, then release memory and place. Twice is the same as once.

        What is still moving after 10 s stays allocated.
        """
        with self._changed:
            self._closed = True
        until = time.monotonic() + _CLOSE_S
        while time.monotonic() < until:
            self.reap()
            with self._changed:
                if self._released:
                    return
                if len(self._buffers) == self._num_buffers:
                    self._released = True
                    break
                self._changed.wait(_PAUSE_S)
        else:
            logger.warning("nixl: transfers did not end in %g s: their memory stays", _CLOSE_S)
            _STUCK.append(self)
            return
        self._release()

    def _take(self, deadline: float, *, wait: bool) -> memoryview | None:
        """Return a free buffer; None if it is too late, or there is none and `wait` is False."""
        while time.monotonic() < deadline:
            self.reap()
            with self._changed:
                if self._closed:
                    return None
                if self._buffers:
                    return self._buffers.pop()
                if not wait:
                    return None
                self._changed.wait(_PAUSE_S)
        return None

    def _begin(self, job: Job, buffer: memoryview) -> _Transfer:
        transfer = _Transfer(job, buffer, None)
        agent = self._agent
        try:
            job.begin(buffer)
            memory = agent.get_xfer_descs([(_address(buffer), len(buffer), 0)], "DRAM")
            place = agent.get_xfer_descs([self._place.region(job.slot)], self._place.kind)
            transfer.handle = agent.initialize_xfer(
                job.operation, memory, place, agent.name, b"", self._backends
            )
            transfer.state = agent.transfer(transfer.handle)
        except Exception as error:
            self._failed(transfer, error)
        return transfer

    def _finish(self, running: deque[_Transfer], deadline: float) -> None:
        """Wait for the first transfer. If it is late, keep it for `reap`."""
        transfer = running[0]
        while self._moves(transfer) and time.monotonic() < deadline:
            time.sleep(_PAUSE_S)
        running.popleft()
        if transfer.state == "PROC":
            with self._changed:
                self._late.append(transfer)
            return
        try:
            transfer.job.end(transfer.buffer, transfer.state == "DONE")
        finally:
            self._free(transfer)

    def reap(self) -> None:
        """End the late transfers that have ended meanwhile."""
        if not self._late:
            return
        with self._changed:
            late, self._late = self._late, []
        moving = []
        try:
            while late:
                moves = self._moves(late[-1])
                transfer = late.pop()
                if moves:
                    moving.append(transfer)
                else:
                    transfer.job.give_up()
                    self._free(transfer)
        finally:  # an interrupt must not lose a transfer
            with self._changed:
                self._late += late + moving

    def _moves(self, transfer: _Transfer) -> bool:
        if transfer.state == "PROC":
            try:
                transfer.state = self._agent.check_xfer_state(transfer.handle)
            except Exception as error:
                self._failed(transfer, error)
        return transfer.state == "PROC"

    def _failed(self, transfer: _Transfer, error: Exception) -> None:
        transfer.state = "ERR"
        job = transfer.job
        logger.warning("nixl: %s of slot %d failed: %s", job.operation, job.slot, error)

    def _free(self, transfer: _Transfer) -> None:
        if transfer.handle is not None:
            try:
                self._agent.release_xfer_handle(transfer.handle)
            except Exception as error:
                logger.warning("nixl: a transfer was not released: %s", error)
        with self._changed:
            self._buffers.append(transfer.buffer)
            self._changed.notify_all()

    def _release(self) -> None:
        try:
            while self._registered:
                self._agent.deregister_memory(self._registered.pop(), self._backends)
        except Exception as error:
            logger.warning("nixl: memory was not deregistered: %s", error)
        self._place.close()
        self._agent = None


_STUCK: list[Mover] = []  # the memory of transfers that never ended


def _address(buffer: memoryview) -> int:
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address
