"""The classes of SGLang that kvpager's adapter uses, as small ones: for tests without SGLang.

`installed()` makes them importable under SGLang's names, unless SGLang is installed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tests.support.stand_ins import importable


@dataclass
class HiCacheStorageConfig:
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    attn_cp_rank: int
    attn_cp_size: int
    is_mla_model: bool
    enable_storage_metrics: bool
    is_page_first_layout: bool
    model_name: str | None
    should_split_heads: bool = False
    extra_config: dict[str, Any] | None = None


@dataclass
class HiCacheStorageExtraInfo:
    prefix_keys: list[str] | None = None
    extra_info: dict[str, Any] | None = None


class PoolName(str, Enum):  # noqa: UP042 - its text is the value, as in SGLang
    KV = "kv"
    SWA = "swa"

    def __str__(self) -> str:
        return self.value


class HiCacheStorage(ABC):
    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        self.mem_pool_host = mem_pool_host

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        self.registered_pools = {host_pool_name: host_pool}

    @abstractmethod
    def get(self, key: str) -> Any: ...

    @abstractmethod
    def batch_get(self, keys: list[str]) -> Any: ...

    @abstractmethod
    def set(self, key: str) -> bool: ...

    @abstractmethod
    def batch_set(self, keys: list[str]) -> bool: ...

    @abstractmethod
    def exists(self, key: str) -> bool: ...


def get_model() -> Any:
    raise LookupError("SGLang has no settings here")


_MODULES: dict[str, tuple[Any, ...]] = {
    "sglang.srt.mem_cache.hicache_storage": (
        HiCacheStorage,
        HiCacheStorageConfig,
        HiCacheStorageExtraInfo,
        PoolName,
    ),
    "sglang.srt.runtime_context": (get_model,),
}


def installed(version: str = "0.5.23") -> AbstractContextManager[None]:
    """Make the stand-ins importable as SGLang, unless SGLang is installed."""
    return importable("sglang", version, _MODULES.items())
