"""kvpager's adapter for SGLang, over SGLang or over stand-ins, and small parts to test it with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tests.support.sglang_stand_ins import installed

with installed():
    from kvpager.integrations.sglang import hicache, identity, interface, options, pages, releases

__all__ = [
    "LAYOUTS",
    "HostPool",
    "config_of",
    "hicache",
    "hicache_of",
    "identity",
    "interface",
    "model_of",
    "options",
    "pages",
    "releases",
    "tokens_of",
]

LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")
_LAYERS, _HEADS, _DIM = 3, 2, 8


class HostPool:
    """Pages in host memory, in the layouts of SGLang's pool for full attention."""

    storage_format_tag = None
    layer_num = target_layer_num = _LAYERS
    start_layer, end_layer = 0, _LAYERS

    def __init__(
        self, layout: str, *, num_pages: int = 8, page_size: int = 4, dtype: Any = torch.bfloat16
    ) -> None:
        self.layout, self.page_size, self.dtype = layout, page_size, dtype
        size = num_pages * page_size
        shape = {
            "layer_first": (2, _LAYERS, size, _HEADS, _DIM),
            "page_first": (2, size, _LAYERS, _HEADS, _DIM),
            "page_first_direct": (2, num_pages, _LAYERS, page_size, _HEADS, _DIM),
            "page_head": (2, num_pages, _HEADS, page_size, _LAYERS, _DIM),
            "latent": (size, _LAYERS, 1, _DIM),
        }[layout]
        self.kv_buffer = torch.randn(shape).to(dtype)

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        tokens, page = slice(index, index + self.page_size), index // self.page_size
        if self.layout == "layer_first":
            data = self.kv_buffer[:, :, tokens]
        elif self.layout == "page_first":
            data = self.kv_buffer[:, tokens]
        elif self.layout == "latent":
            data = self.kv_buffer[tokens]
        else:
            data = self.kv_buffer[:, page : page + 1]
        return data.flatten() if flat else data

    def page(self, number: int) -> torch.Tensor:
        """Return a copy of a page."""
        return self.get_data_page(number * self.page_size).clone()


def tokens_of(pool: HostPool, *numbers: int) -> torch.Tensor:
    """Return the indices of the tokens of pages, as SGLang names them."""
    size = pool.page_size
    return torch.cat([torch.arange(number * size, (number + 1) * size) for number in numbers])


def config_of(tiers: Any = "host:1MiB", **settings: Any) -> Any:
    extra = {"interface_v1": 1, "tiers": tiers, **settings.pop("extra", {})}
    named = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "is_page_first_layout": True,
        "model_name": "served",
        **settings,
    }
    return interface.HiCacheStorageConfig(**named, extra_config=extra)


def model_of(**settings: Any) -> Any:
    """Return SGLang's settings of a model."""
    named = {
        "model_path": "a/b",
        "dtype": "bfloat16",
        "json_model_override_args": "{}",
        "kv_cache_dtype": "auto",
        "model_impl": "auto",
        "quantization": None,
        "quantization_param_path": None,
        **settings,
    }
    return SimpleNamespace(**named)


def hicache_of(monkeypatch: Any, pool: Any, config: Any = None, model: Any = None) -> Any:
    """Return a storage that is ready, with the stores of `config`."""
    monkeypatch.setattr(hicache, "get_model", lambda: model or model_of())
    made = hicache.KvpagerHiCache(config or config_of())
    made.register_mem_pool_host(pool)
    return made
