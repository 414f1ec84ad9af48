"""`ValkeyInspector`: the blocks that a server holds, of all models and layouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from kvpager.integrations.valkey.address import Address
from kvpager.integrations.valkey.store import PREFIX
from kvpager.storage.keys import KEY_BYTES
from kvpager.storage.tiers.frame import FRAME_BYTES, Fault, check_block, read_head
from kvpager.storage.tiers.inspection import StoredBlock
from kvpager.storage.tiers.seals import seal_of

_TIMEOUT_S, _PART = 30.0, 256
_VALUE_BYTES_MAX = 1 << 30  # of a block: never trust a length from outside


class ValkeyInspector:
    """Lists a server's values whose names are those of blocks. Raises: `ValueError`, `OSError`.

    A user needs the rights for SCAN, STRLEN, OBJECT IDLETIME, GETRANGE and, to drop, DEL.
    """

    def __init__(self, url: str, secret: bytes | None = None) -> None:
        self._address, self._secret = Address(url), secret
        self._client: Any = self._address.client(_TIMEOUT_S)

    def facts(self) -> dict[str, str | int]:
        """Return the server, its version and memory."""
        with self._server():
            told = self._client.info()
        names = {
            "redis_version": "version",
            "used_memory": "memory used",
            "maxmemory": "memory bound",
            "maxmemory_policy": "evicts",
        }
        return {"server": str(self._address)} | {
            ours: told[theirs] for theirs, ours in names.items() if theirs in told
        }

    def blocks(self) -> Iterator[StoredBlock]:
        """Yield the blocks. O(values of the server)."""
        with self._server():
            part: list[bytes] = []
            for name in self._client.scan_iter(match=PREFIX + b"*", count=_PART):
                if len(name) == len(PREFIX) + KEY_BYTES:
                    part.append(name)
                if len(part) == _PART:
                    yield from self._listed(part)
                    part = []
            yield from self._listed(part)

    def check(self, keys: Sequence[bytes]) -> list[Fault | None]:
        """Read and verify values; delete damaged ones. O(bytes)."""
        faults = [self._check(key) for key in keys]
        # A value of another release or seal may be whole.
        kept = (None, Fault.VERSION, Fault.SEAL)
        self.drop([key for key, fault in zip(keys, faults, strict=True) if fault not in kept])
        return faults

    def drop(self, keys: Sequence[bytes]) -> None:
        """Delete values. O(keys)."""
        if keys:
            with self._server():
                self._client.delete(*(PREFIX + key for key in keys))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _listed(self, names: Sequence[bytes]) -> Iterator[StoredBlock]:
        pipe = self._client.pipeline(transaction=False)
        for name in names:
            pipe.strlen(name)
            pipe.object("IDLETIME", name)
        answers = pipe.execute(raise_on_error=False)
        for name, length, idle in zip(names, answers[::2], answers[1::2], strict=True):
            if isinstance(length, int) and isinstance(idle, int):  # else it left meanwhile
                yield StoredBlock(name[len(PREFIX) :], max(0, length - FRAME_BYTES), float(idle))

    def _check(self, key: bytes) -> Fault | None:
        with self._server():
            value = self._client.getrange(PREFIX + key, 0, FRAME_BYTES + _VALUE_BYTES_MAX)
        if not value:  # it left meanwhile
            return None
        head = read_head(value)
        if isinstance(head, Fault):
            return head
        payload = memoryview(bytearray(value)[FRAME_BYTES:])
        return check_block(value, head, key, payload, seal_of(head.seal, self._secret))

    @contextmanager
    def _server(self) -> Iterator[None]:
        try:
            yield
        except (AuthenticationError, NoPermissionError) as error:
            raise PermissionError(f"url={self._address}: the server refuses: {error}.") from None
        except (OSError, RedisError) as error:
            raise ConnectionError(f"url={self._address}: {error}.") from None
