"""Events of a manager as messages of vLLM's `BlockStored`, `BlockRemoved`, `AllBlocksCleared`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from kvpager.blocks.event_log import Event
from kvpager.kv_events.block_names import Block, BlockNames
from kvpager.kv_events.wire import WINDOW, Message
from kvpager.plans import Int32

_MEDIUM = "GPU"  # vLLM's word for the device pool, also on a CPU
_STORED, _REMOVED, _CLEARED = "BlockStored", "BlockRemoved", "AllBlocksCleared"
_GROUP = "group_idx"
ReadLora = Callable[[str | None], tuple[str | None, int]]


class Translator:
    """Follows the events of one manager. Remembers the name of each published block.

    Args:
        names: names blocks by their content.
        windows: of the manager's groups of layers.
        int_hashes: show names as ints of 64 bits.
        read_lora: returns the adapter's name of an event's `lora`, and the version of the cache.
            Blocks of an older version can no longer be hit: they are cleared.
    """

    def __init__(
        self,
        names: BlockNames,
        *,
        windows: tuple[int | None, ...] = (None,),
        int_hashes: bool = True,
        read_lora: ReadLora = lambda lora: (lora, 0),
    ) -> None:
        self._names = names
        self._windows = windows
        self._int_hashes = int_hashes
        self._read_lora = read_lora
        self._version = 0
        self._known: dict[int, tuple[bytes, int]] = {}  # name and group of each published block

    def translate(self, events: Iterable[Event]) -> list[Message]:
        """Return the messages of events, none of them `lost`. O(tokens).

        Blocks that are stored or removed one after the other share a message.
        """
        messages: list[Message] = []
        for event in events:
            if event.kind == "stored":
                self._store(event, messages)
            elif event.kind == "removed":
                self._remove(event.blocks, messages)
            elif event.kind == "moved" and event.copies is not None:
                for old, new in event.copies.tolist():
                    if old in self._known:
                        self._known[new] = self._known.pop(old)
        return messages

    def restart(self, published: Iterable[Event]) -> list[Message]:
        """Return messages for a router that knows nothing. O(tokens).

        `published` is from `manager.events.restart`.
        """
        self._known.clear()
        return [{"type": _CLEARED}, *self.translate(published)]

    def _store(self, event: Event, messages: list[Message]) -> None:
        lora, version = self._read_lora(event.lora)
        if version < self._version:
            return
        if version > self._version:
            self._version = version
            self._known.clear()
            messages[:] = [{"type": _CLEARED}]
        blocks = _blocks(event, lora)
        if event.digest is not None:
            before = self._names.before(blocks[0])
        else:
            before = self._known[event.parent][0] if event.parent >= 0 else None
        if before is None and event.position:  # the block before it left long ago
            return
        message = self._message(messages, before, blocks[0])
        for number, block in zip(event.blocks.tolist(), blocks, strict=True):
            before = self._names.name(before, block)
            self._known[number] = before, event.group
            message["block_hashes"].append(self._shown(before))
            message["token_ids"] += block.tokens.tolist()
            message["extra_keys"].append(_extra_keys(block))

    def _message(self, messages: list[Message], before: bytes | None, block: Block) -> Message:
        """Return the message to add blocks to: the last one if it ends with the block `before`."""
        parent, window = None if before is None else self._shown(before), self._windows[block.group]
        if before is not None and messages and messages[-1]["type"] == _STORED:
            last = messages[-1]
            place = last["block_hashes"][-1], last["lora_name"], last[_GROUP]
            if place == (parent, block.lora, block.group):
                return last
        message: Message = {
            "type": _STORED,
            "block_hashes": [],
            "parent_block_hash": parent,
            "token_ids": [],
            "block_size": len(block.tokens),
            "lora_id": None,
            "medium": _MEDIUM,
            "lora_name": block.lora,
            "extra_keys": [],
            _GROUP: block.group,
            "kv_cache_spec_kind": "full_attention" if window is None else "sliding_window",
            WINDOW: window,
        }
        messages.append(message)
        return message

    def _remove(self, blocks: Int32, messages: list[Message]) -> None:
        for number in blocks.tolist():
            name, group = self._known.pop(number, (None, 0))
            if name is None:  # of an older version of the cache
                continue
            if not messages or (_REMOVED, group) != (
                messages[-1]["type"],
                messages[-1].get(_GROUP),
            ):
                gone = {"block_hashes": [], "medium": _MEDIUM, _GROUP: group}
                messages.append({"type": _REMOVED, **gone})
            messages[-1]["block_hashes"].append(self._shown(name))

    def _shown(self, name: bytes) -> int | bytes:
        return int.from_bytes(name[-8:], "big") if self._int_hashes else name


def _blocks(event: Event, lora: str | None) -> list[Block]:
    """Return the blocks of a stored event."""
    assert event.tokens is not None
    tag = event.mm_hashes or None
    digests = event.digest, event.digest_before
    return [
        Block(tokens, event.position + index, event.namespace, lora, tag, event.group, *digests)
        for index, tokens in enumerate(event.tokens)
    ]


def _extra_keys(block: Block) -> tuple[Any, ...] | None:
    """Return what a block depends on besides tokens, in vLLM's order and without its tags."""
    keys: list[Any] = [] if block.lora is None else [block.lora]
    keys += block.mm_items
    if block.namespace is not None and not block.position:
        keys.append(block.namespace)
    return tuple(keys) or None
