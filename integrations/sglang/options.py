"""The settings of a user: from `offload`, or from the flags of SGLang's server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpager import _validate as arguments
from kvpager.storage.tiers.urls import checked_tiers

_LOADED = {
    "backend_name": "kvpager",
    "module_path": "kvpager.integrations.sglang.hicache",
    "class_name": "KvpagerHiCache",
    "interface_v1": 1,  # pages by their place in host memory, not as tensors of their own
}
# SGLang's own settings in the same JSON. SGLang removes `_PREFETCH` before kvpager sees them.
_PREFETCH = ("prefetch_threshold", "prefetch_timeout_base", "prefetch_timeout_per_ki_token")
_IGNORED = ("allocator", "file_storage_path", "hicache_storage_pass_prefix_keys", "tp_lcm_size")


@dataclass(frozen=True)
class Options:
    """The settings of kvpager in `hicache_storage_backend_extra_config`.

    Attributes:
        tiers: URLs of the stores, in the order in which they are asked.
        model_id: the name of the model in the stores; None for a digest of its files.
    """

    tiers: tuple[str, ...]
    model_id: str | None = None

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> Options:
        """Read and check settings. Raises: `ValueError`, `TypeError` for a bad one."""
        known = {*cls.__dataclass_fields__, *_PREFETCH}
        if unknown := sorted(extra.keys() - known - _LOADED.keys() - set(_IGNORED)):
            raise ValueError(
                f"{unknown[0]}: kvpager has no such setting for SGLang. "
                f"Use {', '.join(sorted(known))}"
            )
        if not extra.get("interface_v1"):
            raise ValueError(
                "interface_v1: expected 1. kvpager.integrations.sglang.offload sets it"
            )
        given = extra.get("tiers", ())
        tiers = (given,) if isinstance(given, str) else tuple(given)
        if not all(isinstance(tier, str) for tier in tiers):
            raise TypeError("tiers: expected URLs. The processes of SGLang open the stores.")
        if not tiers:
            raise ValueError(
                'tiers: expected at least one store, such as "disk:/var/cache/kv?capacity=200GiB"'
            )
        checked_tiers(tiers)
        model_id = extra.get("model_id")
        arguments.label("model_id", model_id)
        return cls(tiers, model_id)


def offload(
    tiers: str | Sequence[str], *, model_id: str | None = None, **settings: Any
) -> dict[str, Any]:
    """Return the arguments with which SGLang keeps pages in kvpager's stores.

    Pass them as `sglang.Engine(..., **offload("disk:/var/cache/kv?capacity=200GiB"))`.

    Args:
        tiers: URLs of stores below SGLang's host memory, such as `"valkey://cache:6379"`.
        model_id: the name of the model in the stores, such as `"llama-3-8b@8cde5ca"`; by default, a
            digest of its files.
        settings: SGLang's own, whose names begin with `hicache_`: `hicache_size`,
            `hicache_mem_layout`. Also `prefetch_threshold`, `prefetch_timeout_base` and
            `prefetch_timeout_per_ki_token`.

    Raises: `ValueError`, `TypeError` for a bad argument.
    """
    extra: dict[str, Any] = {
        **_LOADED,
        "tiers": [tiers] if isinstance(tiers, str) else list(tiers),
        **({} if model_id is None else {"model_id": model_id}),
        **{name: settings.pop(name) for name in _PREFETCH if name in settings},
    }
    Options.of(extra)
    ours = {
        "enable_hierarchical_cache": True,
        "hicache_storage_backend": "dynamic",
        "hicache_storage_backend_extra_config": json.dumps(extra),
    }
    for name in settings:
        if not name.startswith("hicache_") or name in ours:
            raise ValueError(f"{name}: expected a setting of HiCache, such as hicache_size")
    return {**ours, **settings}
