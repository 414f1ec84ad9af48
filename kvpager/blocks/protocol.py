"""The members of a block manager that schedulers, integrations and storages use.

`BlockManager` and `GroupedManager` implement the protocol. Another mode, such as contiguous
reservations, can replace them: each member does what the method of `BlockManager` documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, overload

from numpy.typing import ArrayLike

from kvpager.blocks.sequences import Batch, SequenceHandle, Target
from kvpager.blocks.stats import Stats, Withheld
from kvpager.plans import AppendPlan, CopyPlan, Int32, Int64, Tier


class Ceilings(Protocol):
    """The members of a manager's `quotas` in use."""

    def ceiling(self, namespace: str | None) -> int | None:
        """Return the most blocks a namespace may have. O(1)."""

    def set(self, namespace: str | None, *, ceiling: int | None = None) -> None:
        """Bound the blocks of a namespace."""

    def drop(self, namespace: str | None) -> None:
        """Remove the bound."""


class Fencing(Protocol):
    """The members of a manager's `copies` in use."""

    @property
    def is_fenced(self) -> bool:
        """True if each plan must be completed. O(1)."""


class Bounds(Protocol):
    """The members of a manager's `queries` in use."""

    def blocks_for(self, num_tokens: int) -> int:
        """Return the most blocks that a sequence of up to `num_tokens` holds. O(groups)."""

    def withheld(
        self, prompt: ArrayLike | None, namespace: str | None, lora: str | None
    ) -> Withheld:
        """Return the blocks that a sequence cannot get even alone. O(tokens + blocks)."""


class CacheManager(Protocol):
    """Block tables over a pool of blocks.

    `BlockManager` has one table for each sequence. `GroupedManager` has one for each group of
    layers: there `block_tables` and `slots` have a leading axis, the groups.
    """

    @property
    def block_size(self) -> int:
        """Token slots of a block."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each group of layers, in tokens; None for full attention."""

    @property
    def num_host_blocks(self) -> int:
        """Blocks of the host tier."""

    @property
    def quotas(self) -> Ceilings:
        """The quotas of namespaces."""

    @property
    def queries(self) -> Bounds:
        """Bounds of the blocks that a sequence holds."""

    @property
    def copies(self) -> Fencing:
        """The unfinished copies."""

    @property
    def num_blocks(self) -> int:
        """Blocks on the device."""

    @property
    def num_free_blocks(self) -> int:
        """Free blocks: available without eviction."""

    @property
    def num_held_blocks(self) -> int:
        """Blocks that sequences hold."""

    # ---------------------------------------------------------------- the verbs

    def allocate(
        self,
        prompt: int | ArrayLike,
        *,
        namespace: str | None = None,
        lora: str | None = None,
        mm_hashes: Iterable[tuple[int, int, bytes]] = (),
        reserve: int = 0,
    ) -> SequenceHandle:
        """Begin a sequence."""

    def match_prefix(
        self,
        prompt: ArrayLike,
        *,
        namespace: str | None = None,
        lora: str | None = None,
        mm_hashes: Iterable[tuple[int, int, bytes]] = (),
    ) -> int:
        """Return how many leading tokens need no computing."""

    def append(
        self,
        sequences: Target,
        tokens: int | ArrayLike | Iterable[ArrayLike] = 1,
        *,
        counts: ArrayLike | None = None,
        speculative: bool = False,
    ) -> AppendPlan:
        """Make room for further tokens."""

    def commit(self, sequences: Target, length: int | None = None) -> None:
        """Record that the KV of tokens is written."""

    @overload
    def fork(self, sequence: SequenceHandle) -> SequenceHandle: ...
    @overload
    def fork(self, sequence: SequenceHandle, count: int) -> list[SequenceHandle]: ...

    def free(self, sequences: Target, *, publish: bool = False) -> None:
        """End sequences."""

    def truncate(self, sequence: SequenceHandle, length: int) -> None:
        """Shorten a sequence."""

    def swap(
        self, sequences: Target, to: Tier, *, at_most: int | None = None, reserve: int = 0
    ) -> CopyPlan:
        """Move blocks between the tiers."""

    def clear_prefix_cache(self) -> int:
        """Evict all cached blocks that no sequence holds."""

    # ---------------------------------------------------------------- reading

    def batch(self, sequences: Iterable[SequenceHandle]) -> Batch:
        """Return several handles as one argument."""

    def lengths(self, sequences: Target) -> Int64:
        """Return the tokens in each sequence."""

    def block_tables(self, sequences: Target, *, padding: int = -1) -> Int32:
        """Return the block tables."""

    def tables_and_lengths(self, sequences: Target) -> tuple[Int32, Int64]:
        """Return block tables and lengths, read at one moment."""

    def slots(self, sequence: SequenceHandle, start: int = 0, stop: int | None = None) -> Int64:
        """Return the slots of tokens."""

    def open_slots(self, sequence: SequenceHandle, start: int, stop: int) -> Int64:
        """Return the slots of tokens about to be written; this may take blocks."""

    def stats(self) -> Stats:
        """Return counts and totals."""

    def check(self) -> None:
        """Raise `BrokenInvariant` if an invariant is broken."""


MEMBERS = tuple(name for name in vars(CacheManager) if not name.startswith("_"))
