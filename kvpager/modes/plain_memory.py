"""Blocks in ordinary memory, one tensor."""

from __future__ import annotations

import torch

from kvpager.modes.protocol import Memory
from kvpager.storage.layout import StorageLayout
from kvpager.storage.memory import allocate


class PlainMemory:
    """The part of a mode that allocates ordinary memory."""

    def allocate(  # noqa: D102
        self,
        num_blocks: int,
        layout: StorageLayout,
        dtype: torch.dtype,
        device: torch.device,
        pinned: bool,
    ) -> Memory:
        return Memory(allocate(num_blocks, layout.num_elements, dtype, device, pinned=pinned))

    def resized(self, memory: Memory, num_blocks: int, pinned: bool) -> Memory:  # noqa: D102
        tier, kept = memory.tier, min(num_blocks, len(memory.tier))
        other = allocate(num_blocks, tier.shape[1], tier.dtype, tier.device, pinned=pinned)
        other[:kept].copy_(tier[:kept])
        return Memory(other)
