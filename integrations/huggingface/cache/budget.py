"""The bytes that pools may reserve, the format of their blocks, and counts of their use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvpager import _validate as arguments
from kvpager._text import counted, listed, size
from kvpager._validate import parse_memory
from kvpager.kernels.quantisation import KV_CACHE_DTYPES
from kvpager.modes import ModeName, mode_named
from kvpager.plans import Tier
from kvpager.storage.block_storage import BlockStorage, LayerShape
from kvpager.storage.layout import KVCacheDtype


class LayerKind(NamedTuple):
    """The shape, dtype and device of a layer. Layers of one kind share a storage."""

    shape: LayerShape
    dtype: torch.dtype
    device: torch.device


@dataclass
class Counters:
    """Totals over all pools of one `PagedMemory`, dropped pools included.

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


class Budget:
    """The most bytes of one tier, and the format of its blocks, for `patch` and engines alike.

    Args:
        memory: the most bytes that all pools together may reserve; None for no bound.
        block_size: token slots of a block.
        kv_cache_dtype: "int8" or "fp8_e4m3" to store keys and values in eight bits; None keeps
            their dtype.
        host_memory: bytes of host memory for sequences that do not fit into the pools.
        in_place: let attention functions read blocks in place; otherwise every read gathers.
        tier: "host" for the budget of the host memory.
        mode: of the storages, see `kvpager.modes`.

    Raises: `TypeError`, `ValueError`.
    """

    def __init__(
        self,
        memory: int | str | None,
        block_size: int,
        kv_cache_dtype: KVCacheDtype | None = None,
        host_memory: int | str | None = None,
        *,
        in_place: bool = True,
        tier: Tier = "device",
        mode: ModeName = "paged",
    ) -> None:
        self.tier: Tier = tier
        self.name = "memory" if tier == "device" else "host_memory"
        self.bound = parse_memory(memory, self.name)
        self._given = memory if isinstance(memory, str) else None
        self.block_size = arguments.block_size(block_size)
        known = list(KV_CACHE_DTYPES)
        if kv_cache_dtype is not None and kv_cache_dtype not in known:
            raise ValueError(
                f"kv_cache_dtype={kv_cache_dtype!r}: expected one of {listed(known)} or None"
            )
        self.kv_cache_dtype = kv_cache_dtype
        mode_named(mode)
        self.mode = mode
        self.in_place = arguments.flag("in_place", in_place)
        self.counters = Counters()
        self.device_bound = self.bound  # also for the host's budget
        self.host: Budget | None = None
        if host_memory is not None:
            self.host = Budget(host_memory, block_size, kv_cache_dtype, tier="host", mode=mode)
            self.host.device_bound = self.bound

    def bound_as_given(self) -> str:
        """Return the bound as an argument, such as `memory='4GiB'`. O(1)."""
        given = size(self.bound or 0) if self._given is None else repr(self._given)
        return f"{self.name}={given}"

    def block_bytes(
        self, layers: Sequence[LayerShape], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> int:
        """Return the bytes of a block with room for `layers` on `device`. O(layers)."""
        return BlockStorage.bytes_of_a_block(
            self.block_size,
            layers,
            dtype=dtype,
            kv_cache_dtype=self.kv_cache_dtype,
            mode=self.mode,
            device=device,
        )

    def new_storage(
        self,
        num_blocks: int,
        layers: Sequence[LayerShape],
        dtype: torch.dtype,
        device: torch.device,
        num_host_blocks: int = 0,
    ) -> BlockStorage:
        """Make blocks for layers on `device`, in this tier. O(1), or O(bytes) if pinned.

        Raises: errors of torch's allocation.
        """
        on_host = self.tier == "host"
        return BlockStorage(
            num_blocks,
            self.block_size,
            layers,
            dtype=dtype,
            kv_cache_dtype=self.kv_cache_dtype,
            device="cpu" if on_host else device,
            num_host_blocks=num_host_blocks,
            pinned=on_host and device.type == "cuda",
            mode=self.mode,
        )

    def refuse_below(self, block_bytes: int, *, on_device: bool = False) -> None:
        """Refuse bounds of less than one block. O(1). Raises: `ValueError`.

        With host memory, the bound of the device may be less than a block, because rows in host
        memory get one block on the device anyway. `on_device` checks the device's bound too.
        """
        tiers = (self, self.host) if on_device or self.host is None else (self.host,)
        for tier in tiers:
            if tier is not None and tier.bound is not None and tier.bound < block_bytes:
                raise ValueError(
                    f"{tier.bound_as_given()}: one block of {counted(self.block_size, 'token')} "
                    f"takes {size(block_bytes)} in all layers. Raise {tier.name} to at least "
                    f"{size(block_bytes, round_up=True)}."
                )
