"""The state that the pools of one patch share: bound, lock, running calls and counters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kvpager._atomic import Uninterrupted
from kvpager.blocks.policies import Eviction
from kvpager.blocks.quotas import NamespaceQuotas
from kvpager.integrations.huggingface.cache.generate_calls import GenerateCalls
from kvpager.plans import Tier
from kvpager.storage.block_storage import BlockStorage, LayerShape


@dataclass
class Counters:
    """Totals over all pools of one memory, dropped pools included.

    `PatchStats` describes each counter.
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
    swapped_in_blocks: int = 0  # from the other tier
    num_sessions: int = 0
    session_requests: int = 0
    session_tokens: int = 0


class Budget(Protocol):
    """The members of `PagedMemory` that a pool uses."""

    lock: Any
    uninterrupted: Uninterrupted
    block_size: int
    bound: int | None
    tier: Tier
    name: str
    dtype: torch.dtype | None
    keep_pools: bool
    eviction: Eviction
    in_place: bool
    calls: GenerateCalls
    quotas: NamespaceQuotas
    counters: Counters

    @property
    def reserved_bytes(self) -> int:
        """Return the bytes of all storages."""

    @property
    def room(self) -> int:
        """Return the bytes that the bound leaves."""

    def block_bytes(self, layers: Sequence[LayerShape], dtype: torch.dtype) -> int:
        """Return the bytes of a block."""

    def new_storage(
        self,
        num_blocks: int,
        layers: Sequence[LayerShape],
        dtype: torch.dtype,
        device: torch.device,
    ) -> BlockStorage:
        """Make blocks."""

    def bound_as_given(self) -> str:
        """Return the bound as an argument."""

    def claim(self, num_bytes: int, claimant: object) -> bool:
        """Return True if `num_bytes` more fit the bound. Other pools first give up idle blocks."""

    def note_peak(self) -> None:
        """Update the peak of held bytes."""
