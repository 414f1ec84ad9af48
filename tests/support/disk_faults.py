"""Faults to plant in a `DiskStore`: the campaigns must find them where frames are not checked."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from kvpager.storage.tiers.disk import DiskStore
from kvpager.storage.tiers.disk.segments import Segments
from kvpager.storage.tiers.disk.slot_table import Record, SlotTable
from kvpager.storage.tiers.disk.slots import Slots
from kvpager.storage.tiers.frame import Framing


def _record_first() -> Any:
    """Write the record before the block."""
    reserve = DiskStore._reserve

    def reserved(store: Any, key: bytes) -> Any:
        refusal, slot = reserve(store, key)
        if refusal is None:
            store._table.write(slot, Record(key, 1, 1))
        return refusal, slot

    return mock.patch.object(DiskStore, "_reserve", reserved)


def _record_elsewhere() -> Any:
    """Write the record of the slot before."""
    write = SlotTable.write
    return mock.patch.object(
        SlotTable, "write", lambda table, slot, record: write(table, max(0, slot - 1), record)
    )


@contextmanager
def _readers_ignored() -> Iterator[None]:
    """Evict blocks that are being read."""
    first = mock.patch.object(Slots, "victim", lambda slots: next(iter(slots.items()), None))
    with first, _readers_forgotten():
        yield


def _readers_forgotten() -> Any:
    """Free a slot whose block was forgotten, readers or not."""
    return mock.patch.object(Slots, "free", lambda slots, slot: slots._free.append(slot))


def _used_slots_free() -> Any:
    """Count slots as free, when the store is opened, that hold blocks."""
    restore = DiskStore._restore

    def restored(store: Any) -> None:
        restore(store)
        store._slots._free += list(store._slots._ready.values())[:8]

    return mock.patch.object(DiskStore, "_restore", restored)


def _half_written() -> Any:
    """Offer blocks of which only the first half was written."""
    write = Segments.write

    def half(segments: Any, slot: int, frame: bytes, payload: memoryview) -> None:
        if random.random() < 0.2:
            with mock.patch("os.pwritev", _first_half(os.pwritev)):
                try:
                    write(segments, slot, frame, payload)
                except OSError:
                    return
        else:
            write(segments, slot, frame, payload)

    return mock.patch.object(Segments, "write", half)


def _first_half(call: Any) -> Any:
    def half(file: int, buffers: Sequence[memoryview], start: int) -> int:
        head, payload = buffers
        written: int = call(file, [head, payload[: payload.nbytes // 2]], start)
        return written

    return half


def _slots_shifted() -> Any:
    """Read the slot after the one that was asked for."""
    read = Segments.read

    def shifted(segments: Any, run: Sequence[int], blocks: Sequence[memoryview]) -> Any:
        others = [(slot + 1) % segments.num_made for slot in run]
        each = zip(others, blocks, strict=True)
        return [bytes(read(segments, [slot], [block])[0]) for slot, block in each]

    return mock.patch.object(Segments, "read", shifted)


FAULTS: dict[str, Callable[[], Any]] = {
    "records of evicted blocks stay": lambda: mock.patch.object(SlotTable, "erase"),
    "the record is written first": _record_first,
    "the record is that of another slot": _record_elsewhere,
    "blocks with readers are evicted": _readers_ignored,
    "forgotten slots are free at once": _readers_forgotten,
    "slots in use are free after opening": _used_slots_free,
    "half a block is offered": _half_written,
    "another slot is read": _slots_shifted,
}


@contextmanager
def planted(fault: str, *, verify: bool = True) -> Iterator[None]:
    """Plant a fault of `FAULTS`, or none; without `verify` frames are not checked."""
    unframe = Framing.unframe if verify else lambda *_: None
    with mock.patch.object(Framing, "unframe", unframe):
        if fault:
            with FAULTS[fault]():
                yield
        else:
            yield
