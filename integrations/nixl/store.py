"""`NixlStore`: cached blocks in files and objects that NVIDIA NIXL reads and writes."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping, Sequence

import numpy as np

from kvpager import _validate as arguments
from kvpager.integrations.nixl.agent import open_agent
from kvpager.integrations.nixl.jobs import Read, Slots, Write
from kvpager.integrations.nixl.mover import Mover
from kvpager.integrations.nixl.places import FilePlace, ObjectPlace, Place
from kvpager.storage.keys import KEY_BYTES
from kvpager.storage.tiers.checks import blocks_in, check_blocks
from kvpager.storage.tiers.counters import StoreCounters
from kvpager.storage.tiers.disk.segments import slot_bytes
from kvpager.storage.tiers.frame import Framing
from kvpager.storage.tiers.keyed import KNOWN, KeyedTier
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.losses import Losses
from kvpager.storage.tiers.protocol import Loaded, Outcomes, Saved, StoreStats
from kvpager.storage.tiers.seals import Seal

_OPEN_S = 30.0


class NixlStore:
    """Blocks that NIXL moves, private to this process. Any thread may call any method.

    A backend for files, such as POSIX, keeps blocks in one preallocated file without a name. The
    file is gone when the process ends, however it ends. A backend for objects, such as OBJ (S3),
    keeps one object for each slot. Objects stay; a later store of the same path overwrites them,
    and never reads what it did not write.

    A late transfer keeps its slot until it has ended. A block whose transfer failed is dropped.

    Attributes:
        losses: the keys that were evicted, dropped, damaged or late.
    """

    name = "nixl"
    is_private = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        capacity: int | str,
        *,
        layout: BlockLayout,
        seal: Seal | None = None,
        backend: str = "POSIX",
        options: Mapping[str, str] | None = None,
    ) -> None:
        """Open the store, and write and read one block to see that it works. O(capacity).

        Args:
            path: a directory for the file, made if there is none; for objects, what their names
                begin with. Give each process its own.
            capacity: bytes, or a text such as "200GiB". Each block takes a page of 4 KiB more.
            layout: the layout of the blocks.
            seal: what protects them, `Digest()` unless given.
            backend: NIXL's name of it.
            options: the parameters of the backend, such as `{"use_uring": "true"}`.

        Raises: `ValueError`, `TypeError` for a bad argument; `ModuleNotFoundError` without NIXL;
        `OSError` for a path or a backend that does not work, or a disk without the room.
        """
        self._framing = Framing(layout, seal)
        each = slot_bytes(layout.block_bytes)
        num_slots = arguments.count("capacity in blocks", blocks_in(capacity, each))
        agent = open_agent(backend, options or {})
        kinds = agent.get_backend_mem_types(backend)
        place: Place
        if any(kind.startswith("FILE") for kind in kinds):
            place = FilePlace(path, num_slots, each)
        elif any(kind.startswith("OBJ") for kind in kinds):
            place = ObjectPlace(os.fspath(path), num_slots, each)
        else:
            raise ValueError(f"backend={backend!r}: it keeps neither files nor objects. Use POSIX")
        self._tier, self.losses = KeyedTier(num_slots), Losses()
        self._slots = Slots(self._tier, self._framing, self.losses)
        self._counters = StoreCounters(layout.block_bytes)
        self._mover = Mover(agent, backend, place, each)
        if not (self._works() or (place.use_page_cache() and self._works())):
            self.close()
            raise OSError(f"path={os.fspath(path)!r}: NIXL's {backend} cannot write and read there")

    @property
    def block_bytes(self) -> int:
        return self._framing.layout.block_bytes

    def find(self, keys: Sequence[bytes]) -> int:
        return self._tier.find(keys)

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview], deadline: float) -> Outcomes:
        check_blocks("into", keys, into, self.block_bytes)
        start = time.monotonic()
        outcomes: Outcomes = np.full(len(keys), Loaded.MISS, np.uint8)
        self._mover.reap()
        pinned = self._tier.pin(keys)
        asked = np.flatnonzero(pinned >= 0).tolist()
        jobs = [Read(self._slots, int(pinned[n]), keys[n], into[n].cast("B")) for n in asked]
        rest = Loaded.LATE if self._mover.run(jobs, deadline) else Loaded.MISS
        outcomes[asked] = [rest if job.outcome is None else job.outcome for job in jobs]
        self._counters.loaded(outcomes, time.monotonic() - start)
        return outcomes

    def save(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], deadline: float
    ) -> Outcomes:
        check_blocks("blocks", keys, blocks, self.block_bytes)
        start = time.monotonic()
        if start >= deadline:
            outcomes: Outcomes = np.full(len(keys), Saved.LATE, np.uint8)
        else:
            outcomes = self._save(keys, blocks, deadline)
        self._counters.saved(outcomes, time.monotonic() - start)
        return outcomes

    def _save(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], deadline: float
    ) -> Outcomes:
        self._mover.reap()  # frees slots
        reserved, evicted = self._tier.reserve(keys, partly=True)
        self._counters.evicted(len(evicted))
        self.losses.add(key for key, _ in evicted)
        outcomes: Outcomes = np.full(len(keys), Saved.REFUSED, np.uint8)
        outcomes[reserved == KNOWN] = Saved.KNOWN
        new = np.flatnonzero(reserved >= 0).tolist()
        jobs = [Write(self._slots, int(reserved[n]), keys[n], blocks[n].cast("B")) for n in new]
        rest = Saved.LATE if self._mover.run(jobs, deadline) else Saved.REFUSED
        outcomes[new] = [rest if job.outcome is None else job.outcome for job in jobs]
        return outcomes

    def drop(self, keys: Sequence[bytes]) -> bool:
        self._slots.discard(self._tier.pin(keys).tolist())
        return True

    def stats(self) -> StoreStats:
        return self._counters.stats(self._tier.num_ready, self._tier.num_slots)

    def close(self) -> None:
        """Wait up to 10 s for transfers, and release the memory and the file."""
        self._tier.close()
        self._mover.close()

    def _works(self) -> bool:
        """Write and read a block, without a trace in the statistics."""
        key, block = secrets.token_bytes(KEY_BYTES), memoryview(bytearray(self.block_bytes))
        deadline = time.monotonic() + _OPEN_S
        write = Write(self._slots, int(self._tier.reserve([key]).slots[0]), key, block)
        self._mover.run([write], deadline)
        if write.outcome != Saved.SAVED:
            return False
        read = Read(self._slots, int(self._tier.pin([key])[0]), key, block)
        self._mover.run([read], deadline)
        self.drop([key])
        return read.outcome == Loaded.HIT
