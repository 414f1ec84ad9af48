"""Carries out the transfers of step plans on a rank that has no scheduler."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from kvpager import _validate as arguments
from kvpager.blocks.sequences import KeyParts
from kvpager.errors import KVPagerError
from kvpager.plans import (
    NO_BLOCKS,
    DropBlocks,
    EndFetch,
    FetchBlocks,
    LoadBlocks,
    SaveBlocks,
    Transfer,
    UInt8,
)
from kvpager.storage.keys import shard_key
from kvpager.storage.tiers.dropping import Dropper
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.loading import Fetch, Loader
from kvpager.storage.tiers.namespaces import NamespaceKeys
from kvpager.storage.tiers.protocol import BlockStore
from kvpager.storage.tiers.saving import Saver, StagedBlock
from kvpager.storage.tiers.slot_memory import Lease, SlotMemory

_NO_IDENTITY: KeyParts = {"namespace": None, "lora": None, "mm_hashes": []}  # the keys cover it


class TierFollower:
    """Loads and saves one rank's shards of blocks, as the plans of its leader say.

    The follower decides nothing. Its keys are derived from those of the plan, its rank and its
    layout, so ranks may share a server. It reports how many leading blocks of a fetch are in its
    staging, and the leader uses a block only if all ranks have it. A follower without room in
    staging saves less; a block that it lacks is computed again.

    Call `apply` with the transfers of each plan, before the plan's swaps and copies, on the thread
    that computes. It waits for no store. After an exception, apply no more plans: end the process.
    """

    def __init__(
        self,
        rank: int,
        staging: SlotMemory,
        stores: Sequence[BlockStore],
        layout: BlockLayout,
        report: Callable[[int, int, int], object],
        *,
        max_wait_s: float = 2.0,
    ) -> None:
        """Use `stores` from now on; `close` closes them.

        Args:
            rank: of this follower, from 1 on. Every follower has its own.
            staging: the buffer between its blocks and its stores.
            stores: the same ones as the leader's, in the same order.
            layout: of its shard; it goes into its keys.
            report: called with the rank, a ticket and a number of blocks, on threads. It has
                to pass them to `followers.report` of the leader's `Tiering`.
            max_wait_s: how long a save may take, in seconds.

        Raises: `ValueError`, `TypeError` for a bad argument.
        """
        self.rank = arguments.count("rank", rank, at_least=1)
        self.stores = tuple(stores)
        self._staging = staging
        self._layout = layout.fingerprint
        self._report = report
        dropper = Dropper(self.stores, NamespaceKeys(len(self.stores)))
        self._calls = dropper.calls
        self._loader = Loader(staging, dropper, None, lambda: None)
        max_wait_s = arguments.seconds("max_wait_s", max_wait_s)
        self._saver = Saver(staging, dropper, max_wait_s, lambda: None)
        self._fetches: dict[int, Fetch] = {}

    def apply(self, transfers: Iterable[Transfer]) -> None:
        """Carry out the transfers of a plan. O(bytes copied between device and staging).

        Raises: `KVPagerError` for a load of blocks that were not fetched.
        """
        for transfer in transfers:
            match transfer:
                case FetchBlocks():
                    self._fetch(transfer)
                case LoadBlocks():
                    self._load(transfer)
                case SaveBlocks():
                    self._save(transfer)
                case DropBlocks(keys, store) if store < len(self.stores):
                    self._saver.drop(store, self._keys(keys))
                case EndFetch(ticket):
                    if (fetch := self._fetches.pop(ticket, None)) is not None:
                        self._loader.cancel(fetch)

    def _fetch(self, asked: FetchBlocks) -> None:
        deadline = time.monotonic() + asked.wait_s
        fetch = Fetch(NO_BLOCKS, _NO_IDENTITY, 0, self._keys(asked.keys), deadline)
        self._fetches[asked.ticket] = fetch
        fetch.work.add_done_callback(
            lambda _: self._report(self.rank, asked.ticket, len(fetch.slots))
        )
        self._loader.start(fetch)

    def _load(self, asked: LoadBlocks) -> None:
        fetch, start = self._fetches.get(asked.ticket), asked.start
        stop = start + len(asked.blocks)
        here = 0 if fetch is None else fetch.first + len(fetch.slots)
        if fetch is None or not fetch.first <= start <= stop <= here:
            raise KVPagerError(
                f"transfers: blocks {start} to {stop} of fetch {asked.ticket} are not here. "
                "Apply the transfers of every plan, in order."
            )
        self._staging.give(fetch.take(start - fetch.first)[0])
        slots, sources = fetch.take(len(asked.blocks))
        with Lease(self._staging, slots) as lease:
            self._saver.promote(fetch.keys[start:stop], None, slots, sources)
            self._staging.write(slots, asked.blocks.tolist())
            lease.slots = []

    def _save(self, asked: SaveBlocks) -> None:
        self._saver.take_news()  # only the leader's stores decide which blocks are clean
        with Lease(self._staging) as lease:
            if not (slots := lease.take(len(asked.blocks))):
                return
            self._staging.read(asked.blocks[: len(slots)].tolist(), slots)
            numbers = range(len(self.stores))
            offered = [[n for n in numbers if mask >> n & 1] for mask in asked.stores.tolist()]
            parts = zip(self._keys(asked.keys[: len(slots)]), slots, offered, strict=False)
            staged = [StagedBlock(key, None, slot, to) for key, slot, to in parts]
            lease.slots = []
            self._saver.submit(staged)

    def _keys(self, keys: UInt8) -> list[bytes]:
        return [shard_key(key.tobytes(), self.rank, self._layout) for key in keys]

    def close(self) -> None:
        """Wait for saves, at most `max_wait_s` seconds, and close the stores. Idempotent."""
        self._loader.close()
        self._saver.close()
        self.apply(map(EndFetch, list(self._fetches)))
        self._calls.close_all(self.stores)
