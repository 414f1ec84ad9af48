"""The leader's record of followers: the transfers to send them, and their answers.

    begin(fetch) ─▶ FetchBlocks ─▶ each follower loads its shard into its own staging
    report(rank, ...)          ◀── ... and says how many leading blocks came
    cut(fetch)                     drops the blocks that some rank lacks
    load(fetch)  ─▶ LoadBlocks ─▶ each follower copies staging to its device
    end(fetch)   ─▶ EndFetch   ─▶ each follower frees its staging

A block is attached only after every rank has its shard in staging, verified. So no later step can
find that a follower lacks it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kvpager import _validate as arguments
from kvpager.blocks.groups.manager import GroupedManager
from kvpager.blocks.manager import BlockManager
from kvpager.plans import (
    DropBlocks,
    EndFetch,
    FetchBlocks,
    Int32,
    LoadBlocks,
    SaveBlocks,
    Transfer,
    UInt8,
)
from kvpager.storage.keys import KEY_BYTES
from kvpager.storage.tiers.loading import Fetch
from kvpager.storage.tiers.saving import StagedBlock


class _Asked(NamedTuple):
    """A fetch that followers were asked for, and its first block at that time."""

    fetch: Fetch
    first: int


class Followers:
    """Collects the transfers of the followers, ranks 1 to `count`.

    Any thread may call `report` and `drop`. Without followers, no method does anything.
    """

    def __init__(self, count: int, on_progress: Callable[[], None]) -> None:
        """Call `on_progress` when a follower has answered. Raises: `ValueError`, `TypeError`."""
        self.count = arguments.count("num_followers", count)
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._num_tickets = 0
        self._asked: dict[int, _Asked] = {}  # by ticket
        self._begun: dict[int, None] = {}  # tickets that `take` has not returned yet
        self._transfers: list[Transfer] = []

    def begin(self, fetch: Fetch) -> None:
        """Ask the followers to load the blocks of a fetch. O(1)."""
        if not self.count:
            return
        with self._lock:
            self._num_tickets += 1
            fetch.ticket = self._num_tickets
            fetch.awaited = set(range(1, self.count + 1))
            self._asked[fetch.ticket] = _Asked(fetch, fetch.first)
            self._begun[fetch.ticket] = None

    def report(self, rank: int, ticket: int, num_blocks: int) -> None:
        """Record that follower `rank` has `num_blocks` leading blocks of a fetch in staging. O(1).

        Ignored if the fetch has ended. Raises: `ValueError`, `TypeError` for a bad number.
        """
        rank = arguments.count("rank", rank, at_least=1, at_most=self.count)
        num_blocks = arguments.count("num_blocks", num_blocks)
        with self._lock:
            asked = self._asked.get(ticket)
            if asked is None:
                return
            asked.fetch.stop = min(asked.fetch.stop, asked.first + num_blocks)
            asked.fetch.awaited.discard(rank)
        self._on_progress()

    def load(self, fetch: Fetch, start: int, blocks: Sequence[int]) -> None:
        """Let followers put blocks onto their devices, from block `start` of the prompt on."""
        if self.count:
            start -= self._asked[fetch.ticket].first
            self._add(LoadBlocks(fetch.ticket, start, np.array(blocks, np.int32)))

    def save(self, blocks: Int32, staged: Sequence[StagedBlock]) -> None:
        """Let followers save their shards of `blocks`, as the leader does. O(blocks)."""
        if self.count and staged:
            stores = [sum(1 << number for number in block.stores) for block in staged]
            keys = _array([block.key for block in staged])
            self._add(SaveBlocks(keys, blocks, np.array(stores, np.uint8)))

    def drop(self, number: int, keys: list[bytes]) -> None:
        """Let followers drop their shards of blocks from a store, as the leader did. O(keys)."""
        if self.count:
            self._add(DropBlocks(_array(keys), number))
            self._on_progress()  # otherwise no step may follow that sends them

    def end(self, fetch: Fetch) -> None:
        """Let followers free the staged blocks of a fetch. Idempotent. O(1)."""
        if not self.count:
            return
        with self._lock:
            if self._asked.pop(fetch.ticket, None) is None:
                return
            if fetch.ticket in self._begun:  # no follower knows it
                del self._begun[fetch.ticket]
            else:
                self._transfers.append(EndFetch(fetch.ticket))

    @property
    def has_transfers(self) -> bool:
        """True if `take` returns something. O(1)."""
        return bool(self._transfers or self._begun)

    def take(self) -> tuple[Transfer, ...]:
        """Return the transfers for the next plan, in order. O(blocks)."""
        if not self.has_transfers:
            return ()
        with self._lock:
            now, begun = time.monotonic(), [self._asked[ticket] for ticket in self._begun]
            # No earlier transfer names a fetch that was not sent yet, so it may come last.
            fetches = [
                FetchBlocks(fetch.ticket, _array(fetch.keys[first:]), max(fetch.deadline - now, 0))
                for fetch, first in begun
            ]
            taken = (*self._transfers, *fetches)
            self._begun.clear()
            self._transfers.clear()
            return taken

    def _add(self, transfer: Transfer) -> None:
        with self._lock:
            self._transfers.append(transfer)


def _array(keys: Sequence[bytes]) -> UInt8:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


def refuse_windows(manager: BlockManager, num_followers: int) -> None:
    """Raise `ValueError` for followers of a model with windows. O(1)."""
    if num_followers and isinstance(manager, GroupedManager):
        raise ValueError(
            f"num_followers={num_followers}: expected 0 for groups of layers with a window. "
            "Leave tiers out."
        )
