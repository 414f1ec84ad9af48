"""The chunks of a request: their blocks, their keys, and which of them its layers still read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from kvpager.integrations.vllm.interface import (
    GPULoadStoreSpec,
    OffloadingConfig,
    ReqContext,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
    make_offload_key,
)

_NULL_BLOCK = 0  # vLLM's stand-in for a block that left a window


class ChunkGroup(NamedTuple):
    """One KV cache group of vLLM.

    Attributes:
        number: the number of the group.
        block_tokens: tokens of a block.
        blocks: blocks of a chunk.
        hashes: number of vLLM's hashes for a chunk. The last hash names the chunk.
        reach: how many tokens before the next token its layers read; None for all.
    """

    number: int
    block_tokens: int
    blocks: int
    hashes: int
    reach: int | None

    @property
    def tokens(self) -> int:
        """The number of tokens of a chunk. O(1)."""
        return self.blocks * self.block_tokens

    def first_block(self, num_tokens: int) -> int:
        """Return the first block that a sequence of `num_tokens` computed tokens holds. O(1)."""
        return 0 if self.reach is None else max(num_tokens - self.reach, 0) // self.block_tokens

    def first_chunk(self, num_tokens: int) -> int:
        """Return the chunk of `first_block`. O(1)."""
        return self.first_block(num_tokens) // self.blocks


def chunk_groups(config: OffloadingConfig, kv_cache_config: Any) -> tuple[ChunkGroup, ...]:
    """Return all groups of the model. O(groups).

    Raises: `NotImplementedError` for a group that `KvpagerConnector` does not serve.
    """
    known = kv_cache_config.kv_cache_groups
    if len(config.groups) < len(known) or any(group.is_eagle_group for group in known):
        raise NotImplementedError(
            "KvpagerConnector serves neither layers of a draft model nor layers that vLLM does not "
            "offload. Use offload(...) without synchronous=True."
        )
    blocks, tokens_per_hash = config.cache.blocks_per_chunk, config.cache.tokens_per_hash
    return tuple(
        ChunkGroup(
            group.group_id,
            group.tokens_per_block,
            blocks,
            blocks * group.tokens_per_block // tokens_per_hash,
            _reach(known[group.group_id].kv_cache_spec),
        )
        for group in config.groups
    )


def _reach(spec: Any) -> int | None:
    if isinstance(spec, UniformTypeKVCacheSpecs):
        spec = next(iter(spec.kv_cache_specs.values()))
    if not isinstance(spec, SlidingWindowSpec):
        return None
    return int(spec.sliding_window) - 1 + int(spec.extra_retained_tokens)


Names = Callable[[ChunkGroup, int], bytes | None]


class Piece(NamedTuple):
    """Successive blocks of a request that the device holds, and the position of the first."""

    first: int
    blocks: Sequence[int]


class RequestChunks:
    """The chunks of one request.

    `names` returns the name of a chunk of a group, by its number; None if it has none. A group's
    chunks are named in order. The default is vLLM's own hash.

    Attributes:
        request: vLLM's request.
        context: vLLM's context of the request, for the manager.
        keys: for each group the keys of its leading chunks, as far as they were needed.
        num_offered: for each group, how many leading chunks were offered to host memory.
        start: the tokens that the device's own cache had when the request was looked up.
    """

    def __init__(
        self, request: Any, groups: Sequence[ChunkGroup], names: Names | None = None
    ) -> None:
        self.request, self._groups = request, groups
        self._name = names or self._hash
        self.context = ReqContext(request.request_id)
        self.keys: list[list[Any]] = [[] for _ in groups]
        self.num_offered = [0] * len(groups)
        self.start = 0

    def add_keys(self, end: int) -> None:
        """Name the full chunks up to token `end`. O(new chunks)."""
        hashes = self.request.block_hashes
        for group, keys in zip(self._groups, self.keys, strict=True):
            known = min(end // group.tokens, len(hashes) // group.hashes)
            for number in range(len(keys), known):
                if (name := self._name(group, number)) is None:
                    break
                keys.append(make_offload_key(name, group.number))
                self.context.set_offload_key_position(keys[-1], (number + 1) * group.tokens)

    def _hash(self, group: ChunkGroup, number: int) -> bytes:
        name: bytes = self.request.block_hashes[(number + 1) * group.hashes - 1]
        return name

    def to_load(self, end: int, held: Sequence[list[int]]) -> tuple[list[Any], GPULoadStoreSpec]:
        """Return the chunks, and the blocks of `held`, that hold tokens up to `end`. O(blocks).

        `held` are the blocks of the request, by group. Raises: `RuntimeError` if vLLM expects more
        blocks than a window reads.
        """
        keys, parts = list[Any](), list[list[Piece]]()
        for group, its_keys in zip(self._groups, self.keys, strict=True):
            start, stop = self.start // group.block_tokens, end // group.block_tokens
            first = max(start, group.first_block(end))
            if any(held[group.number][start:first]):
                raise RuntimeError("vLLM expects blocks that lie before the window")
            keys += its_keys[first // group.blocks : -(-stop // group.blocks)]
            parts.append([Piece(first, held[group.number][first:stop])])
        return keys, device_blocks(parts)

    def to_save(self, end: int, held: Callable[[], Sequence[list[int]]]) -> list[dict[Any, Piece]]:
        """Return for each group its new chunks up to `end`; [] if there are none. O(new blocks).

        `held` returns the blocks of the request, by group.
        """
        counts = [end // group.tokens for group in self._groups]
        if all(count <= num for count, num in zip(counts, self.num_offered, strict=True)):
            return []  # as in most steps that decode
        self.add_keys(end)
        chunks, blocks = list[dict[Any, Piece]](), held()
        for index, (group, keys) in enumerate(zip(self._groups, self.keys, strict=True)):
            first, stop = self.num_offered[index], min(counts[index], len(keys))
            pieces = {
                keys[number]: _piece(group, number, blocks[group.number])
                for number in range(first, stop)
            }
            chunks.append({key: piece for key, piece in pieces.items() if piece.blocks})
            self.num_offered[index] = max(first, stop)
        return chunks


def _piece(group: ChunkGroup, number: int, held: Sequence[int]) -> Piece:
    """Return the blocks of a chunk that are in the window.

    Returns none if a reader may need blocks that left the window.
    """
    first = number * group.blocks
    blocks = list(held[first : first + group.blocks])
    num_gone = blocks.count(_NULL_BLOCK)
    # A prefix that ends with this chunk reads most of it.
    is_enough = first + num_gone <= group.first_block((number + 1) * group.tokens)
    return Piece(first + num_gone, blocks[num_gone:] if is_enough or not num_gone else [])


def device_blocks(parts: Sequence[Sequence[Piece]]) -> GPULoadStoreSpec:
    """Name the blocks of a copy, for each group. O(blocks)."""
    blocks = [list(chain(*(piece.blocks for piece in part))) for part in parts]
    firsts = [part[0].first if part else 0 for part in parts]
    return GPULoadStoreSpec(list(chain(*blocks)), list(map(len, blocks)), firsts)
