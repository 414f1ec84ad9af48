"""What the pools of one patch share: a bound, a lock, the calls under way, and counters."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from kvpager._atomic import Uninterrupted
from kvpager.blocks.policies import Eviction
from kvpager.blocks.quotas import NamespaceQuotas
from kvpager.integrations.huggingface.cache.calls import Calls
from kvpager.plans import Tier
from kvpager.storage.block_storage import KVDtype


class Counters:
    """What happened in all pools of one memory, those that are gone included."""

    def __init__(self) -> None:
        self.gathers = 0
        self.in_place_reads = 0
        self.copied_blocks = 0
        self.evicted_blocks = 0
        self.arrived_blocks = 0  # from the other tier
        self.peak_held_bytes = 0  # of blocks
        self.peak_dense_bytes = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self.prefix_unserved_calls = 0
        self.sessions = 0  # of continuous batching, which have pools of their own
        self.session_requests = 0
        self.session_tokens = 0  # generated


class Budget(Protocol):
    """What a pool asks of the memory that it is part of: `PagedMemory` documents it."""

    lock: Any
    uninterrupted: Uninterrupted
    block_size: int
    bound: int | None
    tier: Tier
    dtype: torch.dtype | None
    kv_dtype: KVDtype | None
    keep_pools: bool
    eviction: Eviction
    in_place: bool
    calls: Calls
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
