"""Replay of recorded traffic through a pool and the tiers below it.

The real `Tiering` fetches and saves blocks of one byte. So the hits and writes follow the rules of
an engine whose fetches always end in time, and whose staging is never full.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import wait
from contextlib import closing
from threading import Condition

import numpy as np

from kvpager import _validate as arguments
from kvpager.blocks.manager import BlockManager
from kvpager.plans import Int32
from kvpager.simulate.policies import COMPARED
from kvpager.simulate.replay import Result, TierResult, Trace
from kvpager.storage.keys import KeyContext
from kvpager.storage.tiers.admission import Admission, admission, has_free_room
from kvpager.storage.tiers.host import HostStore
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.protocol import Outcomes, Saved
from kvpager.storage.tiers.tiering import Tiering

_LAYOUT = BlockLayout("simulated", 1)
_CLEANED = 512  # blocks that are saved at once


def replay_tiers(
    trace: Trace,
    capacity: int,
    policy: str,
    tiers: Mapping[str, int],
    progress: Callable[[int], object] = lambda count: None,
) -> Result:
    """Replay `trace` in a pool of `capacity` blocks, above `tiers`: names of `TIERS`, and blocks.

    After each request its blocks are saved as an engine would, before the next one begins. A prompt
    longer than the pool counts its hits, but is not cached. `progress` is called with 1 after each
    request. O(requests * capacity + blocks * log blocks). Raises: `TypeError`, `ValueError`.
    """
    capacity = arguments.count("capacity", capacity, at_least=1)
    sizes = [arguments.count("tiers", size, at_least=1) for size in tiers.values()]
    slots = _Slots(2 * max(map(len, trace.prompts)) + _CLEANED)
    manager, tiering = _parts(trace, capacity, policy, dict(zip(tiers, sizes, strict=True)), slots)
    hits, num_loaded, too_long = 0, Counter[int](), 0
    start = time.perf_counter()
    with closing(tiering):
        for prompt in trace.prompts:
            tokens = np.append(prompt, np.int32(trace.num_prefixes))
            hits += manager.match_prefix(tokens)
            num_loaded.update(_fetch(tiering, slots, tokens))
            if len(prompt) > capacity:
                too_long += 1
            else:
                sequence = manager.allocate(tokens)
                manager.commit(sequence, len(prompt))
                manager.free(sequence)
                _save(tiering, slots)
            progress(1)
        seconds = time.perf_counter() - start
        counts = tuple(
            TierResult(store.name, size, num_loaded[number], store.stats().saved)
            for number, (store, size) in enumerate(zip(tiering.stores, sizes, strict=True))
        )
    evicted = manager.queries.num_evicted_blocks
    return Result(
        policy, capacity, hits, trace.num_blocks, evicted, too_long, seconds, tiers=counts
    )


def _parts(
    trace: Trace, capacity: int, policy: str, sizes: Mapping[str, int], slots: _Slots
) -> tuple[BlockManager, Tiering]:
    """Make the pool and its tiers."""
    # One more block, as in `replay`. A pool of twice all prefixes already evicts and saves nothing
    # ahead of time, and a tier of all prefixes is never full: more would only cost memory.
    num_blocks = min(capacity, 2 * trace.num_prefixes) + 1
    manager = BlockManager(num_blocks, 1, eviction=COMPARED[policy](num_blocks))
    stores = [
        TIERS[name](min(size, trace.num_prefixes), layout=_LAYOUT) for name, size in sizes.items()
    ]
    # `Tiering` would count the one more block, too.
    is_choosy = any(admission(store, "auto", capacity) is not None for store in stores)
    tiering = Tiering(
        manager,
        slots,
        stores,
        lambda namespace, lora: KeyContext(_LAYOUT.text, "simulated"),
        max_wait_s=arguments.SECONDS_MAX,
        admit="auto" if is_choosy else "always",
    )
    return manager, tiering


def _fetch(tiering: Tiering, slots: _Slots, tokens: Int32) -> list[int]:
    """Load what the stores have; return the number of the store that each block came from."""
    fetch = tiering.begin(tokens)
    if fetch is None:
        return []
    wait([fetch.work])
    sources = fetch.sources
    tiering.attach(fetch)
    slots.wait()
    return sources


def _save(tiering: Tiering, slots: _Slots) -> None:
    tiering.is_clean = False
    while not tiering.is_clean:
        tiering.clean(_CLEANED)
        slots.wait()


class _Disk(HostStore):
    """Takes and reports blocks as `DiskStore` does by default, but in memory."""

    name = "disk"
    is_private = False
    admit = "auto"

    def __init__(self, capacity: int, *, layout: BlockLayout) -> None:
        super().__init__(capacity, layout=layout)
        self._admission = Admission("auto", capacity)

    def save(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], deadline: float
    ) -> Outcomes:
        outcomes: Outcomes = np.full(len(keys), Saved.REFUSED, np.uint8)
        for n, key in enumerate(keys):
            is_known = self.find([key]) == 1
            if is_known or self._admission.admits(key, has_room=has_free_room(self)):
                outcomes[n] = super().save([key], [blocks[n]], deadline)[0]
        self._tier.unpin(self._tier.pin(keys))  # the last key of a call leaves first
        return outcomes


TIERS: dict[str, Callable[..., HostStore]] = {"host": HostStore, "disk": _Disk}


class _Slots:
    """A `SlotMemory` in which all slots are the same byte."""

    block_bytes = _LAYOUT.block_bytes
    store: HostStore | None = None

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._byte = memoryview(bytearray(self.block_bytes))
        self._free = list(range(num_slots))
        self._num_sharers = [0] * num_slots
        self._changed = Condition()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        with self._changed:
            slots = [self._free.pop() for _ in range(min(count, len(self._free)))]
        self.share(slots)
        return slots

    def share(self, slots: Iterable[int]) -> None:
        with self._changed:
            for slot in slots:
                self._num_sharers[slot] += 1

    def give(self, slots: Iterable[int]) -> None:
        with self._changed:
            for slot in slots:
                self._num_sharers[slot] -= 1
                if not self._num_sharers[slot]:
                    self._free.append(slot)
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when all slots are free: no thread saves blocks any more."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) == self.num_slots)

    def slot(self, number: int) -> memoryview:
        return self._byte

    def read(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        pass

    def write(self, slots: Sequence[int], blocks: Sequence[int]) -> None:
        self.give(slots)
