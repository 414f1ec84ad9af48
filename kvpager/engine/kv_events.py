"""Starts the publisher of an engine's KV events."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvpager.blocks.manager import BlockManager
from kvpager.errors import KVPagerError
from kvpager.kv_events.block_names import ContentNames
from kvpager.kv_events.settings import KVEvents
from kvpager.scheduling.request import split_lora
from kvpager.scheduling.scheduler import Scheduler
from kvpager.storage.tiers.tiering import Tiering

if TYPE_CHECKING:  # needs the extra `events`
    from kvpager.kv_events.publisher import Publisher


def publish(scheduler: Scheduler, settings: KVEvents, tiering: Tiering | None) -> Publisher:
    """Start to publish the prefix cache of a scheduler. O(1).

    With `tiering`, content keys are those of the stores. Raises: as `Publisher`, and `KVPagerError`
    for a scheduler that shares no prefixes.
    """
    from kvpager.kv_events.publisher import Publisher

    manager = scheduler.manager
    if not scheduler.prefix_cache:
        raise KVPagerError("kv_events: this model shares no prefixes. Leave kv_events out.")
    if not isinstance(manager, BlockManager):
        raise TypeError(f"kv_events: {type(manager).__name__} logs no events. Leave kv_events out.")
    names = None
    if tiering is not None and settings.block_hashes == "kvpager":
        names = ContentNames(manager.block_size, tiering.context_of, manager.windows)
    return Publisher(manager, settings, names=names, read_lora=split_lora)
