"""A thread that sends the events of a manager to routers: ZeroMQ PUB, and ROUTER for replays.

    with Publisher(manager, "tcp://127.0.0.1:5557"):      # BlockManager(..., num_events=10_000)
        ...

    PUB     [topic, number, payload]                      a batch; numbers count from 0
    ROUTER  [id, "", number] ─▶ [id, "", topic, number, payload] ..., [id, "", "", -1, ""]

No step waits for a router: the thread polls the manager's bounded log, and ZeroMQ drops batches
of a router that is too slow. The router sees the gap in the numbers, and asks for a replay. If
events or batches are missing, the thread sends `AllBlocksCleared` and all cached blocks.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from kvpager import _validate as arguments
from kvpager.blocks.event_log import Event
from kvpager.blocks.manager import BlockManager
from kvpager.kv_events.block_names import BlockNames, ContentNames, VLLMHashes
from kvpager.kv_events.settings import KVEvents
from kvpager.kv_events.translator import ReadLora, Translator

try:
    import zmq

    from kvpager.kv_events import wire
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'KV events need {error.name}. Install it with: pip install "kvpager[events]"',
        name=error.name,
    ) from None

logger = logging.getLogger("kvpager")

_LINGER_MS = 500  # how long `close` waits at most for routers to receive the last batch


class Publisher:
    """Publishes which blocks a manager has cached. Close it, or use it as a context manager.

    Args:
        manager: made with `num_events`. No other code may fetch its events.
        settings: an address, or `KVEvents`.
        names: names blocks; by default as `settings.block_hashes` says.
        read_lora: as in `Translator`.

    Attributes:
        endpoint, replay_endpoint: the addresses, with the port that the system chose.
        error: the defect that stopped the thread, or None.

    Raises: `OSError` for an address that cannot be used; `ModuleNotFoundError` without the extra
    `events`; `TypeError`, `ValueError` for invalid arguments.
    """

    def __init__(
        self,
        manager: BlockManager,
        settings: str | KVEvents,
        *,
        names: BlockNames | None = None,
        read_lora: ReadLora = lambda lora: (lora, 0),
    ) -> None:
        self.settings = settings = KVEvents.of(settings)
        self.error: BaseException | None = None
        self._events = manager.events
        self._events.fetch()  # raises if none are logged
        self._translator = Translator(
            names or names_of(settings, manager),
            windows=manager.windows,
            int_hashes=settings.int_hashes,
            read_lora=read_lora,
        )
        self._sent = SentBatches(settings)
        self._process_id = os.getpid()
        self._ending = threading.Event()
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            self._open_sockets()
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._run, name="kvpager-events", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def _open_sockets(self) -> None:
        settings, self._replay = self.settings, None
        self._pub = self._socket(zmq.PUB, settings.endpoint)
        if settings.connect:
            self._pub.connect(settings.endpoint)
            self.endpoint: str = settings.endpoint
        else:
            self.endpoint = _bind(self._pub, "endpoint", settings.endpoint)
        self.replay_endpoint: str | None = None
        if settings.replay_endpoint is not None:
            self._replay = self._socket(zmq.ROUTER, settings.replay_endpoint)
            self._replay.setsockopt(zmq.ROUTER_MANDATORY, 1)  # raise if a queue is full
            self.replay_endpoint = _bind(self._replay, "replay_endpoint", settings.replay_endpoint)

    def _socket(self, kind: int, address: str) -> Any:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, self.settings.queue_size + 1)  # 1: the end of a replay
        socket.setsockopt(zmq.IPV6, "[" in address)
        return socket

    def close(self) -> None:
        """Tell routers that no block is cached, and end the thread. Idempotent.

        Does nothing in a forked process. Takes at most `interval_s`, and half a second for slow
        routers.
        """
        if os.getpid() == self._process_id:
            self._ending.set()
            self._thread.join()
            atexit.unregister(self.close)

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            self._send_all()
            while not self._ending.is_set():
                self._send_news()
                self._wait()
            self._send(self._translator.restart(()))  # later removals go unreported
        except Exception as error:
            self.error = error
            logger.exception("no more KV events are published")
        finally:
            self._context.destroy(linger=_LINGER_MS)

    def _send_news(self) -> None:
        events = self._events.fetch()
        if events and events[0].kind == "lost":
            self._send_all()
        else:
            self._send(self._translator.translate(events))

    def _send_all(self) -> None:
        """Clear what routers know, and send all cached blocks. O(tokens)."""
        published: list[Event] = self._events.restart()
        self._sent.snapshot = self._sent.next_number
        self._send(self._translator.restart(published))

    def _send(self, messages: list[wire.Message]) -> None:
        if not messages:
            return
        settings = self.settings
        payload = wire.encode_batch(messages, time.time(), settings.rank, settings.encoding)
        number = wire.sequence_frame(self._sent.add(payload))
        self._pub.send_multipart((settings.topic.encode(), number, payload))

    def _wait(self) -> None:
        """Wait for `interval_s`, or until a replay was asked for and answered."""
        if self._replay is None:
            self._ending.wait(self.settings.interval_s)
        elif self._replay.poll(self.settings.interval_s * 1000):
            self._answer(self._replay, self._replay.recv_multipart())

    def _answer(self, replay: Any, frames: list[bytes]) -> None:
        """Send the batches from a number on, as far as the router's queue has room."""
        if len(frames) != 3 or len(frames[2]) != wire.SEQUENCE_BYTES:
            logger.warning("KV events: a replay was asked for in a form that is not vLLM's")
            return
        self._send_news()
        client, start = frames[0], int.from_bytes(frames[2], "big")
        if not self._sent.has(start):
            if not self._sent.has(self._sent.snapshot):
                self._send_all()
            start = self._sent.snapshot
        topic = (self.settings.topic.encode(),) if self.settings.encoding == "maps" else ()
        try:
            for number, payload in self._sent.since(start):
                frame = wire.sequence_frame(number)
                replay.send_multipart((client, b"", *topic, frame, payload), zmq.NOBLOCK)
            end = (*(b"" for _ in topic), wire.END, b"")
            replay.send_multipart((client, b"", *end), zmq.NOBLOCK)
        except zmq.ZMQError as error:  # the router is gone, or does not read: it asks again
            logger.debug("KV events: a replay was not finished: %s", error)


class SentBatches:
    """The last batches, for replays: at most `replay_memory` bytes and `queue_size` batches.

    Attributes:
        next_number: the number of the next batch.
        snapshot: the number of the last batch that began with all blocks cleared.
    """

    def __init__(self, settings: KVEvents) -> None:
        self.next_number = self.snapshot = 0
        self._batches: deque[tuple[int, bytes]] = deque()
        self._num_bytes = 0
        self._bytes_max = arguments.parse_memory(settings.replay_memory) or 0
        self._count_max = settings.queue_size if settings.replay_endpoint is not None else 0

    def add(self, payload: bytes) -> int:
        """Keep a batch; return its number. Amortised O(1)."""
        number, self.next_number = self.next_number, self.next_number + 1
        self._batches.append((number, payload))
        self._num_bytes += len(payload)
        while len(self._batches) > self._count_max or self._num_bytes > self._bytes_max:
            self._num_bytes -= len(self._batches.popleft()[1])
        return number

    def has(self, number: int) -> bool:
        """Return True if all batches from `number` on are kept, or it is the next number. O(1)."""
        return self.next_number - len(self._batches) <= number <= self.next_number

    def since(self, number: int) -> Iterator[tuple[int, bytes]]:
        """Yield the kept batches from `number` on, with their numbers. O(batches)."""
        return (batch for batch in self._batches if batch[0] >= number)


def names_of(settings: KVEvents, manager: BlockManager) -> BlockNames:
    """Return the names for the blocks of a manager that the settings choose. O(1)."""
    if settings.block_hashes == "kvpager":
        return ContentNames(manager.block_size, windows=manager.windows)
    return VLLMHashes(settings.block_hashes, settings.lora_paths, 4 * manager.num_blocks)


def _bind(socket: Any, name: str, address: str) -> str:
    """Bind a socket; return its address, with the port."""
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        raise OSError(f"{name}={address!r}: {error}. Choose another address.") from None
    bound: str = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    return bound
