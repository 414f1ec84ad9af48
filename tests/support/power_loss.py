"""Power losses: of the writes since the last sync, only some sectors reach the disk."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from tests.support.disk_campaign import (
    KEYS,
    NEVER,
    Tally,
    audit,
    block_of,
    fill,
    num_offered,
    opened,
)

SECTOR_BYTES = 512


class Sector(NamedTuple):
    """A part of a file before and after a write."""

    path: str
    offset: int
    before: bytes
    after: bytes


@contextmanager
def recorded() -> Iterator[list[Sector]]:
    """Yield the sectors written since the last sync of their file, in order."""
    written, real_write, real_writev, real_sync = (
        list[Sector](),
        os.pwrite,
        os.pwritev,
        os.fdatasync,
    )

    def note(file: int, data: bytes, start: int) -> None:
        path = os.readlink(f"/proc/self/fd/{file}")
        end = start + len(data)
        with open(path, "rb") as now:
            for offset in range(start - start % SECTOR_BYTES, end, SECTOR_BYTES):
                now.seek(offset)
                before = now.read(SECTOR_BYTES)
                first, last = max(offset, start), min(offset + SECTOR_BYTES, end)
                after = bytearray(before)
                after[first - offset : last - offset] = data[first - start : last - start]
                written.append(Sector(path, offset, before, bytes(after)))

    def pwrite(file: int, data: Any, start: int) -> int:
        note(file, bytes(data), start)
        return real_write(file, data, start)

    def pwritev(file: int, buffers: Sequence[Any], start: int) -> int:
        note(file, b"".join(map(bytes, buffers)), start)
        return real_writev(file, buffers, start)

    def fdatasync(file: int) -> None:
        path = os.readlink(f"/proc/self/fd/{file}")
        real_sync(file)
        written[:] = [sector for sector in written if sector.path != path]

    with (
        mock.patch("os.pwrite", pwrite),
        mock.patch("os.pwritev", pwritev),
        mock.patch("os.fdatasync", fdatasync),
    ):
        yield written


def power_losses(folder: Path, losses: int, seed: int) -> Iterator[Tally]:
    """Lose power `losses` times while a store is used; yield the tally after each."""
    chosen, tally = random.Random(seed), Tally()
    fill(folder)
    for _ in range(losses):
        store, dropped = opened(folder), set[bytes]()
        with recorded() as written:
            for _ in range(chosen.randrange(1, 30)):
                key = chosen.choice(KEYS)
                store.save([key], [block_of(key)], NEVER)
                dropped.discard(key)
                if chosen.random() < 0.3:
                    key = chosen.choice(KEYS)
                    assert store.drop([key])
                    dropped.add(key)
            lost = list(written)
        store.close()
        _lose(lost, chosen)
        tally.returned += num_offered(folder, dropped)
        tally.add(*audit(folder))
        yield tally


def _lose(written: list[Sector], chosen: random.Random) -> None:
    """Undo what was not synced; then let some sectors arrive, each as one of its versions."""
    for path, offset, before, _ in reversed(written):
        _write(path, offset, before)
    kept = chosen.choice([0.0, 0.2, 0.5, 0.9, 1.0])
    torn = chosen.random() < 0.5  # any subset; else all up to a point
    last = chosen.randrange(len(written) + 1)
    for number, (path, offset, _, after) in enumerate(written):
        if (chosen.random() < kept) if torn else (number < last):
            _write(path, offset, after)


def _write(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
