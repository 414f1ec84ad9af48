"""What schedulers, adapters and storages need of a block manager.

`BlockManager` is one, `GroupedManager` another. A further way to keep sequences, such as contiguous
reservations, is used in their place when it has these members; each does what the method of that
name in `BlockManager` says.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, overload

from numpy.typing import ArrayLike

from kvpager.blocks.sequences import Batch, SequenceHandle, Target
from kvpager.blocks.stats import Stats
from kvpager.plans import Int32, Int64, Plan, Step, Tier


class Ceilings(Protocol):
    """What is asked of a manager's quotas."""

    def ceiling(self, namespace: str | None) -> int | None:
        """Return the most blocks a namespace may have. O(1)."""

    def set(self, namespace: str | None, *, ceiling: int | None = None) -> None:
        """Bound the blocks of a namespace."""

    def drop(self, namespace: str | None) -> None:
        """Remove the bound."""


class Fencing(Protocol):
    """What is asked of a manager's copies."""

    @property
    def is_fenced(self) -> bool:
        """True if each plan must be completed. O(1)."""


class Bounds(Protocol):
    """What is asked of a manager's queries."""

    def blocks_for(self, num_tokens: int) -> int:
        """Return the most blocks that a sequence comes to hold up to `num_tokens`. O(groups)."""


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
        """Bounds of namespaces."""

    @property
    def queries(self) -> Bounds:
        """The bounds of what sequences hold."""

    @property
    def copies(self) -> Fencing:
        """Copies that are not finished."""

    @property
    def num_blocks(self) -> int:
        """Blocks on the device."""

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be had without evicting."""

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
    ) -> Step:
        """Make room for further tokens."""

    def commit(self, sequences: Target, length: int | None = None) -> None:
        """Say that tokens' KV is written."""

    @overload
    def fork(self, sequence: SequenceHandle) -> SequenceHandle: ...
    @overload
    def fork(self, sequence: SequenceHandle, count: int) -> list[SequenceHandle]: ...

    def free(self, sequences: Target, *, publish: bool = False) -> None:
        """End sequences."""

    def truncate(self, sequence: SequenceHandle, length: int) -> None:
        """Keep the first tokens."""

    def swap(
        self, sequences: Target, to: Tier, *, at_most: int | None = None, reserve: int = 0
    ) -> Plan:
        """Move blocks between the tiers."""

    def clear_prefix_cache(self) -> int:
        """Evict all that is cached only."""

    # ---------------------------------------------------------------- reading

    def batch(self, sequences: Iterable[SequenceHandle]) -> Batch:
        """Return several handles as one argument."""

    def lengths(self, sequences: Target) -> Int64:
        """Return the tokens in each sequence."""

    def block_tables(self, sequences: Target, *, padding: int = -1) -> Int32:
        """Return the block tables."""

    def tables_and_lengths(self, sequences: Target) -> tuple[Int32, Int64]:
        """Return both, read at one moment."""

    def slots(self, sequence: SequenceHandle, start: int = 0, stop: int | None = None) -> Int64:
        """Return the slots of tokens."""

    def open_slots(self, sequence: SequenceHandle, start: int, stop: int) -> Int64:
        """Return the slots of tokens about to be written, which may take blocks."""

    def stats(self) -> Stats:
        """Return counts and totals."""

    def check(self) -> None:
        """Raise `BrokenInvariant` if a law is broken."""


MEMBERS = tuple(name for name in vars(CacheManager) if not name.startswith("_"))
