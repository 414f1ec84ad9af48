"""Damage to the files of a `DiskStore`: flipped bits, and directories that are not as they were."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from kvpager.storage.tiers.disk.segments import PAGE_BYTES
from kvpager.storage.tiers.disk.slot_table import RECORD_BYTES
from kvpager.storage.tiers.frame import FRAME_BYTES
from kvpager.storage.tiers.protocol import Loaded, Saved
from tests.support.disk_campaign import (
    BLOCK_BYTES,
    NEVER,
    NUM_KEYS,
    NUM_SLOTS,
    SLOT_BYTES,
    Tally,
    audit,
    block_of,
    fill,
    opened,
)  # fmt: skip

_KEY_AT = 32  # where a frame has its key


def places(folder: Path) -> dict[bytes, tuple[Path, int]]:
    """Return the file and the offset of each key's slot, by the frames on disk."""
    found = {}
    for path in sorted(folder.glob("segment-*")):
        with path.open("rb") as file:
            for start in range(0, path.stat().st_size - SLOT_BYTES + 1, SLOT_BYTES):
                file.seek(start + _KEY_AT)
                found[file.read(32)] = path, start
    return found


def flip(path: Path, offset: int, bit: int) -> None:
    """Flip a bit of a file."""
    file = os.open(path, os.O_RDWR)
    value = os.pread(file, 1, offset)[0] ^ 1 << bit
    os.pwrite(file, bytes([value]), offset)
    os.fdatasync(file)
    os.close(file)


def flips(folder: Path, count: int, seed: int) -> Iterator[tuple[bool, bool]]:
    """Flip single bits of frames and blocks: yield whether the block was refused, and is back."""
    fill(folder)
    chosen, store = random.Random(seed), opened(folder)
    buffer = memoryview(np.empty(BLOCK_BYTES, np.uint8))
    where = places(folder)
    for _ in range(count):
        key = chosen.choice(list(where))
        path, start = where[key]
        inside = FRAME_BYTES if chosen.random() < 0.3 else 0
        offset = chosen.randrange(inside) if inside else PAGE_BYTES + chosen.randrange(BLOCK_BYTES)
        flip(path, start + offset, chosen.randrange(8))
        refused = store.load([key], [buffer], NEVER)[0] == Loaded.BAD
        # One slot is free: the block goes where it was.
        back = store.save([key], [block_of(key)], NEVER)[0] == Saved.SAVED
        yield refused, back
    store.close()


# ------------------------------------------------------------------ damaged directories


def _segment(folder: Path, chosen: random.Random) -> Path:
    return chosen.choice(sorted(folder.glob("segment-*")))


def _cut(path: Path, chosen: random.Random) -> None:
    os.truncate(path, chosen.randrange(path.stat().st_size))


def _zero_sectors(path: Path, chosen: random.Random) -> None:
    with path.open("r+b") as file:
        for _ in range(50):
            file.seek(512 * chosen.randrange(path.stat().st_size // 512))
            file.write(bytes(512))


def _swap(path: Path, size: int, chosen: random.Random) -> None:
    """Swap two pieces of `size` bytes."""
    data = bytearray(path.read_bytes())
    one, other = (size * place for place in chosen.sample(range(len(data) // size), 2))
    data[one : one + size], data[other : other + size] = (
        data[other : other + size],
        data[one : one + size],
    )
    path.write_bytes(data)


def _flip_any(path: Path, chosen: random.Random) -> None:
    flip(path, chosen.randrange(path.stat().st_size), chosen.randrange(8))


def _replace(path: Path, chosen: random.Random) -> None:
    path.write_bytes(chosen.randbytes(path.stat().st_size))


DAMAGE: dict[str, Callable[[Path, Path, random.Random], object]] = {
    "a bit of the table": lambda new, old, r: _flip_any(new / "slots", r),
    "the table cut short": lambda new, old, r: _cut(new / "slots", r),
    "records swapped": lambda new, old, r: _swap(new / "slots", RECORD_BYTES, r),
    "the table of yesterday": lambda new, old, r: shutil.copy(old / "slots", new),
    "no table": lambda new, old, r: (new / "slots").unlink(),
    "a segment cut short": lambda new, old, r: _cut(_segment(new, r), r),
    "sectors zeroed": lambda new, old, r: _zero_sectors(_segment(new, r), r),
    "slots swapped": lambda new, old, r: _swap(_segment(new, r), SLOT_BYTES, r),
    "the segment of another directory": lambda new, old, r: shutil.copy(_segment(old, r), new),
    "no segment": lambda new, old, r: _segment(new, r).unlink(),
    "noise in a segment": lambda new, old, r: _replace(_segment(new, r), r),
    "a bit of the format file": lambda new, old, r: _flip_any(new / "kvpager-disk.json", r),
    "the format file cut short": lambda new, old, r: _cut(new / "kvpager-disk.json", r),
}


def damaged(folder: Path, kind: str, count: int, seed: int) -> Tally:
    """Damage a directory `count` times and open it. `folder` keeps the templates."""
    chosen, tally = random.Random(seed), Tally()
    old, new, work = (folder / name for name in ("old", "new", "work"))
    if not new.exists():
        fill(old)
        shutil.copytree(old, new)
        fill(new, first=NUM_SLOTS // 2)
    for _ in range(count):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(new, work)
        DAMAGE[kind](work, old, chosen)
        tally.add(*audit(work))
        # What was refused is gone, and the store is as good as before.
        fill(work, first=chosen.randrange(NUM_KEYS - NUM_SLOTS))
        assert audit(work)[0] == NUM_SLOTS
    return tally
