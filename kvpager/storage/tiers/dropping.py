"""Drops the blocks that namespaces may not keep, and notes what stores have and have not."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from kvpager.storage.tiers.calls import StoreCalls
from kvpager.storage.tiers.namespaces import NamespaceKeys
from kvpager.storage.tiers.protocol import BlockStore

logger = logging.getLogger(__name__)


class News(NamedTuple):
    """Keys that a store has from now on, or has no more."""

    store: int
    keys: list[bytes]
    is_kept: bool


class Dropper:
    """Drops blocks from stores. Any thread may call its methods.

    Keys whose drop failed stay tracked, so that the next call drops them.

    Attributes:
        calls: the calls of stores that are under way.
        on_drop: called with the number of a store and the keys that it dropped.
        stores: the stores.
        tracked: the keys that stores keep.
        news: the outcomes of keys, in order.
    """

    def __init__(self, stores: Sequence[BlockStore], tracked: NamespaceKeys) -> None:
        self.on_drop: Callable[[int, list[bytes]], object] = lambda *_: None
        self.calls = StoreCalls()
        self.news: deque[News] = deque()
        self.stores = stores
        self.tracked = tracked

    def drop_surplus(self, number: int) -> Collection[bytes]:
        """Drop the blocks of a store that are over a limit. Returns their keys. O(keys).

        Do not serve these keys: the store may still have them.
        """
        surplus = self.tracked.surplus(number)
        self._drop(number, surplus)
        return surplus.keys()

    def drop_namespace(self, namespace: str) -> int:
        """Drop the known blocks of a namespace; return how many left the stores. O(keys)."""
        numbers = range(len(self.stores))
        return sum(self._drop(n, self.tracked.of(n, namespace)) for n in numbers)

    def tell(self, number: int, keys: list[bytes], *, is_kept: bool) -> None:
        """Add to the news, unless there are no keys. O(1)."""
        if keys:
            self.news.append(News(number, keys, is_kept))

    def drop(self, number: int, keys: Iterable[bytes]) -> int:
        """Drop blocks from a store, of any age; return how many. O(keys)."""
        return self._drop(number, dict.fromkeys(keys, math.nan))

    def _drop(self, number: int, saved_at: dict[bytes, float]) -> int:
        keys = list(saved_at)
        if not keys or self.calls.hangs(number):
            return 0
        try:
            with self.calls.begin(number):
                is_dropped = self.stores[number].drop(keys)
            if not is_dropped:
                return 0
        except Exception:
            logger.exception("the store %s failed to drop blocks", self.stores[number].name)
            return 0
        self.tracked.dropped(number, saved_at)
        self.tell(number, keys, is_kept=False)
        self.on_drop(number, keys)
        return len(keys)
