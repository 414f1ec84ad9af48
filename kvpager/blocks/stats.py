"""Statistics of a manager, as plain numbers and as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from kvpager import _validate as arguments
from kvpager.blocks.metric_families import Families


class BlockStatus(IntEnum):
    """The state of a device block."""

    FREE = 0
    CACHED = 1  # in the prefix index, in no block table
    HELD = 2  # in one block table
    SHARED = 3  # in several block tables
    KEPT = 4  # in no block table, but pinned or in an unfinished copy
    RESERVED = 5  # the null block


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts at one moment, in blocks unless named otherwise; totals since the manager began.

    On the device, `num_held + num_cached + num_kept + num_free == num_blocks` (minus one with a
    null block). `num_never_used` of the free blocks were never used.
    """

    block_size: int
    num_blocks: int
    num_free: int
    num_held: int
    num_cached: int  # in the prefix index only: evictable
    num_kept: int  # in no table, but pinned or in an unfinished copy
    num_never_used: int
    num_shared: int  # in more than one table
    num_host_blocks: int
    num_host_free: int
    num_sequences: int
    num_swapped: int  # sequences
    num_tokens: int  # token slots in use; shared slots count once
    total_copied: int
    total_evicted: int
    total_swapped_out: int
    total_swapped_in: int
    total_prefix_queries: int  # prompts looked up
    total_prefix_hits: int  # prompts with at least one cached token
    prefix_query_tokens: int
    prefix_hit_tokens: int


class Withheld(NamedTuple):
    """Device blocks that a sequence cannot get, even if no other sequence holds any.

    Attributes:
        pinned: the pinned blocks that it would not share.
        own: of these, the ones of its namespace.
        reserved: blocks that the floors of other namespaces reserve, besides their pinned ones.
    """

    pinned: int = 0
    own: int = 0
    reserved: int = 0


class HasStats(Protocol):
    """The member of a manager that `Metrics` needs."""

    def stats(self) -> Stats:
        """Return current counts and totals. O(blocks + sequences)."""


class Metrics:
    """A manager's stats for `prometheus_client`: `REGISTRY.register(Metrics(manager))`.

    Needs the extra `kvpager[metrics]`. `block_bytes`, such as `BlockStorage.block_bytes`, adds the
    swapped bytes. Several managers in a process need different prefixes.
    """

    def __init__(
        self, manager: HasStats, block_bytes: int | None = None, prefix: str = "kvpager"
    ) -> None:
        if block_bytes is not None:
            block_bytes = arguments.count("block_bytes", block_bytes, at_least=1)
        self._manager = manager
        self._block_bytes = block_bytes
        self._families = Families(prefix)

    def collect(self) -> Iterator[Any]:
        """Yield the metric families. O(blocks + sequences), see `BlockManager.stats`."""
        return block_families(self._families, self._manager.stats(), self._block_bytes)


def block_families(make: Families, stats: Stats, block_bytes: int | None) -> Iterator[Any]:
    """Yield the metric families of a manager; the swapped bytes if `block_bytes` is given. O(1)."""
    states = {
        ("free",): stats.num_free,
        ("held",): stats.num_held,
        ("cached",): stats.num_cached,
        ("kept",): stats.num_kept,
    }
    yield make.gauge("blocks", "Device blocks.", states, "state")
    yield make.gauge("host_blocks_free", "Free blocks of the host tier.", stats.num_host_free)
    yield make.gauge("sequences", "Live sequences.", stats.num_sequences)
    yield make.gauge("sequences_swapped", "Swapped sequences.", stats.num_swapped)
    yield make.gauge("tokens", "Token slots in use.", stats.num_tokens)
    for name, text, value in (
        ("prefix_queries", "Prompts looked up.", stats.total_prefix_queries),
        ("prefix_hits", "Prompts with a cached prefix.", stats.total_prefix_hits),
        ("prefix_query_tokens", "Tokens of prompts looked up.", stats.prefix_query_tokens),
        ("prefix_hit_tokens", "Tokens found in the prefix cache.", stats.prefix_hit_tokens),
        ("blocks_copied", "Blocks copied on write.", stats.total_copied),
        ("blocks_evicted", "Cached blocks evicted.", stats.total_evicted),
    ):
        yield make.counter(name, text, value)
    if block_bytes is not None:
        swapped = {
            ("host",): stats.total_swapped_out * block_bytes,
            ("device",): stats.total_swapped_in * block_bytes,
        }
        yield make.counter("swap_bytes", "Bytes swapped to a tier.", swapped, "tier")
