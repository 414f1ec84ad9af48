"""Eviction policies from the literature, as baselines for `kvpager simulate`."""

from __future__ import annotations

from collections.abc import Callable

from kvpager.blocks.policies import POLICIES
from kvpager.blocks.policies.base import EvictionPolicy
from kvpager.simulate.policies.arc import ARC
from kvpager.simulate.policies.s3_fifo import S3FIFO
from kvpager.simulate.policies.two_q import TwoQ

BASELINES: dict[str, Callable[[int], EvictionPolicy]] = {"s3-fifo": S3FIFO, "arc": ARC, "2q": TwoQ}
COMPARED = {**POLICIES, **BASELINES}
