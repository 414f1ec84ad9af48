"""`ValkeyStore`: cached blocks that processes and machines share through a server."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import partial
from itertools import takewhile
from typing import TypeVar

import numpy as np
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from kvpager import _validate as arguments
from kvpager.integrations.valkey.address import Address
from kvpager.integrations.valkey.pool import WirePool
from kvpager.integrations.valkey.wire import ServerError, Value, Wire
from kvpager.storage.tiers.breaker import CircuitBreaker
from kvpager.storage.tiers.checks import check_blocks
from kvpager.storage.tiers.counters import StoreCounters
from kvpager.storage.tiers.frame import FRAME_BYTES, Framing
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.protocol import Loaded, Outcomes, Saved, StoreStats
from kvpager.storage.tiers.seals import Seal

PREFIX = b"kvp1:"  # of every key on the server; an ACL user can be confined to it
_PART_BYTES, _PART_KEYS = 32 << 20, 512  # of one request, so that a server buffers no more
_UNUSABLE_MAX = 4096

_T = TypeVar("_T")


class _Ending(Enum):
    DONE = "done"
    LATE = "late"
    FAILED = "failed"
    SKIPPED = "skipped"  # the store is closed or bypassed


class ValkeyStore:
    """A Valkey or Redis server as a `BlockStore`. Any thread may call any method.

    A block is one value, `kvp1:` and the block's content key its name. The server evicts and
    expires blocks by itself. The first writer of a key stays. A server that fails, or takes longer
    than `timeout_s`, three times within 10 s is bypassed, see `CircuitBreaker`. A block whose save
    was late may still arrive. Resolving a host name has no deadline. Servers of a cluster are
    refused.
    """

    def __init__(
        self,
        url: str,
        layout: BlockLayout,
        *,
        seal: Seal | None = None,
        ttl_s: int | None = 86_400,
        timeout_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect to the server at `url` and check that it answers.

        Args:
            url: `valkey://`, `redis://`, `unix://`; with TLS `valkeys://`, `rediss://`. See
                `Address`.
            layout: the layout of the blocks.
            seal: what protects them, `Digest()` unless given.
            ttl_s: seconds that the server keeps a block; None for as long as it has room.
            timeout_s: seconds that connecting, `find` and `drop` may take. A call that an earlier
                deadline ends is no failure of the server.
            clock: the circuit breaker's, in seconds.

        Raises: `ValueError`, `TypeError` for a bad argument; `ConnectionError` for a server that
        does not answer; `PermissionError` for a wrong password or a user without rights.
        """
        self._address = Address(url)
        self._framing = Framing(layout, seal)
        self._ttl_s = None if ttl_s is None else arguments.count("ttl_s", ttl_s, at_least=1)
        self._timeout_s = arguments.number("timeout_s", timeout_s, at_least=1e-3, at_most=3600)
        self._part = max(1, min(_PART_KEYS, _PART_BYTES // layout.block_bytes))
        self._breaker = CircuitBreaker(clock)
        self._counters = StoreCounters(layout.block_bytes)
        self._pool = WirePool(self._address.connect)
        self._unusable: dict[bytes, None] = {}  # bad values, until they are deleted
        self._lock = threading.Lock()
        self._read_only = self._closed = False
        self._check_server()

    @property
    def name(self) -> str:
        return "valkey"

    @property
    def block_bytes(self) -> int:
        return self._framing.layout.block_bytes

    @property
    def bypassed(self) -> bool:
        """True while the server is left alone because it failed."""
        return self._breaker.open

    def find(self, keys: Sequence[bytes]) -> int:
        keys = list(takewhile(lambda key: key not in self._unusable, keys))
        there = list[bool]()
        if keys:
            self._attempt(partial(self._find, keys, there))
        return there.index(False) if False in there else len(there)

    def find_each(self, keys: Sequence[bytes]) -> list[bool]:
        """Return for each key whether the server seems to have the block. O(keys)."""
        there = list[bool]()
        if keys:
            self._attempt(partial(self._find, keys, there, to_the_end=True))
        there += [False] * (len(keys) - len(there))
        return [has and key not in self._unusable for key, has in zip(keys, there, strict=True)]

    def load(self, keys: Sequence[bytes], into: Sequence[memoryview], deadline: float) -> Outcomes:
        start = time.perf_counter()
        views = self._views("into", keys, into)
        asked = [index for index, key in enumerate(keys) if key not in self._unusable]
        wanted, found = [(keys[index], views[index]) for index in asked], list[Loaded]()
        ending = _Ending.DONE
        if wanted:
            ending = self._attempt(partial(self._load, wanted, found), deadline)
        rest = Loaded.LATE if ending is _Ending.LATE else Loaded.MISS
        found += [rest] * (len(wanted) - len(found))
        bad = [key for (key, _), each in zip(wanted, found, strict=True) if each == Loaded.BAD]
        self._discard(bad, deadline)
        outcomes = np.full(len(keys), Loaded.MISS, np.uint8)
        outcomes[asked] = found
        self._counters.loaded(outcomes, time.perf_counter() - start)
        return outcomes

    def save(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], deadline: float
    ) -> Outcomes:
        start = time.perf_counter()
        offered = list(zip(keys, self._views("blocks", keys, blocks), strict=True))
        kept, ending = list[Saved](), _Ending.SKIPPED
        if offered and not self._read_only:
            ending = self._attempt(partial(self._save, offered, kept), deadline)
        rest = Saved.LATE if ending is _Ending.LATE else Saved.REFUSED
        outcomes = np.array(kept + [rest] * (len(keys) - len(kept)), np.uint8)
        self._counters.saved(outcomes, time.perf_counter() - start)
        return outcomes

    def drop(self, keys: Sequence[bytes]) -> bool:
        """Delete blocks on the server. Other clients lose them, too.

        Returns False if the server did not answer, or refused.
        """
        refused = list[bytes]()
        ending = self._attempt(partial(self._drop, keys, refused)) if keys else _Ending.DONE
        return ending is _Ending.DONE and not refused

    def stats(self) -> StoreStats:
        return self._counters.stats(num_blocks=None, capacity=None)

    def close(self) -> None:
        self._closed = True
        self._pool.close()

    # ------------------------------------------------------------- on a connection

    def _find(
        self,
        keys: Sequence[bytes],
        there: list[bool],
        deadline: float,
        wire: Wire,
        *,
        to_the_end: bool = False,
    ) -> None:
        for part in self._parts(keys):
            found = wire.exists([PREFIX + key for key in part], deadline)
            there += found
            if not (to_the_end or all(found)):
                return

    def _load(
        self,
        wanted: Sequence[tuple[bytes, memoryview]],
        found: list[Loaded],
        deadline: float,
        wire: Wire,
    ) -> None:
        frame = memoryview(bytearray(FRAME_BYTES))
        for part in self._parts(wanted):
            names, into = [PREFIX + key for key, _ in part], [(frame, block) for _, block in part]
            hashers = [self._framing.hasher(key) for key, _ in part]
            values = wire.mget(names, into, deadline, [hasher.update for hasher in hashers])
            # The frame is checked before the next value overwrites it.
            for (key, block), hasher, value in zip(part, hashers, values, strict=True):
                if value is Value.ABSENT:
                    found.append(Loaded.MISS)
                elif value is Value.OTHER:
                    found.append(Loaded.BAD)
                else:
                    fault = self._framing.unframe(frame, key, block, hasher)
                    found.append(Loaded.HIT if fault is None else Loaded.BAD)

    def _save(
        self,
        offered: Sequence[tuple[bytes, memoryview]],
        kept: list[Saved],
        deadline: float,
        wire: Wire,
    ) -> None:
        for part in self._parts(offered):
            known = wire.exists([PREFIX + key for key, _ in part], deadline)
            for (key, block), is_known in zip(part, known, strict=True):
                if not is_known:
                    value = self._framing.frame(key, block)
                    wire.set_absent(PREFIX + key, value, self._ttl_s, deadline)
            for (key, _), is_known in zip(part, known, strict=True):
                kept.append(Saved.KNOWN if is_known else self._kept(key, deadline, wire))

    def _kept(self, key: bytes, deadline: float, wire: Wire) -> Saved:
        try:
            if not wire.was_set(deadline):
                return Saved.KNOWN
        except ServerError as error:  # no room, or no right to write
            self._read_only |= str(error).startswith("NOPERM")
            return Saved.REFUSED
        self._unusable.pop(key, None)
        return Saved.SAVED

    def _drop(
        self, keys: Sequence[bytes], refused: list[bytes], deadline: float, wire: Wire
    ) -> None:
        for part in self._parts(keys):
            try:
                wire.delete([PREFIX + key for key in part], deadline)
            except ServerError as error:
                if not str(error).startswith("NOPERM"):
                    raise
                refused += part  # by a reader, without the right to delete
                return
            for key in part:
                self._unusable.pop(key, None)

    # ------------------------------------------------------------- around it

    def _attempt(
        self, work: Callable[[float, Wire], None], deadline: float | None = None
    ) -> _Ending:
        """Do `work` on a connection, unless the server is bypassed. Raises nothing of its own.

        The deadline is `timeout_s` from now, unless given.
        """
        if self._closed:
            return _Ending.SKIPPED
        now = time.monotonic()
        patience = now + self._timeout_s
        deadline = patience if deadline is None else deadline
        if now >= deadline:
            return _Ending.LATE
        if not self._breaker.allows():
            return _Ending.SKIPPED
        ending = _Ending.FAILED
        try:
            with self._pool.wire(deadline) as wire:
                work(deadline, wire)
            ending = _Ending.DONE
        except (TimeoutError, RedisTimeoutError):
            ending = _Ending.LATE
        except (OSError, RedisError, ServerError):
            pass
        finally:
            if ending is _Ending.DONE:
                self._breaker.succeeded()
            elif ending is not _Ending.LATE or deadline >= patience:
                self._breaker.failed()  # a caller in a hurry is no fault of the server
        return ending

    def _discard(self, bad: Sequence[bytes], deadline: float) -> None:
        """Delete bad values. Those that cannot be deleted are never read again."""
        if not bad:
            return
        with self._lock:
            self._unusable |= dict.fromkeys(bad)
            for key in list(self._unusable)[: max(0, len(self._unusable) - _UNUSABLE_MAX)]:
                self._unusable.pop(key, None)
        self._attempt(partial(self._drop, bad, []), deadline)

    def _parts(self, items: Sequence[_T]) -> Iterator[Sequence[_T]]:
        return (items[i : i + self._part] for i in range(0, len(items), self._part))

    def _views(
        self, name: str, keys: Sequence[bytes], buffers: Sequence[memoryview]
    ) -> list[memoryview]:
        check_blocks(name, keys, buffers, self.block_bytes)
        return [memoryview(buffer).cast("B") for buffer in buffers]

    def _check_server(self) -> None:
        deadline = time.monotonic() + self._timeout_s
        wire = self._address.first_connection(self._timeout_s)
        # Random names, which no block has and no client can plant. Their last byte puts them into
        # different slots: a server of a cluster refuses them in one command.
        probe = PREFIX + secrets.token_hex(8).encode()
        names = [probe + b"0", probe + b"1"]
        try:
            wire.exists(names, deadline)
            list(wire.mget(names, [(), ()], deadline))
        except ServerError as error:
            if str(error).startswith(("NOPERM", "NOAUTH")):
                raise PermissionError(
                    f"url={self._address}: the server refuses EXISTS and MGET: {error}. "
                    f"Grant +exists +mget ~{PREFIX.decode()}*, and +set +del to writers."
                ) from None
            if str(error).startswith(("CROSSSLOT", "MOVED", "CLUSTERDOWN")):
                raise ValueError(
                    f"url={self._address}: is a cluster. Use a single server."
                ) from None
            raise ConnectionError(f"url={self._address}: the server says: {error}.") from None
        except OSError as error:
            raise ConnectionError(
                f"url={self._address}: no Valkey server answers: {error}."
            ) from None
        finally:
            wire.close()
