"""`DiskStore`: blocks in preallocated files, verified when they are read."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from kvpager import _validate as arguments
from kvpager.storage.tiers.admission import Admission, Admit
from kvpager.storage.tiers.checks import blocks_in, check_blocks
from kvpager.storage.tiers.counters import StoreCounters
from kvpager.storage.tiers.disk.directory import TABLE, Directory
from kvpager.storage.tiers.disk.segments import Segments, slot_bytes
from kvpager.storage.tiers.disk.slot_table import RECORD_BYTES, Record, SlotTable
from kvpager.storage.tiers.disk.slots import Slots
from kvpager.storage.tiers.frame import FRAME_BYTES, Framing
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.losses import Losses
from kvpager.storage.tiers.protocol import Loaded, Outcomes, Saved, StoreStats
from kvpager.storage.tiers.seals import Seal

logger = logging.getLogger("kvpager")

_SEGMENT_BYTES_MIN = 256 << 20
_SEGMENTS = 64  # files of a full store: each is open
_SEGMENTS_MAX = 512  # after the capacity was raised; a process may often open 1,024 files only
# Read before any is verified: a digest pushes what the next read needs out of the core's cache.
_GROUP_BYTES = 8 << 20
_GROW_AGAIN_S = 60.0  # after the disk was full


class DiskStore:
    """Blocks in a directory that one process uses at a time.

    At most `capacity` bytes of disk are used, before and after a restart. Files are made as blocks
    arrive. If the disk is full before that, the store keeps to the files that it has. All methods
    may be called from any thread; transfers of several threads run at once. A deadline is looked at
    before each transfer of a block, or of small blocks that lie side by side: a transfer that has
    begun is finished.

    Attributes:
        admit: which blocks it takes.
        losses: the keys that were evicted, dropped, damaged or too old.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        capacity: int | str,
        *,
        layout: BlockLayout,
        seal: Seal | None = None,
        admit: Admit = "auto",
        ttl_s: float | None = None,
        name: str = "disk",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the store in the directory `path`, and make it if there is none. O(capacity).

        Blocks of another layout or kind of seal are deleted. `capacity`: bytes, or a text such as
        "200GiB". `seal`: `Digest()` unless given. `admit`: see `Admission`. Blocks are not served
        `ttl_s` seconds after they were saved, by `clock`, in seconds since 1970.
        Raises, before anything is changed: `ValueError`, `TypeError` for a bad argument, a
        directory with other files, or another secret; `OSError` for a directory that cannot be
        used or is in use.
        """
        self._framing = Framing(layout, seal)
        self.name, self._clock = name, clock
        self.losses = Losses()
        self._ttl_ms = _milliseconds(ttl_s)
        each = slot_bytes(layout.block_bytes)
        num_slots = arguments.count("capacity in blocks", blocks_in(capacity, each + RECORD_BYTES))
        each = max(_SEGMENT_BYTES_MIN // each, -(-num_slots // _SEGMENTS), 1)
        self.admit, self._admission = admit, Admission(admit, num_slots)
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)  # a transfer has ended
        self._closing = threading.RLock()  # a signal handler may close too
        self._closed = self._released = False  # no new transfers; no open files
        self._slots, self._grow_at = Slots(), -math.inf
        self._saved_ms, self._order = np.zeros((2, num_slots), np.int64)
        self._next_order, self._used = 1, set[int]()  # slots whose order is not on disk
        self._has_erased = False  # since the last sync of the table
        self._stale: dict[int, bytes] = {}  # slots of dropped keys, until the record is erased
        self._num_slots, self._counters = num_slots, StoreCounters(layout.block_bytes)
        self._directory = Directory(path, self._framing, each)
        try:
            self._open()
        except BaseException:
            self._directory.close()
            raise

    def __repr__(self) -> str:
        stats = self.stats()
        return f"<DiskStore {self._directory.path}: {stats.num_blocks} of {stats.capacity} blocks>"

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self._framing.layout.block_bytes

    def find(self, keys: Sequence[bytes]) -> int:
        """Return how many leading keys the store has. Reserves and reads nothing. O(keys)."""
        with self._lock:
            now = self._now()
            absent = (n for n, key in enumerate(keys) if not self._offers(key, now))
            return next(absent, len(keys))

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview], deadline: float) -> Outcomes:
        """Read and verify blocks, in order, into buffers. O(bytes).

        Returns a `Loaded` for each key. Buffers that start at a page and hold whole pages are read
        without a copy. Raises: `ValueError` for keys or buffers of another length.
        """
        check_blocks("into", keys, into, self.block_bytes)
        start = time.monotonic()
        outcomes = np.full(len(keys), Loaded.LATE, np.uint8)
        blocks, done = [block.cast("B") for block in into], 0
        while done < len(keys) and time.monotonic() < deadline:
            stop = done + max(_GROUP_BYTES // self.block_bytes, 1)
            found = self._load_group(keys[done:stop], blocks[done:stop], deadline)
            outcomes[done : done + len(found)] = found
            done += len(found)
        self._use(keys, self._orders(len(keys)))
        self._counters.loaded(outcomes, time.monotonic() - start)
        return outcomes

    def save(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], deadline: float
    ) -> Outcomes:
        """Keep blocks, in order. Returns a `Saved` for each key. O(bytes).

        Raises: `ValueError` for keys or buffers of another length.
        """
        check_blocks("blocks", keys, blocks, self.block_bytes)
        start, orders = time.monotonic(), self._orders(len(keys))
        outcomes = np.full(len(keys), Saved.LATE, np.uint8)
        for n, (key, block) in enumerate(zip(keys, blocks, strict=True)):
            if time.monotonic() >= deadline:
                break
            outcomes[n] = self._save(key, block.cast("B"), orders[n])
        self._use(keys, orders)
        self._counters.saved(outcomes, time.monotonic() - start)
        return outcomes

    def drop(self, keys: Sequence[bytes]) -> bool:
        """Forget blocks, if the store has them. O(keys), and one sync of the table of slots.

        No power loss brings them back. Returns False if the store is closed, or if the record of a
        block could not be erased or synced: the block is not served, but may come back when the
        store is opened again. Another call tries again.
        """
        with self._closing:  # `close` waits for the sync
            with self._lock:
                if self._closed:
                    return False
                for key in keys:
                    if key in self._slots:
                        self._forget(key)
                wanted = set(keys)
                self._erase_stale([slot for slot, key in self._stale.items() if key in wanted])
                is_erased = wanted.isdisjoint(self._stale.values())
            return self._sync_erased() and is_erased

    def stats(self) -> StoreStats:
        """Return what the store holds, and counts since it was opened. O(1)."""
        with self._lock:
            num_blocks = 0 if self._closed else len(self._slots)
        return self._counters.stats(num_blocks, self._num_slots)

    def close(self) -> None:
        """Wait for transfers, then write what is known to the device. Twice is the same as once.

        A second call finishes what was interrupted, as by a `KeyboardInterrupt`.
        """
        with self._closing:
            if self._released:
                return
            with self._lock:
                self._closed = True
                while not self._slots.is_idle:
                    self._idle.wait()
            try:
                self._erase_stale(list(self._stale))
                self._note_uses()
                for each in (self._segments, self._table, self._directory):
                    each.sync()
            except OSError as error:  # the bytes are verified when they are read
                logger.warning("%s: not all was written: %s", self._directory.path, error)
            finally:
                for each in (self._segments, self._table, self._directory):
                    each.close()
            self._released = True

    # ------------------------------------------------------------------ opening

    def _open(self) -> None:
        directory, num_slots = self._directory, self._num_slots
        if -(-num_slots // directory.slots_per_file) > _SEGMENTS_MAX:
            raise ValueError(
                f"capacity: too large for the files in {directory.path}, which a smaller capacity "
                "made. Delete the directory, or lower the capacity."
            )
        segments = Segments(directory.path, num_slots, directory.slots_per_file, self.block_bytes)
        self._segments = segments
        try:
            self._table = SlotTable(directory.path / TABLE, num_slots)
        except BaseException:
            segments.close()
            raise
        self._restore()

    def _restore(self) -> None:
        """Offer the blocks of the table again, in the order of their last uses."""
        now, records = self._now(), self._table.read()
        used = set()
        for slot, record in sorted(records.items(), key=lambda item: item[1].order):
            self._saved_ms[slot] = min(record.saved_ms, now)  # a clock that was set back
            self._order[slot] = record.order
            self._next_order = record.order + 1
            known = slot in self._segments.intact and record.key not in self._slots
            if known and not self._is_old(slot, now):
                self._slots.restore(record.key, slot)
                used.add(slot)
            elif not self._erase(slot) and slot < self._segments.num_made:
                self._stale[slot] = record.key
        used.update(self._stale)
        self._slots.add(slot for slot in range(self._segments.num_made) if slot not in used)

    # ------------------------------------------------------------------ blocks

    def _load_group(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], deadline: float
    ) -> list[Loaded]:
        """Load leading blocks, at least one, and others until the deadline."""
        slots = list[int | None]()
        try:
            with self._lock:
                now = self._now()
                for key in keys:
                    slots.append(self._slots.pin(key) if self._offers(key, now) else None)
            frames = self._read(slots, blocks, deadline)
            outcomes = list[Loaded]()
            for slot, frame, key, block in zip(slots, frames, keys, blocks, strict=False):
                if slot is None:
                    outcomes.append(Loaded.MISS)
                elif frame and self._framing.unframe(frame, key, block) is None:
                    outcomes.append(Loaded.HIT)
                else:
                    outcomes.append(Loaded.BAD)
            with self._lock:
                for slot, key, outcome in zip(slots, keys, outcomes, strict=False):
                    if outcome is Loaded.BAD and self._slots.slot(key) == slot:
                        self._forget(key)  # there was no other save since
        finally:
            with self._lock:
                for slot in slots:
                    if slot is not None:
                        self._slots.unpin(slot)
                self._idle.notify_all()
        return outcomes

    def _read(
        self, slots: Sequence[int | None], blocks: Sequence[memoryview], deadline: float
    ) -> list[bytes]:
        """Read slots into blocks until the deadline. Returns the frames that were read.

        A frame is empty if there is no slot, or if the slot cannot be read.
        """
        frames = list[bytes]()
        while len(frames) < len(slots) and (not frames or time.monotonic() < deadline):
            first = len(frames)
            run = self._segments.run(slots[first:])
            frames += self._read_run(run, blocks[first : first + len(run)]) if run else [b""]
        return frames

    def _read_run(self, run: Sequence[int], blocks: Sequence[memoryview]) -> list[bytes]:
        try:
            heads = self._segments.read(run, blocks)
        except OSError:
            if len(run) == 1:
                return [b""]
            each = zip(run, blocks, strict=True)  # one that fails does not harm the others
            return [self._read_run([slot], [block])[0] for slot, block in each]
        return [bytes(head[:FRAME_BYTES]) for head in heads]

    def _save(self, key: bytes, block: memoryview, order: int) -> Saved:
        with self._lock:
            refusal, slot = self._reserve(key)
        if refusal is not None:
            return refusal
        written, now = False, self._now()
        try:
            self._segments.write(slot, *self._framing.frame(key, block))
            self._table.write(slot, Record(key, now, order))
            written = True
        except OSError as error:
            logger.warning("%s: block not saved: %s", self._directory.path, error)
        finally:
            with self._lock:
                if written:
                    self._saved_ms[slot], self._order[slot] = now, order
                    self._slots.publish(key, slot)
                else:
                    self._slots.abandon(key, slot)
                self._idle.notify_all()
        return Saved.SAVED if written else Saved.REFUSED

    def _reserve(self, key: bytes) -> tuple[Saved | None, int]:
        """Return a slot whose record is empty, or why `key` is not to be written."""
        if self._closed:
            return Saved.REFUSED, 0
        if self._slots.is_writing(key):
            return Saved.KNOWN, 0
        if self._offers(key, self._now()):
            self._slots.touch(key)
            return Saved.KNOWN, 0
        if self._stale and not self._slots.has_free:
            self._erase_stale([next(iter(self._stale))])
        has_room = self._slots.has_free or self._grow()
        if not self._admission.admits(key, has_room=has_room):
            return Saved.REFUSED, 0
        if not has_room and not self._evict():
            return Saved.REFUSED, 0
        return None, self._slots.take(key)

    def _sync_erased(self) -> bool:
        """Wait until the device has what was erased. Returns False if that fails."""
        if not self._has_erased:
            return True
        self._has_erased = is_synced = False  # first: records may be erased meanwhile
        try:
            self._table.sync()
            is_synced = True
        except OSError as error:
            logger.warning("%s: erased records not synced: %s", self._directory.path, error)
        finally:
            if not is_synced:
                self._has_erased = True
        return is_synced

    # ------------------------------------------------------------------ under the lock

    def _offers(self, key: bytes, now: int) -> bool:
        """Return True if the store has `key`; forget a block that is too old."""
        slot = None if self._closed else self._slots.slot(key)
        if slot is None:
            return False
        if self._is_old(slot, now):
            self._forget(key)
            return False
        return True

    def _grow(self) -> bool:
        """Make more slots. Returns False if there is no more room, or the disk is full."""
        if time.monotonic() < self._grow_at:
            return False
        try:
            self._slots.add(self._segments.grow())
        except OSError as error:
            logger.warning("%s: no room for more blocks: %s", self._directory.path, error)
            self._grow_at = time.monotonic() + _GROW_AGAIN_S
        return self._slots.has_free

    def _evict(self) -> bool:
        """Free the slot of the least recently used block. Returns False if that is impossible."""
        victim = self._slots.victim()
        if victim is None:
            return False
        key, slot = victim
        if not self._erase(slot):
            self._slots.touch(key)  # it stays, and another block leaves next time
            return False
        self._slots.free(self._slots.withdraw(key))
        self.losses.add([key])
        self._counters.evicted(1)
        return True

    def _forget(self, key: bytes) -> None:
        """Stop serving a block."""
        self.losses.add([key])
        slot = self._slots.withdraw(key)
        self._stale[slot] = key
        self._erase_stale([slot])

    def _erase_stale(self, slots: list[int]) -> None:
        """Free slots whose block was dropped, if their records can be erased."""
        for slot in slots:
            if self._erase(slot):
                del self._stale[slot]
                self._slots.free(slot)
            else:
                self._stale[slot] = self._stale.pop(slot)  # to the end: next time, others first

    def _erase(self, slot: int) -> bool:
        """Empty the record of a slot. Returns False if that fails."""
        try:
            self._table.erase(slot)
            self._has_erased = True
        except OSError as error:
            logger.warning("%s: record of slot %d stays: %s", self._directory.path, slot, error)
            return False
        return True

    def _is_old(self, slot: int, now: int) -> bool:
        return self._ttl_ms is not None and bool(now - self._saved_ms[slot] >= self._ttl_ms)

    def _note_uses(self) -> None:
        """Write the order of the last uses, so that it survives a restart."""
        for key, slot in self._slots.items():
            if slot in self._used:
                record = Record(key, int(self._saved_ms[slot]), int(self._order[slot]))
                self._table.write(slot, record)

    def _orders(self, count: int) -> range:
        """Return ranks for the keys of a call, which are a prefix: the last one leaves first."""
        with self._lock:
            self._next_order += count
            return range(self._next_order - 1, self._next_order - 1 - count, -1)

    def _use(self, keys: Sequence[bytes], orders: range) -> None:
        """Make keys the most recently used. O(keys)."""
        with self._lock:
            if self._closed:  # `close` goes through the slots
                return
            for key, order in zip(reversed(keys), reversed(orders), strict=True):
                slot = self._slots.slot(key)
                if slot is not None and self._order[slot] != order:
                    self._order[slot] = order
                    self._used.add(slot)
                if slot is not None:
                    self._slots.touch(key)

    def _now(self) -> int:
        return int(self._clock() * 1000)


def _milliseconds(ttl_s: float | None) -> int | None:
    return None if ttl_s is None else int(arguments.seconds("ttl_s", ttl_s) * 1000)
