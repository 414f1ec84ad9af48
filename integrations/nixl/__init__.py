"""Files and objects that NVIDIA NIXL reaches as a store for cached blocks: `NixlStore`."""

from kvpager.integrations.nixl.store import NixlStore

__all__ = ["NixlStore"]
