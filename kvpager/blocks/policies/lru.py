"""The default policy."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvpager.blocks.policies.base import BlockPolicy, Blocks, Rank
from kvpager.plans import Int64


class LRU(BlockPolicy):
    """Least recently used: evicts the block whose last release is oldest."""

    COLUMNS: ClassVar[dict[str, type[np.generic]]] = {"last_used": np.int64}
    last_used: Int64

    def release(self, blocks: Blocks) -> None:  # noqa: D102
        self.last_used[blocks] = self.tick()

    def rank(self, blocks: Blocks) -> Rank:  # noqa: D102
        return self.last_used[blocks]
