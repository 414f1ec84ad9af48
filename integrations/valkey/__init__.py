"""A Valkey or Redis server as a store for cached blocks: `ValkeyStore`."""

from kvpager.integrations.valkey.inspector import ValkeyInspector
from kvpager.integrations.valkey.store import ValkeyStore

__all__ = ["ValkeyInspector", "ValkeyStore"]
