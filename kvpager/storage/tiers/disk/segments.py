"""The files that hold blocks: slots of whole pages, at places that never move.

Files are preallocated, so a full disk shows when a file is made and not in the middle of a block.
With O_DIRECT a block goes from the device into the caller's memory, if that starts at a page and
holds whole pages. Otherwise the block passes through a buffer of the thread. File systems without
O_DIRECT are read and written through the page cache.

Small blocks that lie side by side are read by one call: each call costs a wait for the device.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

PAGE_BYTES = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux only
_NAME = "segment-{:05d}"
_RUN_BYTES = 1 << 20  # read by one call: more is hardly faster, and ends later after a deadline
_Transfer = Callable[[int, list[memoryview], int], int]  # os.preadv or os.pwritev


def slot_bytes(block_bytes: int) -> int:
    """Return the bytes of a slot: a page for the frame, and the pages of a block. O(1)."""
    return PAGE_BYTES + -(-block_bytes // PAGE_BYTES) * PAGE_BYTES


class Segments:
    """Slots in files. All methods but `grow` and `close` may run in several threads at once."""

    def __init__(self, folder: Path, num_slots: int, slots_per_file: int, block_bytes: int) -> None:
        """Open the segments in `folder`; make none. Raises: `OSError`.

        `intact` are the slots that the files found hold whole. `num_slots` bounds `grow`.
        """
        self.slot_bytes = slot_bytes(block_bytes)
        self._folder, self._slots_per_file, self._block_bytes = folder, slots_per_file, block_bytes
        self._num_slots = num_slots
        self._run_max = max(1, _RUN_BYTES // (self.slot_bytes - PAGE_BYTES))
        self._files: list[int] = []
        self._direct = bool(_DIRECT)
        self._staging = threading.local()
        self.num_made = 0
        self.intact: set[int] = set()
        try:
            self._open_found()
        except BaseException:
            self.close()
            raise

    def grow(self) -> range:
        """Make room for more slots, as many as one file holds. Returns the new slots. O(1).

        The range is empty once there are `num_slots`. Raises: `OSError` if the disk is full.
        """
        first = self.num_made
        number = first // self._slots_per_file
        stop = min((number + 1) * self._slots_per_file, self._num_slots)
        if stop <= first:
            return range(0)
        if number == len(self._files):
            self._files.append(self._open(number))
        file = self._files[number]
        before = os.fstat(file).st_size
        try:
            os.posix_fallocate(file, 0, (stop - number * self._slots_per_file) * self.slot_bytes)
        except OSError:
            os.ftruncate(file, before)  # free the part that was allocated
            raise
        self.num_made = stop
        return range(first, stop)

    def run(self, slots: Sequence[int | None]) -> list[int]:
        """Return the leading slots that one call can read, until None. O(slots).

        They lie side by side in one file, in either direction.
        """
        run = list[int]()
        for slot in slots[: self._run_max]:
            if slot is None or not self._continues(run, slot):
                break
            run.append(slot)
        return run

    def _continues(self, run: Sequence[int], slot: int) -> bool:
        if not run:
            return True
        step = slot - run[-1]
        is_straight = len(run) == 1 or step == run[-1] - run[-2]
        return abs(step) == 1 and is_straight and self._file(slot) == self._file(run[0])

    def read(self, run: Sequence[int], blocks: Sequence[memoryview]) -> list[memoryview]:
        """Read the slots of a run, each into its block. O(bytes).

        Returns the first page of each slot, in a buffer of the thread. Raises: `OSError` if not all
        can be read whole.
        """
        buffers = self._buffers()[: len(run)]
        targets = [
            block if self._fits(block) else staged
            for block, (_, staged) in zip(blocks, buffers, strict=True)
        ]
        heads = [head for head, _ in buffers]
        order = sorted(range(len(run)), key=run.__getitem__)
        file, start = self._place(min(run))
        parts = [part for index in order for part in (heads[index], targets[index])]
        self._transfer(os.preadv, file, parts, start)
        for block, target in zip(blocks, targets, strict=True):
            if target is not block:
                block[:] = target[: self._block_bytes]
        return heads

    def write(self, slot: int, frame: bytes, payload: memoryview) -> None:
        """Write the frame and the bytes of a block. O(bytes).

        Raises: `OSError` unless all were written.
        """
        head, staged = self._buffers()[0]
        head[: len(frame)] = frame
        head[len(frame) :] = bytes(PAGE_BYTES - len(frame))
        if not self._fits(payload):
            staged[: self._block_bytes] = payload
            payload = staged
        file, start = self._place(slot)
        self._transfer(os.pwritev, file, [head, payload], start)

    def sync(self) -> None:
        """Wait until the device has all blocks. Raises: `OSError`."""
        for file in self._files:
            os.fdatasync(file)

    def close(self) -> None:
        """Close the files. Twice is the same as once."""
        while self._files:
            os.close(self._files.pop())

    def _open_found(self) -> None:
        found = {path.name for path in self._folder.glob("segment-*")}
        needed = [_NAME.format(n) for n in range(-(-self._num_slots // self._slots_per_file))]
        for name in found.difference(needed):  # of a larger capacity
            (self._folder / name).unlink()
        last = max((n for n, name in enumerate(needed) if name in found), default=-1)
        for number in range(last + 1):
            file = self._open(number)
            self._files.append(file)
            first = number * self._slots_per_file
            most = min(self._slots_per_file, self._num_slots - first)
            if os.fstat(file).st_size > most * self.slot_bytes:
                os.ftruncate(file, most * self.slot_bytes)
            whole = os.fstat(file).st_size // self.slot_bytes
            self.intact.update(range(first, first + whole))
            if number < last:  # a missing or short file in the middle
                os.posix_fallocate(file, 0, most * self.slot_bytes)
            self.num_made = first + (most if number < last else whole)

    def _open(self, number: int) -> int:
        path, flags = self._folder / _NAME.format(number), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        if self._direct:
            try:
                return os.open(path, flags | _DIRECT, 0o600)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct = False
        return os.open(path, flags, 0o600)

    def _transfer(self, call: _Transfer, file: int, buffers: list[memoryview], start: int) -> None:
        try:
            moved = call(file, buffers, start)
        except OSError as error:
            # Some file systems accept O_DIRECT for a file, and then refuse each transfer.
            flags = fcntl.fcntl(file, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & _DIRECT:
                raise
            fcntl.fcntl(file, fcntl.F_SETFL, flags & ~_DIRECT)
            moved = call(file, buffers, start)
        if moved != sum(buffer.nbytes for buffer in buffers):
            raise OSError(errno.EIO, "a slot was transferred in part")

    def _file(self, slot: int) -> int:
        return slot // self._slots_per_file

    def _place(self, slot: int) -> tuple[int, int]:
        number, place = divmod(slot, self._slots_per_file)
        return self._files[number], place * self.slot_bytes

    def _fits(self, block: memoryview) -> bool:
        """Return True if the buffer holds whole pages, and O_DIRECT, if used, takes it as it is."""
        if block.nbytes % PAGE_BYTES:
            return False
        if not self._direct:
            return True
        address: int = np.frombuffer(block, np.uint8).__array_interface__["data"][0]
        return address % PAGE_BYTES == 0

    def _buffers(self) -> list[tuple[memoryview, memoryview]]:
        """Return the thread's buffers for a run: a page and a block each. All start at a page."""
        buffers: list[tuple[memoryview, memoryview]] | None
        buffers = getattr(self._staging, "buffers", None)
        if buffers is None:
            whole = memoryview(mmap.mmap(-1, self._run_max * self.slot_bytes))
            starts = range(0, whole.nbytes, self.slot_bytes)
            slots = [whole[start : start + self.slot_bytes] for start in starts]
            buffers = [(slot[:PAGE_BYTES], slot[PAGE_BYTES:]) for slot in slots]
            self._staging.buffers = buffers
        return buffers
