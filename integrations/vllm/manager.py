"""The scheduler's side: records which chunks are in host memory, and which in stores below."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpager.integrations.vllm.chunk_order import Ancestry, ChunkOrder, Seen, in_order
from kvpager.integrations.vllm.host_rows import HostRows
from kvpager.integrations.vllm.interface import (
    CacheHitSource,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadingManager,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
)
from kvpager.integrations.vllm.lower_tiers import Chunk, LowerTiers
from kvpager.integrations.vllm.places import ABSENT, ASKED, Places
from kvpager.integrations.vllm.worker import Slots
from kvpager.storage.tiers.keyed import NO_ROOM, KeyedTier, KeySlot

_IDLE_S = 0.005
# Reading a member of an enum takes longer than the rest of `lookup`.
_HIT, _MISS = LookupResult.HIT, LookupResult.MISS
_SOURCES = {"disk": CacheHitSource.DISK}


class _Request:
    """A request's use of the chunks of a tier."""

    def __init__(self, tier: KeyedTier) -> None:
        self.tier = tier
        self.used: dict[bytes, None] = {}  # stored or loaded
        self.loading = deque[list[int]]()  # the pinned slots of each load
        self.seen: Seen = {}  # keys by group and position
        self.places = Places()
        self.sources: dict[bytes, str] = {}  # the name of the store that a chunk came from
        self.looked_up: list[bytes] = []  # in this step, in host memory or in a store


class KvpagerOffloadingManager(OffloadingManager):  # type: ignore[misc]
    """Chunks by vLLM's keys in a `KeyedTier`, over stores.

    A chunk that only a store has takes three steps: one asks the stores, one reserves a slot and
    begins the load, and when it has ended the chunk is a hit. Meanwhile the request waits and
    others run.
    """

    def __init__(
        self,
        make_tier: Callable[[], KeyedTier],
        rows: HostRows,
        lower: LowerTiers | None = None,
        *,
        events: bool = False,
    ) -> None:
        """Keep chunks in `rows`, one in each slot of the tier that `make_tier` makes."""
        self._make_tier, self._rows, self._lower = make_tier, rows, lower
        self._tier = make_tier()
        self._order = ChunkOrder()
        self._writing: dict[bytes, int] = {}  # reserved slots that vLLM copies to
        self._fetching: dict[bytes, Chunk] = {}  # and those that threads load to
        self._fetched = deque[Chunk]()  # by threads, until this thread notes it
        self._waiting: dict[str, _Request] = {}  # lacked chunks in this step
        self._num_requests = 0
        self._changes = deque[tuple[bool, list[bytes]]]() if events else None

    @property
    def num_slots(self) -> int:
        """The number of chunks that host memory has room for. O(1)."""
        return self._tier.num_slots

    @property
    def lower(self) -> LowerTiers:
        """The stores below. Raises: `ValueError` if there are none."""
        if self._lower is None:
            raise ValueError("there are no stores below this host memory")
        return self._lower

    def row(self, slot: int) -> NDArray[np.uint8]:
        """Return the bytes of a slot. O(1)."""
        row: NDArray[np.uint8] = self._rows.rows[slot]
        return row

    def lookup(self, key: Any, req_context: ReqContext) -> LookupResult:
        while self._fetched:
            self._note_end(self._fetched.popleft())
        # Before `has`: a fetch may end between the two.
        is_written = key in self._writing or key in self._fetching
        is_here = self._tier.has(key)
        if self._lower is not None and _allows_stores(req_context):
            return self._look_below(key, req_context, is_here, is_written)
        if is_here:
            return _HIT
        return LookupResult.HIT_PENDING if is_written else _MISS

    def _look_below(
        self, key: Any, req_context: ReqContext, is_here: bool, is_written: bool
    ) -> LookupResult:
        request = self._request(req_context)
        if is_here:
            request.looked_up.append(key)
            return LookupResult.HIT
        place = ASKED if is_written else request.places.look(key, req_context)
        if place == ABSENT:
            return LookupResult.MISS
        self._waiting[req_context.req_id] = request
        if is_written:
            return LookupResult.HIT_PENDING
        if place == ASKED:
            return LookupResult.RETRY
        request.looked_up.append(key)
        return LookupResult.HIT_PENDING

    def on_schedule_end(self, context: Any) -> None:
        if self._lower is None:
            return
        for request in self._waiting.values():
            request.places.ask(self._lower)
            self._fetch(request, self._lower)
        if self._waiting and len(self._waiting) == self._num_requests and self._lower.is_fetching:
            self._lower.wait_a_moment(_IDLE_S)  # nothing runs: leave the processor to the threads
        self._waiting.clear()

    def _fetch(self, request: _Request, lower: LowerTiers) -> None:
        """Load the chunks that stores have. A chunk that finds no room is a miss."""
        looked_up, request.looked_up = list(dict.fromkeys(request.looked_up)), []
        if not (wanted := request.places.use_up(looked_up)):
            return
        # Reserve includes chunks in host memory, so that they are not evicted for the others.
        slots, evicted = self._tier.reserve(looked_up, partly=True)
        self._tell(True, (key for key, _ in evicted))
        pairs = [pair for pair in zip(looked_up, slots.tolist(), strict=True) if pair[1] >= 0]
        chunks = [Chunk(key, slot, wanted[key]) for key, slot in pairs if key in wanted]
        self._tier.abandon([slot for key, slot in pairs if key not in wanted])  # it left
        self._fetching |= {chunk.key: chunk for chunk in chunks}
        request.sources |= {chunk.key: lower.stores[chunk.store].name for chunk in chunks}
        if chunks:
            lower.fetch(chunks, partial(self._end_fetch, chunks))

    def _end_fetch(self, chunks: list[Chunk], arrived: set[bytes]) -> None:
        """Publish the chunks of a fetch that came. A thread calls this."""
        self._tier.publish([chunk.slot for chunk in chunks if chunk.key in arrived])
        self._tier.abandon([chunk.slot for chunk in chunks if chunk.key not in arrived])
        self._fetched += chunks
        self._tell(False, arrived)

    def _note_end(self, chunk: Chunk) -> None:
        # Meanwhile the chunk may have left again, and be fetched again.
        if self._fetching.get(chunk.key) is chunk:
            del self._fetching[chunk.key]

    def get_load_source(self, key: Any, req_context: ReqContext) -> CacheHitSource:
        source = self._request(req_context).sources.get(key)
        if source is None:
            return CacheHitSource.HOST
        return _SOURCES.get(source, CacheHitSource.EXTERNAL_UNSPECIFIED)

    def prepare_load(self, keys: Collection[Any], req_context: ReqContext) -> Slots:
        request = self._request(req_context)
        slots = self._tier.pin(list(keys)).tolist()
        if -1 in slots:
            self._tier.unpin(slots)
            raise KeyError("a chunk that vLLM loads is not in host memory")
        request.loading.append(slots)
        request.used |= dict.fromkeys(keys)
        _, parents = self._ancestry(keys, req_context)
        if parents is not None:  # chunks from stores have none yet
            self._tier.link(slots, parents)
        return Slots(slots)

    def _ancestry(
        self, keys: Iterable[bytes], req_context: ReqContext
    ) -> Ancestry | tuple[None, None]:
        """Return where chunks are in the prompt, if the tier needs it."""
        if not self._tier.needs_places:
            return None, None
        return self._order.ancestry(keys, req_context, self._request(req_context).seen)

    def complete_load(self, keys: Collection[Any], req_context: ReqContext) -> None:
        self._tier.unpin(self._request(req_context).loading.popleft())

    def touch(self, keys: Collection[Any], req_context: ReqContext) -> None:
        self._tier.unpin(self._tier.pin(list(keys)))

    def prepare_store(
        self, keys: Collection[Any], req_context: ReqContext
    ) -> PrepareStoreOutput | None:
        offered = list(dict.fromkeys(keys))
        depths, parents = self._ancestry(offered, req_context)
        slots, evicted = self._tier.reserve(offered, partly=True, depths=depths, parents=parents)
        pairs = zip(offered, slots.tolist(), strict=True)
        new = {key: slot for key, slot in pairs if slot >= 0}
        if not new and NO_ROOM in slots:
            return None
        self._writing |= new
        gone = [key for key, _ in evicted]
        self._tell(True, gone)
        self._request(req_context).used |= dict.fromkeys(offered)
        return PrepareStoreOutput(list(new), Slots(list(new.values())), gone)

    def complete_store(
        self, keys: Collection[Any], req_context: ReqContext, success: bool = True
    ) -> None:
        ordered = in_order(keys, req_context)
        if not success:
            self._tier.abandon([self._writing.pop(key) for key in ordered])
            return
        self._offer(ordered)
        if self._lower is not None:
            self.save(self._pinned(ordered))

    def publish(self, keys: Sequence[bytes]) -> list[KeySlot]:
        """Offer reserved chunks that are written before vLLM's next copies. O(keys log slots).

        Returns each with its slot. Slots are pinned until they are passed to `save`.
        """
        self._offer(keys)
        return self._pinned(keys)

    def save(self, pairs: Sequence[KeySlot]) -> None:
        """Pass chunks of `publish` on to the stores below, and unpin those without room.

        At most a quarter of all slots is being saved at a time. O(chunks).
        """
        offered: Sequence[KeySlot] = ()
        if self._lower is not None:
            if not self._rows.is_complete:
                raise RuntimeError("tiers: all workers of the engine must run on one machine")
            if offered := pairs[: self._lower.save_room]:
                slots, tier = [slot for _, slot in offered], self._tier
                self._lower.save(offered, lambda _: tier.unpin(slots))
        self._tier.unpin(slot for _, slot in pairs[len(offered) :])

    def _offer(self, keys: Sequence[bytes]) -> None:
        self._tier.publish([self._writing.pop(key) for key in keys])
        self._tell(False, keys)

    def _pinned(self, keys: Sequence[bytes]) -> list[KeySlot]:
        return list(zip(keys, self._tier.pin(keys).tolist(), strict=True))

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._num_requests += 1
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._num_requests -= 1
        self._waiting.pop(req_context.req_id, None)
        used = self._request(req_context).used
        # The last chunk of the prompt leaves first.
        self._tier.rest(in_order(used, req_context))

    def take_events(self) -> Iterator[OffloadingEvent]:
        while self._changes:
            removed, keys = self._changes.popleft()
            yield OffloadingEvent(keys, Medium.CPU, removed)

    def _tell(self, removed: bool, keys: Iterable[bytes]) -> None:
        if self._changes is not None and (told := list(keys)):
            self._changes.append((removed, told))

    def reset_cache(self) -> None:
        """Forget all chunks in host memory, and the transfers under way."""
        if self._lower is not None:
            self._lower.drain()
        self._tier = self._make_tier()
        self._writing.clear()
        self._fetching.clear()

    def shutdown(self) -> None:
        if self._lower is not None:
            self._lower.close()

    def _request(self, req_context: ReqContext) -> _Request:
        request: _Request | None = req_context.get_state(_Request)
        if request is None or request.tier is not self._tier:  # before a reset
            req_context.set_state(request := _Request(self._tier))
        return request


def _allows_stores(req_context: ReqContext) -> bool:
    return bool(req_context.load_tier_filter.allows(Medium.STORAGE, None))
