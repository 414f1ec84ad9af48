"""kvpager's adapter for vLLM, over vLLM or over stand-ins, and small parts to test it with."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from kvpager.blocks.policies import make_policy
from kvpager.storage.tiers.keyed import KeyedTier
from kvpager.storage.tiers.protocol import BlockStore
from tests.support.vllm_stand_ins import installed

with installed():
    from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCacheTensor

    from kvpager.integrations.vllm import (
        attention,
        cache_policy,
        connector,
        cross_stack,
        identity,
        interface,
        opening,
        options,
        page_order,
        releases,
        secondary,
        spec,
        synchronous,
    )
    from kvpager.integrations.vllm.host_rows import HostRows
    from kvpager.integrations.vllm.lower_tiers import LowerTiers
    from kvpager.integrations.vllm.manager import KvpagerOffloadingManager
    from kvpager.integrations.vllm.worker import KvpagerOffloadingWorker, Slots

__all__ = [
    "HostRows",
    "KvpagerOffloadingManager",
    "KvpagerOffloadingWorker",
    "LowerTiers",
    "Node",
    "Slots",
    "attention",
    "cache_policy",
    "caches_of",
    "connector",
    "context_of",
    "cross_stack",
    "identity",
    "interface",
    "key_of",
    "model_config",
    "offloading_config",
    "opening",
    "options",
    "page_order",
    "releases",
    "secondary",
    "spec",
    "synchronous",
]

LookupResult = interface.LookupResult
_names = itertools.count()


def key_of(number: int, group: int = 0) -> Any:
    """Return a key as vLLM makes them: a hash and the number of a group."""
    return number.to_bytes(32, "big") + group.to_bytes(4, "big")


def context_of(keys: Sequence[bytes] = ()) -> Any:
    """Return the context of a new request with `keys`, in order."""
    context = interface.ReqContext(f"request-{next(_names)}")
    for position, key in enumerate(keys):
        context.set_offload_key_position(key, position)
    return context


def caches_of(
    groups: Sequence[Sequence[int]], num_blocks: int, page_bytes: int, seed: int = 0
) -> Any:
    """Return pages of random bytes. `groups` names the tensors of each group's layers."""
    make = torch.Generator().manual_seed(seed)
    count = max(itertools.chain(*groups)) + 1
    tensors = [
        torch.randint(-128, 128, (num_blocks, page_bytes), dtype=torch.int8, generator=make)
        for _ in range(count)
    ]
    refs = [[CanonicalKVCacheRef(number, page_bytes) for number in group] for group in groups]
    made = [CanonicalKVCacheTensor(tensor, page_bytes) for tensor in tensors]
    return interface.CanonicalKVCaches(made, refs)


def model_config(**settings: Any) -> Any:
    """Return the part of vLLM's model configuration that names a model."""
    hf_config = SimpleNamespace(to_dict=lambda: {"_name_or_path": os.urandom(4), **settings})
    return SimpleNamespace(hf_config=hf_config, quantization=None, dtype="float32")


def offloading_config(
    extra: dict[str, Any] | None = None, *, model: str = "a/b", **settings: Any
) -> Any:
    """Return the part of vLLM's configuration that a spec gets."""
    parallel = dict(rank=0, world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1)  # noqa: C408
    group = SimpleNamespace(group_id=0, tokens_per_block=16, layer_names=("layers.0",))
    made = SimpleNamespace(
        groups=(group,),
        worker_kv_bytes_per_block=3000,
        enable_kv_cache_events=False,
        extra_config={"host_memory": "1MiB", **(extra or {})},
        engine_id=f"test-{os.urandom(6).hex()}",
        model=SimpleNamespace(name=model, dtype="float32"),
        cache=SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=2),
        parallel=SimpleNamespace(**parallel),
        kv_cache_layout="LBHNC",
        replicated_layout=False,
        canonical_layout=False,
    )
    vars(made).update(settings)
    return made


class Node:
    """A manager and a worker over shared rows, with the calls of vLLM's scheduler."""

    def __init__(
        self,
        folder: Path,
        num_slots: int = 8,
        stores: Sequence[BlockStore] = (),
        *,
        caches: Any = None,
        per_chunk: int = 1,
        block_bytes: int = 64,
        events: bool = False,
        eviction: str = "lru",
    ) -> None:
        name, row_bytes = f"node-{next(_names)}", block_bytes * per_chunk
        size = {"num_processes": 2, "folder": str(folder)}
        rows = HostRows(name, num_slots, row_bytes, **size)
        self.caches = caches or caches_of([[0]], 16, block_bytes)
        self.worker = KvpagerOffloadingWorker(
            self.caches,
            HostRows(name, num_slots, row_bytes, **size),
            rank=0,
            block_bytes=block_bytes,
            blocks_per_chunk=per_chunk,
        )
        lower = LowerTiers(stores, rows.rows, lambda key: key[:32]) if stores else None
        self.manager = KvpagerOffloadingManager(
            lambda: KeyedTier(num_slots, make_policy(eviction, num_slots)),
            rows,
            lower,
            events=events,
        )
        self.lower = lower

    def save(self, keys: Sequence[bytes], blocks: Sequence[int], context: Any = None) -> list[Any]:
        """Store one block for each key of group 0. Returns the keys that were stored."""
        context = context or context_of(keys)
        output = self.manager.prepare_store(keys, context)
        if output is None:
            return []
        chosen = [blocks[keys.index(key)] for key in output.keys_to_store]
        device = interface.GPULoadStoreSpec(chosen, [len(chosen)], [0])
        self.worker.submit_store(0, device, output.store_spec)
        self.manager.complete_store(set(output.keys_to_store), context)
        return output.keys_to_store

    def load(self, keys: Sequence[bytes], blocks: Sequence[int], context: Any) -> None:
        """Load one block for each key of group 0."""
        host = self.manager.prepare_load(keys, context)
        device = interface.GPULoadStoreSpec(list(blocks), [len(blocks)], [0])
        self.worker.submit_load(0, host, device)
        self.manager.complete_load(set(keys), context)

    def look_up(self, keys: Sequence[bytes], context: Any) -> list[Any]:
        """Look all keys up, end the step, and wait for the stores."""
        found = [self.manager.lookup(key, context) for key in keys]
        self.manager.on_schedule_end(SimpleNamespace())
        if self.lower is not None:
            self.lower.drain()
        return found

    def blocks(self, numbers: Sequence[int]) -> Any:
        """Return a copy of the bytes of blocks of the device."""
        return np.stack([self.caches.tensors[0].tensor[number].numpy() for number in numbers])

    def close(self) -> None:
        self.manager.shutdown()


@contextlib.contextmanager
def closing(node: Node) -> Iterator[Node]:
    """Close a node, after a check that it left nothing pinned and nothing half written."""
    try:
        yield node
        if node.lower is not None:
            node.lower.drain()
        node.manager._tier.check()
        assert not any(node.manager._tier._pins)
        assert not node.manager._writing
    finally:
        node.close()
