"""kvpager's stores below SGLang's HiCache: `offload`."""

from kvpager.integrations.sglang.hicache import KvpagerHiCache
from kvpager.integrations.sglang.options import offload

__all__ = ["KvpagerHiCache", "offload"]
