"""kvpager's stores as the storage of SGLang's HiCache."""

from __future__ import annotations

import logging
import time
from typing import Any, NoReturn

import numpy as np
import torch

from kvpager.integrations.sglang.identity import page_layout, rank_name, store_keys
from kvpager.integrations.sglang.interface import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolName,
    get_model,
)
from kvpager.integrations.sglang.options import Options
from kvpager.integrations.sglang.pages import Bytes, HostPages
from kvpager.storage.tiers.asking import found_in, is_bypassed, outcomes_of
from kvpager.storage.tiers.protocol import BlockStore, Loaded, Saved
from kvpager.storage.tiers.urls import are_private, bare_url, open_stores

logger = logging.getLogger("kvpager")

_FETCH_S, _SAVE_S = 5.0, 30.0  # of one call, for up to 128 pages


class KvpagerHiCache(HiCacheStorage):  # type: ignore[misc]
    """Keeps the pages of one rank in kvpager's stores.

    SGLang calls it from threads of its own: one looks pages up, one loads, one saves. SGLang's keys
    are digests of the tokens, the `cache_salt`, the `extra_key` and the LoRA adapter of a request.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Any = None) -> None:
        """Read the settings. Raises: `ValueError`, `TypeError` for a bad one."""
        self._config = storage_config
        self._options = Options.of(storage_config.extra_config or {})
        if storage_config.should_split_heads:
            raise NotImplementedError("tp_lcm_size: kvpager keeps whole pages. Leave it out.")
        self._stores = list[BlockStore]()

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self._pages = HostPages(mem_pool_host)
        model, model_id = get_model(), self._options.model_id
        if are_private(self._options.tiers):
            model_id = model_id or model.model_path
        layout = page_layout(self._config, model, self._pages, model_id)
        self._keys = store_keys(layout, self._pages.num_parts)
        self._stores = open_stores(rank_tiers(self._options.tiers, self._config), layout=layout)
        logger.info("kvpager keeps pages of SGLang in %s: %s", self._options.tiers, layout.text)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if host_pool_name != PoolName.KV:
            raise NotImplementedError(
                f"kvpager cannot keep SGLang's pool {str(host_pool_name)!r}. It serves models "
                "whose layers all have full attention, without a draft model. Remove "
                "hicache_storage_backend."
            )

    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        names, position = self._keys(keys), 0
        for store in self._stores:
            position += found_in(store, names[position:])
        return position // self._pages.num_parts

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        deadline = time.monotonic() + _FETCH_S
        return self._in_batches(self._load, keys, host_indices, deadline)

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        deadline = time.monotonic() + _SAVE_S
        return self._in_batches(self._save, keys, host_indices, deadline)

    def clear(self) -> None:
        logger.warning(
            "kvpager: the stores keep their blocks, which other processes may use. Empty the "
            "directory or the server instead."
        )

    def close(self) -> None:
        """Close the stores."""
        for store in self._stores:
            store.close()
        self._stores = []

    def _in_batches(
        self, move: Any, keys: list[str], host_indices: torch.Tensor, deadline: float
    ) -> list[bool]:
        """Move pages in batches. Returns True for each page that was moved."""
        pages, moved = self._pages, list[bool]()
        size = len(host_indices) // max(len(keys), 1)  # tokens of a page
        for start in range(0, len(keys), pages.batch):
            batch = keys[start : start + pages.batch]
            indices = host_indices[start * size : (start + len(batch)) * size]
            parts = move(self._keys(batch), pages.parts(indices), deadline)
            moved += parts.reshape(len(batch), pages.num_parts).all(axis=1).tolist()
        return moved

    def _load(self, names: list[bytes], parts: list[Bytes], deadline: float) -> Any:
        arrived = np.zeros(len(names), bool)
        # A part in pieces is loaded into a copy.
        buffers = [
            part if part.flags.c_contiguous else np.empty_like(part, order="C") for part in parts
        ]
        for store in self._stores:
            missing = np.flatnonzero(~arrived)
            if not len(missing):
                break
            into = [_flat(buffers[number]) for number in missing]
            lacked = [names[number] for number in missing]
            outcomes = outcomes_of(store, "load", lacked, into, deadline)
            arrived[missing] = outcomes == Loaded.HIT
        for number in np.flatnonzero(arrived):
            if buffers[number] is not parts[number]:
                parts[number][...] = buffers[number]
        return arrived

    def _save(self, names: list[bytes], parts: list[Bytes], deadline: float) -> Any:
        kept = np.zeros(len(names), bool)
        blocks = [_flat(np.ascontiguousarray(part)) for part in parts]
        for store in self._stores:
            if not is_bypassed(store):
                outcomes = outcomes_of(store, "save", names, blocks, deadline)
                kept |= (outcomes == Saved.SAVED) | (outcomes == Saved.KNOWN)
        return kept

    # SGLang calls these only without `interface_v1`.

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> NoReturn:
        raise NotImplementedError("interface_v1: expected 1")

    batch_get = set = batch_set = get


def _flat(part: Bytes) -> memoryview:
    return part.reshape(-1).data


def rank_tiers(tiers: tuple[str, ...], config: HiCacheStorageConfig) -> list[str]:
    """Return the URLs of one rank's stores: a directory serves one process. O(tiers).

    Raises: `ValueError` if only rank 0 would find its pages again.
    """
    if config.tp_size * config.pp_size * config.attn_cp_size == 1:
        return list(tiers)
    if config.is_mla_model and config.tp_size > 1:
        for tier in tiers:
            if tier.startswith("disk:") or are_private([tier]):
                raise ValueError(
                    f"tiers={bare_url(tier)!r}: only rank 0 saves the pages of this model, and the "
                    "other ranks could not read them. Use a server: valkey://host:6379."
                )
    return [_below(tier, rank_name(config)) for tier in tiers]


def _below(tier: str, folder: str) -> str:
    """Return the URL of a folder in the directory of a disk store."""
    scheme, colon, rest = tier.partition(":")
    if scheme != "disk":
        return tier
    path, mark, options = rest.partition("?")
    return f"{scheme}{colon}{path.rstrip('/')}/{folder}{mark}{options}"
