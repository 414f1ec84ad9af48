"""What the pools of one patch share: a bound, a lock, the calls under way, and counters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kvpager._atomic import Uninterrupted
from kvpager.blocks.policies import Eviction
from kvpager.blocks.quotas import NamespaceQuotas
from kvpager.integrations.huggingface.cache.generate_calls import GenerateCalls
from kvpager.plans import Tier
from kvpager.storage.block_storage import KVCacheDtype


@dataclass
class Counters:
    """What happened in all pools of one memory, those that are gone included.

    `PatchStats` says what each one counts.
    """

    gathers: int = 0
    in_place_reads: int = 0
    copied_blocks: int = 0
    evicted_blocks: int = 0
    peak_held_bytes: int = 0
    peak_dense_bytes: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_unserved_calls: int = 0
    swapped_in_blocks: int = 0  # that came from the other tier
    num_sessions: int = 0
    session_requests: int = 0
    session_tokens: int = 0


class Budget(Protocol):
    """What a pool asks of the memory that it is part of: `PagedMemory` documents it."""

    lock: Any
    uninterrupted: Uninterrupted
    block_size: int
    bound: int | None
    tier: Tier
    dtype: torch.dtype | None
    kv_cache_dtype: KVCacheDtype | None
    keep_pools: bool
    eviction: Eviction
    in_place: bool
    calls: GenerateCalls
    quotas: NamespaceQuotas
    counters: Counters

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all storages."""

    @property
    def room(self) -> int:
        """Bytes that the bound leaves."""

    def bound_as_given(self) -> str:
        """Return the bound as an argument."""

    def claim(self, num_bytes: int, claimant: object) -> bool:
        """Return True if `num_bytes` more fit the bound. Other pools first give up idle blocks."""

    def note_peak(self) -> None:
        """Compare what is held now with the most so far."""
