"""A wrapper for a caller's eviction policy, so that its failure does no harm.

A policy runs in the middle of changes, where an error would leave counts and tables wrong. So
`FailSafe` keeps an `LRU` beside it. If the policy raises or returns an invalid rank, `FailSafe`
logs the error and uses the `LRU` from then on.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from kvpager.blocks.policies.base import Blocks, EvictionPolicy, Rank
from kvpager.blocks.policies.lru import LRU
from kvpager.plans import NO_BLOCKS, Int32, Int64, UInt64

logger = logging.getLogger("kvpager")


class FailSafe:
    """An `EvictionPolicy` that delegates to another policy until that fails."""

    def __init__(self, policy: EvictionPolicy, num_blocks: int) -> None:
        self.in_charge: EvictionPolicy = policy
        self.needs_fingerprints = bool(policy.needs_fingerprints)
        self._spare = LRU(num_blocks)
        self._on_failure: Callable[[], object] = lambda: None

    def when_it_fails(self, act: Callable[[], object]) -> None:
        """Register a callback for a failure of the policy, which changes all ranks. O(1)."""
        self._on_failure = act

    def admit(self, blocks: Blocks, fingerprints: UInt64, depths: Int64) -> None:  # noqa: D102
        self._ask("admit", blocks, fingerprints, depths)

    def touch(self, blocks: Blocks) -> None:  # noqa: D102
        self._ask("touch", blocks)

    def release(self, blocks: Blocks) -> None:  # noqa: D102
        if self.in_charge is not self._spare:
            self._spare.release(blocks)
        self._ask("release", blocks)

    def forget(self, blocks: Blocks) -> None:  # noqa: D102
        self._ask("forget", blocks)

    def rank(self, blocks: Blocks) -> Rank:
        """Return the rank of each block. O(blocks)."""
        ranks: Any = self._ask("rank", blocks, check=lambda ranks: _refuse_ranks(ranks, blocks))
        return self._spare.rank(blocks) if ranks is None else np.asarray(ranks)

    def reranked(self, count: int) -> Int32:
        """Return the blocks whose rank changed without a call. O(blocks returned)."""
        num_blocks = self._spare.num_blocks
        blocks = self._ask(
            "reranked", count, check=lambda blocks: _refuse_blocks(blocks, num_blocks)
        )
        return NO_BLOCKS if blocks is None else np.asarray(blocks, np.int32)

    def retain(self, blocks: Blocks, priority: int, ttl_s: float | None) -> bool:  # noqa: D102
        return bool(self._ask("retain", blocks, priority, ttl_s))

    def resize(self, num_blocks: int, places: Int32) -> None:  # noqa: D102
        if self.in_charge is not self._spare:
            self._spare.resize(num_blocks, places)
        self._ask("resize", num_blocks, places)

    def _ask(
        self, method: str, *arguments: Any, check: Callable[[Any], object] | None = None
    ) -> Any:
        """Return the policy's result; None if it fails."""
        try:
            answer = getattr(self.in_charge, method)(*arguments)
            if check is not None:
                check(answer)
        except BaseException as error:
            self._fail(method, error)
            return None
        return answer

    def _fail(self, method: str, error: BaseException) -> None:
        failed, self.in_charge = self.in_charge, self._spare
        self.needs_fingerprints = False
        self._on_failure()
        with contextlib.suppress(Exception):  # raised by a log handler of the caller
            logger.error(
                "eviction policy %s failed in %s and is not asked any more; blocks leave least "
                "recently used first",
                type(failed).__name__,
                method,
                exc_info=error,
            )


def _refuse_ranks(ranks: Any, blocks: Blocks) -> None:
    found = np.asarray(ranks)
    if found.shape != blocks.shape or found.dtype.kind not in "iuf" or np.isnan(found).any():
        raise ValueError(
            f"rank(): expected a number for each of {len(blocks)} blocks, got {ranks!r}"
        )


def _refuse_blocks(blocks: Any, num_blocks: int) -> None:
    found = np.asarray(blocks)
    if found.ndim != 1 or (len(found) and found.dtype.kind not in "iu"):
        raise ValueError(f"reranked(): expected a list of blocks, got {blocks!r}")
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < num_blocks:
        raise ValueError(f"reranked(): expected blocks below {num_blocks}, got {blocks!r}")
