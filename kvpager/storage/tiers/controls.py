"""The calls of `engine.tiers` and `patch.tiers`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from numpy.typing import ArrayLike

from kvpager import _validate as arguments
from kvpager.storage.tiers.retaining import Retained
from kvpager.storage.tiers.tiering import Tiering
from kvpager.storage.tiers.tiering_stats import TieringStats


class TiersOwner(Protocol):
    """An owner of tiers: an engine or a patch. Any thread may call its methods."""

    def locked(self) -> AbstractContextManager[Any]:
        """Return the lock under which `tiering` is used. Raises: `EngineClosed` in a fork."""
        ...

    def tiering(self) -> Tiering:
        """Return the tiering. Raises: `EngineClosed` or `KVPagerError` if the owner has ended."""
        ...

    def warm(self, prompt: ArrayLike, namespace: str | None, wait_s: float) -> int:
        """Load a prompt into the prefix cache; return how many tokens were added. O(bytes)."""
        ...

    def retain(self, prompt: ArrayLike, namespace: str | None) -> Retained:
        """Keep the cached blocks of a prompt on the device. O(tokens). Raises: `ValueError`."""
        ...

    def stats(self) -> TieringStats:
        """Return current counts, also after the owner has ended. O(stores)."""
        ...


class TierControls:
    """The tiers of an engine or of a patch: `engine.tiers`, `patch.tiers`. Any thread may call."""

    def __init__(self, owner: TiersOwner) -> None:
        self._owner = owner

    def limit(
        self, namespace: str, *, capacity: int | str | None = None, ttl_s: float | None = None
    ) -> None:
        """Bound what each store keeps of a namespace: bytes such as "4GiB", and seconds. O(1).

        Blocks that other processes saved do not count. Raises: `ValueError`, `TypeError` for a bad
        argument; `KVPagerError` if the engine or the patch has ended.
        """
        with self._owner.locked():
            self._owner.tiering().limit(namespace, capacity=capacity, ttl_s=ttl_s)

    def forget(self, namespace: str) -> int:
        """Drop the cached prompts of a namespace from the device and from all stores.

        Waits for the stores. Running requests may publish their prompts again. Returns how many
        blocks left the stores: those that this process saved or loaded. Raises: `TypeError` for a
        namespace that is not a string; `KVPagerError` if the engine or the patch has ended.
        """
        with self._owner.locked():
            tiering = self._owner.tiering()
            dropped = tiering.forget(namespace)
        return tiering.wait_for(dropped)

    def warm(
        self, prompts: Iterable[ArrayLike], *, namespace: str | None = None, wait_s: float = 60.0
    ) -> int:
        """Load prompts from the stores into the prefix cache, one after the other. O(bytes).

        Waits for each at most `wait_s` seconds, even if computing it is faster. Returns how many
        tokens were added. Do not call it on the thread of an engine, as in `on_step`. Raises:
        `ValueError`, `TypeError` for a bad argument; `KVPagerError` if the engine or the patch has
        ended.
        """
        arguments.label("namespace", namespace)
        wait_s = arguments.seconds("wait_s", wait_s)
        return sum(self._owner.warm(prompt, namespace, wait_s) for prompt in prompts)

    def retain(self, prompt: ArrayLike, *, namespace: str | None = None) -> Retained:
        """Keep the blocks of a prompt that are cached now on the device. O(tokens + live requests).

            with engine.tiers.retain(prompt):
                ...

        The end of the `with` block, or `release` of the result, lets the blocks leave. So do
        `forget`, the end of the engine or the patch, and all that turns tiers off. If tiers are
        off, nothing is retained.

        Raises: `ValueError` if a live request, or the floor of a namespace, needs the blocks.
        `TypeError` for a bad argument. `KVPagerError` if the engine or the patch has ended.
        """
        arguments.label("namespace", namespace)
        return self._owner.retain(prompt, namespace)

    def stats(self) -> TieringStats:
        """Return current counts, also after the end of the engine or the patch. O(stores)."""
        return self._owner.stats()
