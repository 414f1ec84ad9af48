"""The adapter of kvpager's own managers, an example for others."""

from __future__ import annotations

from typing import Any

from kvpager.errors import OutOfBlocks


class BlockManagerAdapter:
    """A `BlockManager`, or anything with its verbs, as a `ManagerAdapter`.

    Another manager needs about ten lines: see docs/guides/own-manager.md.
    """

    out_of_blocks = OutOfBlocks

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.num_blocks: int = manager.num_blocks
        self.block_size: int = manager.block_size
        self.num_host_blocks: int = manager.num_host_blocks

    def allocate(self, tokens: list[int]) -> Any:
        return self.manager.allocate(tokens)

    def allocate_in(self, tokens: list[int], namespace: str | None) -> Any:
        return self.manager.allocate(tokens, namespace=namespace)

    def num_cached_tokens(self, handle: Any) -> int:
        return int(handle.num_cached_tokens)

    def copies(self, handle: Any) -> list[tuple[int, int]]:
        return _pairs(handle.copies)

    def append(self, handle: Any, tokens: list[int]) -> list[tuple[int, int]]:
        return _pairs(self.manager.append(handle, tokens).copies)

    def commit(self, handle: Any) -> None:
        self.manager.commit(handle)

    def fork(self, handle: Any) -> Any:
        return self.manager.fork(handle)

    def truncate(self, handle: Any, length: int) -> None:
        self.manager.truncate(handle, length)

    def swap(self, handle: Any, to: str) -> list[tuple[int, int]]:
        return _pairs(self.manager.swap(handle, to).copies)

    def free(self, handle: Any) -> None:
        self.manager.free(handle)

    def block_table(self, handle: Any) -> list[int]:
        blocks: list[int] = self.manager.block_tables(handle)[0].tolist()
        return blocks

    def num_free_blocks(self) -> int:
        stats = self.manager.stats()
        return int(stats.num_free + stats.num_cached)

    def check(self) -> None:
        self.manager.check()


def _pairs(copies: Any) -> list[tuple[int, int]]:
    return [(source, destination) for source, destination in copies.tolist()]
