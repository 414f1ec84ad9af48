"""Storages whose blocks hold known numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvpager.plans import CopyPlan, Tier
from kvpager.storage.block_storage import BlockStorage, LayerShape

EQUAL = [LayerShape(2, 8, 8)] * 3
UNEQUAL = [LayerShape(2, 8, 4), LayerShape(1, 16, 16), LayerShape(3, 2, 6)]


def numbered(device: str = "cpu", layers: Any = EQUAL, **options: Any) -> BlockStorage:
    """Make a storage whose elements all differ, in both tiers."""
    storage = BlockStorage(6, 4, layers, dtype=torch.float32, device=device, **options)
    for tier in (storage.tier("device"), storage.tier("host")):
        tier.copy_(torch.arange(tier.numel(), dtype=torch.float32).view(tier.shape))
    storage.tier("host").neg_()
    return storage


def pairs(*copies: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(copies, np.int32).reshape(-1, 2)


def move(source: Tier, destination: Tier, *copies: tuple[int, int]) -> CopyPlan:
    return CopyPlan(pairs(*copies), source, destination)
