"""A router that follows KV events: what it knows of an engine's cache, from the wire alone."""

from __future__ import annotations

from typing import Any

import msgspec
import zmq

TIMEOUT_MS = 20_000
END = b"\xff" * 8


class Router:
    """Subscribes to a publisher, and asks for the batches that it missed.

    Attributes:
        index: the parent of each block that it knows, by group and name.
        messages: all messages so far, in order.
        next_number: of the batch that it waits for.
    """

    def __init__(self, publisher: Any, topic: str = "") -> None:
        self.index: dict[Any, Any] = {}
        self.messages: list[Any] = []
        self.next_number = 0
        self._context = zmq.Context()
        self._events = self._context.socket(zmq.SUB)
        self._events.connect(publisher.endpoint)
        self._events.subscribe(topic.encode())
        self._replay = self._context.socket(zmq.DEALER)
        if publisher.replay_endpoint is not None:
            self._replay.connect(publisher.replay_endpoint)

    def hear(self, timeout_ms: int = TIMEOUT_MS) -> list[bytes] | None:
        """Return the frames of the next published batch, or None."""
        return self._events.recv_multipart() if self._events.poll(timeout_ms) else None

    def ask(self, number: bytes) -> list[list[bytes]]:
        """Return the batches of a replay, without the router's own two frames."""
        self._replay.send_multipart([b"", number])
        batches = list[list[bytes]]()
        while True:
            assert self._replay.poll(TIMEOUT_MS), "no answer"
            frames = self._replay.recv_multipart()[1:]
            if frames[-2] == END:
                return batches
            batches.append(frames)

    def catch_up(self) -> int:
        """Learn all that happened since the last batch. Return the number of batches."""
        batches = self.ask(self.next_number.to_bytes(8, "big"))
        for *_, number, payload in batches:
            self.learn(number, payload)
        return len(batches)

    def learn(self, number: bytes, payload: bytes) -> None:
        """Apply a batch."""
        self.next_number = int.from_bytes(number, "big") + 1
        _, messages, _ = msgspec.msgpack.decode(payload)
        self.messages += messages
        for message in messages:
            self._apply(message)

    def _apply(self, message: dict[str, Any]) -> None:
        apply(self.index, message)

    def close(self) -> None:
        self._context.destroy(linger=0)

    def __enter__(self) -> Router:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def apply(index: dict[Any, Any], message: dict[str, Any]) -> None:
    """Apply a message to an index, by group and name."""
    if message["type"] == "AllBlocksCleared":
        index.clear()
        return
    group = message["group_idx"]
    if message["type"] == "BlockRemoved":
        for name in message["block_hashes"]:
            del index[group, name]
        return
    before = message["parent_block_hash"]
    windowed = message.get("kv_cache_spec_sliding_window") is not None
    for name in message["block_hashes"]:
        assert before is None or windowed or (group, before) in index, "stored before its front"
        assert (group, name) not in index, "stored twice"
        index[group, name] = before
        before = name
