"""The most blocks that each tenant may have: `engine.quotas["acme"] = "2GiB"`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import AbstractContextManager
from typing import Any

from kvpager import _validate as arguments
from kvpager._text import size
from kvpager.blocks.protocol import CacheManager
from kvpager.scheduling.request import Request, blocks_needed


class TenantQuotas(MutableMapping[str | None, int]):
    """Quotas by namespace, in blocks; a tenant is the `namespace` of its requests.

    A quota bounds the device blocks that a tenant's requests hold and that stay cached for it. At
    its quota, a tenant's requests wait for each other and evict its own cached blocks; requests of
    others run meanwhile. A request that needs more than its quota is refused by `submit`.

    Set one as a number of blocks or as a size such as `"2GiB"`, which is rounded down to blocks.
    `del` removes the bound. `None` stands for all requests without a namespace. Thread-safe.

    Args:
        manager: has the blocks.
        locked: returns the lock over the manager.
        live: returns the live requests; called under the lock.
        block_bytes: bytes of a block.
    """

    def __init__(
        self,
        manager: CacheManager,
        locked: Callable[[], AbstractContextManager[Any]],
        live: Callable[[], Iterable[Request]],
        block_bytes: int,
    ) -> None:
        self._manager = manager
        self._locked = locked
        self._live = live
        self._block_bytes = block_bytes
        self._limits: dict[str | None, int] = {}

    def __setitem__(self, namespace: str | None, limit: int | str) -> None:
        """Bound the blocks of a namespace. O(live requests + blocks).

        Raises: `TypeError`, `ValueError` for a limit that is less than a block, than what a live
        request of the namespace may need, or than what its requests hold; `EngineClosed` in a fork.
        """
        arguments.label("namespace", namespace)
        name = f"quotas[{namespace!r}]"
        blocks = self._in_blocks(name, limit)
        with self._locked():
            for request in self._live():
                need = blocks_needed(request, len(request.prompt), self._manager.block_size)
                if request.namespace == namespace and need > blocks:
                    raise ValueError(
                        f"{name}={limit!r}: {blocks} blocks, but request {request.name!r} may need "
                        f"{need}. Cancel it, or raise the quota."
                    )
            try:
                self._manager.quotas.set(namespace, ceiling=blocks)
            except ValueError as error:
                raise ValueError(
                    f"{name}={limit!r}: {blocks} blocks, but its requests hold more. Wait for "
                    "them, cancel some, or raise the quota."
                ) from error
            self._limits[namespace] = blocks

    def _in_blocks(self, name: str, limit: int | str) -> int:
        if not isinstance(limit, str):
            return arguments.count(name, limit, at_least=1)
        num_bytes = arguments.parse_memory(limit, name)
        assert num_bytes is not None
        if num_bytes < self._block_bytes:
            raise ValueError(
                f"{name}={limit!r}: expected at least a block, {size(self._block_bytes)}. Raise it."
            )
        return num_bytes // self._block_bytes

    def __getitem__(self, namespace: str | None) -> int:
        """Return the quota of a namespace in blocks. O(1). Raises: `KeyError` if it has none."""
        return self._limits[namespace]

    def __delitem__(self, namespace: str | None) -> None:
        """Remove the bound. O(blocks). Raises: `KeyError` if there is none."""
        with self._locked():
            del self._limits[namespace]
            self._manager.quotas.drop(namespace)

    def __iter__(self) -> Iterator[str | None]:
        return iter(list(self._limits))

    def __len__(self) -> int:
        return len(self._limits)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._limits})"
