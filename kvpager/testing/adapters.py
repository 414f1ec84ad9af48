"""The adapter of kvpager's own managers, an example for others."""

from __future__ import annotations

from typing import Any

from kvpager.errors import OutOfBlocks


class BlockManagerAdapter:
    """A `BlockManager`, or anything with its verbs, as a `ManagerAdapter`.

    Another manager needs about ten lines, and one class for pytest:

        class PeerAdapter:
            out_of_blocks = MemoryError

            def __init__(self, num_blocks, block_size):
                self.num_blocks, self.block_size = num_blocks, block_size
                self.peer = PeerManager(num_blocks, block_size)

            def allocate(self, tokens): return self.peer.add(tokens)
            def num_cached_tokens(self, handle): return handle.cached
            def append(self, handle, tokens): return self.peer.extend(handle, tokens)
            def free(self, handle): self.peer.remove(handle)
            def block_table(self, handle): return handle.blocks
            def num_free_blocks(self): return self.peer.free_count()

        class TestPeer(ManagerConformance):
            def make(self, num_blocks, block_size):
                return PeerAdapter(num_blocks, block_size)
    """

    out_of_blocks = OutOfBlocks

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.num_blocks: int = manager.num_blocks
        self.block_size: int = manager.block_size
        self.num_host_blocks: int = manager.num_host_blocks

    def allocate(self, tokens: list[int]) -> Any:
        """Begin a sequence. O(tokens)."""
        return self.manager.allocate(tokens)

    def allocate_in(self, tokens: list[int], namespace: str | None) -> Any:
        """Begin a sequence in a namespace. O(tokens)."""
        return self.manager.allocate(tokens, namespace=namespace)

    def num_cached_tokens(self, handle: Any) -> int:
        """Return the number of cached leading tokens. O(1)."""
        return int(handle.num_cached_tokens)

    def copies(self, handle: Any) -> list[tuple[int, int]]:
        """Return the block copies that `allocate` requires. O(copies)."""
        return _pairs(handle.copies)

    def append(self, handle: Any, tokens: list[int]) -> list[tuple[int, int]]:
        """Make room for tokens; return the blocks to copy first. O(tokens)."""
        return _pairs(self.manager.append(handle, tokens).copies)

    def commit(self, handle: Any) -> None:
        """Record that the KV of all tokens is written. O(blocks)."""
        self.manager.commit(handle)

    def fork(self, handle: Any) -> Any:
        """Return a sequence that shares every block. O(tokens)."""
        return self.manager.fork(handle)

    def truncate(self, handle: Any, length: int) -> None:
        """Drop the tokens from `length` on. O(blocks)."""
        self.manager.truncate(handle, length)

    def swap(self, handle: Any, to: str) -> list[tuple[int, int]]:
        """Move to another tier; return the blocks to copy. O(blocks)."""
        return _pairs(self.manager.swap(handle, to).copies)

    def free(self, handle: Any) -> None:
        """End a sequence. O(blocks)."""
        self.manager.free(handle)

    def block_table(self, handle: Any) -> list[int]:
        """Return the sequence's blocks. O(blocks)."""
        blocks: list[int] = self.manager.block_tables(handle)[0].tolist()
        return blocks

    def num_free_blocks(self) -> int:
        """Return the number of free and evictable blocks. O(blocks)."""
        stats = self.manager.stats()
        return int(stats.num_free + stats.num_cached)

    def check(self) -> None:
        """Run the manager's own check. O(blocks + tokens)."""
        self.manager.check()


def _pairs(copies: Any) -> list[tuple[int, int]]:
    return [(source, destination) for source, destination in copies.tolist()]
