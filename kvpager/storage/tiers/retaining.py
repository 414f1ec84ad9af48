"""Prompts whose cached blocks stay on the device: `retain`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

from numpy.typing import ArrayLike

from kvpager._atomic import Uninterrupted, whole
from kvpager.blocks.manager import BlockManager
from kvpager.blocks.sequences import KeyParts


class Retained:
    """A prompt whose cached blocks stay on the device until `release`.

        with engine.tiers.retain(prompt):
            ...

    Thread-safe. Garbage collection of a handle releases nothing.

    Attributes:
        num_tokens: how many leading tokens of the prompt stay cached; 0 after the end.
    """

    def __init__(self, num_tokens: int = 0, retentions: Retentions | None = None) -> None:
        self.num_tokens = num_tokens
        self._retentions = retentions

    def __repr__(self) -> str:
        return f"<Retained: {self.num_tokens} tokens>"

    def release(self) -> None:
        """Let the blocks leave. Idempotent. O(blocks)."""
        retentions = self._retentions
        if retentions is not None:
            retentions.end(self)

    def __enter__(self) -> Retained:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class _Hold(NamedTuple):
    ticket: int
    namespace: str | None


class Retentions:
    """The retained prompts of a manager. Thread-safe; signals wait for the end of a call."""

    def __init__(self, manager: BlockManager, lock: Any, on_end: Callable[[], object]) -> None:
        """Take `lock` in each call. Call `on_end` after blocks were released."""
        self.lock = lock
        self.uninterrupted = Uninterrupted(lock)
        self._manager = manager
        self._on_end = on_end
        self._holds: dict[Retained, _Hold] = {}

    def begin(
        self, prompt: ArrayLike, check: Callable[[], object], **key: Unpack[KeyParts]
    ) -> Retained:
        """Hold the cached blocks of a prompt, unless `check` then raises. O(tokens).

        Raises: as `CachedBlocks.hold` and `check`.
        """
        retained = None
        try:
            with self.lock, self.uninterrupted:
                retained = self._begin(prompt, key)
                check()
        except BaseException:
            if retained is not None:  # also after an interrupt at the end
                retained.release()
            raise
        return retained

    def _begin(self, prompt: ArrayLike, key: KeyParts) -> Retained:
        manager, size = self._manager, self._manager.block_size
        found = manager.match_prefix(prompt, blocks=True, **key)
        ticket = manager.cached.hold(found.whole(size))
        retained = Retained(found.num_tokens // size * size, self)
        self._holds[retained] = _Hold(ticket, key.get("namespace"))
        return retained

    @whole
    def end(self, retained: Retained) -> None:
        """Release the blocks of a prompt if they are still held. O(blocks)."""
        hold = self._holds.pop(retained, None)
        if hold is None:
            return
        self._manager.cached.release(hold.ticket)
        # So that a handle of a caller keeps no manager alive.
        retained.num_tokens, retained._retentions = 0, None
        self._on_end()

    @whole
    def end_namespace(self, namespace: str | None) -> None:
        """Release the prompts of a namespace. O(retained prompts + blocks)."""
        for retained, hold in list(self._holds.items()):
            if hold.namespace == namespace:
                self.end(retained)

    @whole
    def end_all(self) -> None:
        """Release all prompts. O(blocks)."""
        for retained in list(self._holds):
            self.end(retained)
