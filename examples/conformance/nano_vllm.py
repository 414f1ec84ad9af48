"""nano-vllm's BlockManager behind the conformance protocol.

Driven as its scheduler drives it, written against the version whose `can_allocate` returns the
number of cached blocks. nano-vllm appends one token a step and has neither `fork` nor `swap`; its
own settings allow blocks of multiples of 256 tokens only.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def _engine(name: str) -> ModuleType:
    """Return a module of nanovllm.engine, also if importing the package needs a GPU."""
    try:
        import_module("nanovllm")
    except ImportError:
        spec = find_spec("nanovllm")
        if spec is None:
            raise
        package = ModuleType("nanovllm")
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["nanovllm"] = package
    return import_module(f"nanovllm.engine.{name}")


def available() -> str | None:
    """Return None if the block manager can be driven, or the reason why not."""
    try:
        manager = _engine("block_manager").BlockManager
        _engine("sequence")
    except ImportError as error:
        return f"nano-vllm cannot be imported: {error}"
    if not hasattr(manager, "hash_blocks"):
        return "this nano-vllm is too old: its BlockManager has no hash_blocks"
    return None


def make(num_blocks: int, block_size: int) -> NanoVllmAdapter:
    """Return an adapter of a BlockManager of `num_blocks` blocks."""
    return NanoVllmAdapter(num_blocks, block_size)


class NanoVllmAdapter:
    """One BlockManager; a handle is a `Sequence`."""

    out_of_blocks = MemoryError

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if block_size == 1:
            raise ValueError(
                "nano-vllm never adds a block to a sequence where a block is one token"
            )
        self.num_blocks, self.block_size = num_blocks, block_size
        self.manager = _engine("block_manager").BlockManager(num_blocks, block_size)
        # nano-vllm keeps the block size on the class, for the whole process.
        base = _engine("sequence").Sequence
        self._sequence = type("Sequence", (base,), {"block_size": block_size})
        self._cached: dict[int, int] = {}

    def request(self, tokens: list[int]) -> Any:
        """Return nano-vllm's sequence for the prompt."""
        return self._sequence(list(tokens))

    def allocate(self, tokens: list[int]) -> Any:
        sequence = self.request(tokens)
        cached = self.manager.can_allocate(sequence)
        if cached == -1:
            raise MemoryError("can_allocate returned -1")
        self.manager.allocate(sequence, cached)
        sequence.num_scheduled_tokens = len(tokens) - sequence.num_cached_tokens
        self._cached[sequence.seq_id] = sequence.num_cached_tokens
        return sequence

    def num_cached_tokens(self, handle: Any) -> int:
        return self._cached[handle.seq_id]

    def append(self, handle: Any, tokens: list[int]) -> list[tuple[int, int]]:
        # `can_append` checks one token. This checks all tokens before it adds the first.
        blocks = -(-(len(handle) + len(tokens)) // self.block_size) - handle.num_blocks
        if blocks > len(self.manager.free_block_ids):
            raise MemoryError("can_append would return False")
        for token in tokens:
            handle.append_token(token)
            self.manager.may_append(handle)
            handle.num_scheduled_tokens += 1
        return []

    def commit(self, handle: Any) -> None:
        self.manager.hash_blocks(handle)
        handle.num_cached_tokens += handle.num_scheduled_tokens
        handle.num_scheduled_tokens = 0

    def free(self, handle: Any) -> None:
        self.manager.deallocate(handle)

    def block_table(self, handle: Any) -> list[int]:
        return list(handle.block_table)

    def num_free_blocks(self) -> int:
        return len(self.manager.free_block_ids)
