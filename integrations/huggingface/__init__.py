"""Paged KV caches for transformers models: `patch`, `PagedCache` and `Engine`."""

from kvpager.integrations.huggingface.cache.paged_cache import PagedCache
from kvpager.integrations.huggingface.engine import Engine
from kvpager.integrations.huggingface.patching.handle import Patch
from kvpager.integrations.huggingface.patching.patch import patch, unpatch

__all__ = ["Engine", "PagedCache", "Patch", "patch", "unpatch"]
