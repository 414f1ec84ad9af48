"""Crashes of processes that use a `DiskStore`: what it serves is right, or it serves nothing.

A child process saves, loads and drops blocks in a full store, and kills itself with SIGKILL within
a random write. Writes are made in pieces of 16 KiB, so a block may be torn. Then the store is
opened again, and every block that it serves is compared.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from hashlib import blake2b, shake_128
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from kvpager.storage.tiers.disk import DiskStore
from kvpager.storage.tiers.disk.segments import PAGE_BYTES
from kvpager.storage.tiers.disk.slot_table import RECORD_BYTES
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.protocol import Loaded
from tests.support.disk_faults import planted

BLOCK_BYTES, NUM_SLOTS, NUM_KEYS = 1 << 16, 96, 400
SLOT_BYTES = PAGE_BYTES + BLOCK_BYTES
LAYOUT = BlockLayout("campaign", BLOCK_BYTES)
NEVER = math.inf
_PIECE_BYTES = 1 << 14
_WRONG = 3  # exit code of a child that was served wrong bytes


def key_of(number: int) -> bytes:
    return blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


@cache
def block_of(key: bytes) -> memoryview:
    return memoryview(shake_128(key).digest(64) * (BLOCK_BYTES // 64))


KEYS = [key_of(number) for number in range(NUM_KEYS)]


def opened(folder: Path) -> DiskStore:
    capacity = NUM_SLOTS * (SLOT_BYTES + RECORD_BYTES)
    return DiskStore(folder, capacity, layout=LAYOUT, admit="always")


def fill(folder: Path, first: int = 0) -> None:
    """Fill the store in `folder` with blocks, from key number `first`."""
    store = opened(folder)
    keys = KEYS[first : first + NUM_SLOTS]
    assert set(store.save(keys, [block_of(key) for key in keys], NEVER)) <= {0, 1}
    store.close()


# ------------------------------------------------------------------ what is counted


@dataclass
class Tally:
    """Blocks offered and served after `runs` runs.

    `least`: fewest that were offered in a run. `returned`: dropped ones that were offered.
    """

    runs: int = 0
    offered: int = 0
    served: int = 0
    wrong: int = 0
    bad: int = 0
    least: int = NUM_SLOTS
    returned: int = 0

    def add(self, offered: int, served: int, wrong: int, bad: int) -> None:
        self.runs += 1
        self.offered += offered
        self.served += served
        self.wrong += wrong
        self.bad += bad
        self.least = min(self.least, offered)


def num_offered(folder: Path, keys: Iterable[bytes]) -> int:
    """Open the store: how many of the keys it offers."""
    store = opened(folder)
    offered = sum(store.find([key]) for key in keys)
    store.close()
    return offered


def audit(folder: Path) -> tuple[int, int, int, int]:
    """Open the store: how many blocks it offers, serves, serves wrongly, and found bad."""
    store = opened(folder)
    offered = store.stats().num_blocks
    served, wrong = check_all(store, KEYS)
    bad = store.stats().bad
    store.close()
    return offered, served, wrong, bad


def check_all(store: DiskStore, keys: Sequence[bytes]) -> tuple[int, int]:
    """Load keys one by one: how many are served, and how many of them wrongly."""
    buffer = memoryview(np.empty(BLOCK_BYTES, np.uint8))
    served = wrong = 0
    for key in keys:
        if store.load([key], [buffer], NEVER)[0] == Loaded.HIT:
            served += 1
            wrong += buffer != block_of(key)
    return served, wrong


# ------------------------------------------------------------------ crashes


def crashes(
    folder: Path, kills: int, seed: int, fault: str = "", *, verify: bool = True
) -> Iterator[Tally]:
    """Kill `kills` processes that use the store in `folder`; yield the tally after each."""
    processes = multiprocessing.get_context("forkserver")
    chosen, tally = random.Random(seed), Tally()
    fill(folder)
    for run in range(kills):
        last_write = int(2 ** chosen.uniform(0, 11))
        arguments = (folder, chosen.getrandbits(32), last_write, 1 + run % 2)
        process = processes.Process(target=_use, args=(*arguments, fault, verify))
        process.start()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, _WRONG), process.exitcode
        with planted(fault, verify=verify):
            offered, served, wrong, bad = audit(folder)
        tally.add(offered, served, wrong + (process.exitcode == _WRONG), bad)
        yield tally


def _use(
    folder: Path, seed: int, last_write: int, num_threads: int, fault: str, verify: bool
) -> None:
    """Use the store until the process is killed within write `last_write`, or is served wrongly."""
    signal.alarm(120)  # ends a child that writes nothing
    with planted(fault, verify=verify), _in_pieces(last_write), _interrupted_reads():
        store = opened(folder)
        threads = [
            threading.Thread(target=_work, args=(store, random.Random(seed + number)))
            for number in range(num_threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _work(store: DiskStore, chosen: random.Random) -> None:
    try:
        _use_for_ever(store, chosen)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _use_for_ever(store: DiskStore, chosen: random.Random) -> None:
    while True:
        key = chosen.choice(KEYS)
        store.save([key], [block_of(key)], NEVER)
        for key in chosen.choices(KEYS, k=2):
            if chosen.random() < 0.05:
                _before_read.call = partial(_overwrite, store, key, chosen)
            if check_all(store, [key])[1]:
                os._exit(_WRONG)


def _overwrite(store: DiskStore, key: bytes, chosen: random.Random) -> None:
    """Save blocks that would take the slot of `key`, were it not being read."""
    others = [other for other in chosen.sample(KEYS, NUM_SLOTS + 8) if other != key]
    if chosen.random() < 0.5:
        store.drop([key])
        others = others[:1]
    for other in others:
        store.save([other], [block_of(other)], NEVER)


_before_read = threading.local()


@contextmanager
def _interrupted_reads() -> Iterator[None]:
    """Call what a thread has put into `_before_read` before its next read."""
    preadv = os.preadv

    def read(file: int, buffers: Any, start: int) -> int:
        call = _before_read.__dict__.pop("call", None)
        if call is not None:
            call()
        return preadv(file, buffers, start)

    with mock.patch("os.preadv", read):
        yield


@contextmanager
def _in_pieces(last: int) -> Iterator[None]:
    """Make each write in pieces; kill the process before piece number `last`."""
    pwrite, lock, written = os.pwrite, threading.Lock(), 0

    def piece(file: int, data: Any, start: int) -> int:
        nonlocal written
        with lock:
            written += 1
            if written >= last:
                os.kill(os.getpid(), signal.SIGKILL)
        return pwrite(file, data, start)

    def pieces(file: int, buffers: Sequence[Any], start: int) -> int:
        total = 0
        for buffer in map(memoryview, buffers):
            for at in range(0, buffer.nbytes, _PIECE_BYTES):
                total += piece(file, buffer[at : at + _PIECE_BYTES], start + total)
        return total

    with mock.patch("os.pwrite", piece), mock.patch("os.pwritev", pieces):
        yield
