"""Batches of KV events as vLLM's msgpack: [time, messages, rank].

A message is a map with its `type`, as from vLLM 0.24 on. Before that it was an array: the type,
then the values in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from kvpager.kv_events.settings import Encoding

Message = dict[str, Any]  # its fields in vLLM's order

WINDOW = "kv_cache_spec_sliding_window"  # the one field that maps leave out if it is None
SEQUENCE_BYTES = 8
END = (-1).to_bytes(SEQUENCE_BYTES, "big", signed=True)  # closes a replay


def encode_batch(
    messages: Iterable[Message], seconds: float, rank: int, encoding: Encoding
) -> bytes:
    """Return the payload of a batch of events at a time, in seconds since 1970. O(bytes)."""
    shown: list[Any]
    if encoding == "arrays":
        shown = [list(message.values()) for message in messages]
    else:
        shown = [_without_defaults(message) for message in messages]
    return msgspec.msgpack.encode([seconds, shown, rank])


def _without_defaults(message: Message) -> Message:
    return {name: message[name] for name in message if name != WINDOW or message[name] is not None}


def sequence_frame(number: int) -> bytes:
    """Return the frame of a batch's number: 8 bytes, the highest first. O(1)."""
    return number.to_bytes(SEQUENCE_BYTES, "big")
