"""A model's layers in groups, each with its own block table, over one pool of equal blocks.

    manager = GroupedManager((None, 1024), num_blocks=4096, max_chunk=2048)
    seq = manager.allocate(prompt_ids)              # blocks of both groups, or none
    slots = manager.open_slots(seq, 0, 2048)        # int64 [groups, tokens]
    manager.commit(seq, 2048)                       # frees blocks behind the window
    tables = manager.block_tables([seq])            # int32 [groups, sequences, blocks]

All layers of a group have the same window, or full attention. A block holds tokens for the layers
of one group. All groups have equally many layers, so any block serves any group, and no memory is
reserved for one kind of layer. The idea is from vLLM's hybrid manager (Jenga, Zhang et al., 2025).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvpager import _validate as arguments
from kvpager.blocks.allocation import identity
from kvpager.blocks.cached import CachedBlocks
from kvpager.blocks.events import Events
from kvpager.blocks.groups.allocation import GroupAllocation
from kvpager.blocks.groups.commit import GroupCommit
from kvpager.blocks.groups.continuations import Continuations
from kvpager.blocks.groups.extension import GroupExtension
from kvpager.blocks.groups.prefix import WindowIndex
from kvpager.blocks.manager import BlockManager
from kvpager.blocks.policies.base import EvictionPolicy
from kvpager.blocks.sequences import SequenceHandle
from kvpager.blocks.state import BlockState
from kvpager.plans import Int32, Int64


class GroupedManager(BlockManager):
    """Block tables of several groups of layers over one pool. Thread-safe.

    Its methods are those of `BlockManager`. Each takes or releases the blocks of all groups, or
    changes nothing. Their complexity is for each group. What differs:

    - Block tables are int32 [groups, n, most blocks], slots int64 [groups, tokens], the blocks of
      `match_prefix` int32 [groups, n]; -1 for blocks behind a window.
    - `allocate` and `append` take blocks in groups with a window for `max_chunk` tokens at a time.
      Further tokens wait: their slots are -1, and `open_slots` takes their blocks.
    - `commit` commits the tokens that have slots in all groups. Groups with a window release the
      blocks that the next token does not attend to; published blocks stay cached.
    - A prompt reuses the longest prefix of whole blocks that every group can serve.
    - `truncate` raises `ValueError` if the next token would attend to a released block.
    - `drop_before` raises. `pins` is missing.

    Args:
        windows: the sliding window of each group, in tokens, the token itself included; None for
            full attention.
        num_blocks: blocks on the device, each for `block_size` tokens of one group.
        block_size: token slots of a block, a power of two.
        num_host_blocks: blocks of the host tier, for `swap`.
        max_chunk: tokens for which a group with a window has blocks ahead. None: for all.
        eviction, num_events: as for `BlockManager`.
    """

    def __init__(
        self,
        windows: Iterable[int | None],
        num_blocks: int,
        block_size: int = 16,
        num_host_blocks: int = 0,
        *,
        max_chunk: int | None = None,
        eviction: str | EvictionPolicy = "lru",
        num_events: int = 0,
    ) -> None:
        windows = tuple(
            None if window is None else arguments.count("window", window, at_least=1)
            for window in windows
        )
        if not windows:
            raise ValueError("windows=(): expected one for each group. Pass (None,) for one group.")
        if max_chunk is not None:
            max_chunk = arguments.count("max_chunk", max_chunk, at_least=1)
        sizes = num_blocks, block_size, num_host_blocks
        state = BlockState(
            *sizes, eviction, num_events=num_events, windows=windows, max_chunk=max_chunk
        )
        self.events, self.cached = Events(state), CachedBlocks(state)
        index, self._opening = WindowIndex(state), GroupExtension(state)
        continuations = Continuations(state)
        self._beginning = GroupAllocation(state, index, self._opening, continuations)
        commit = GroupCommit(state, index, continuations)
        self._assemble(state, self._beginning, self._opening, commit)

    def open_slots(self, sequence: SequenceHandle, start: int, stop: int) -> Int64:
        """Return the slots of tokens about to be written, int64 [groups, tokens]. O(tokens).

        Groups with a window take their missing blocks up to token `stop`.
        Raises: `OutOfBlocks`, and as `slots`.
        """
        start, stop = arguments.count("start", start), arguments.count("stop", stop)
        state = self._state
        with state.lock, state.change:
            first = state.resident_row(sequence)
            arguments.within_one("stop", stop, state.rows.length(first))
            self.queries.refuse_behind(first, start, stop)
            self._opening.open(first, stop)
            return self.queries.slots_of(first, start, stop)

    def cached_blocks(
        self,
        prompt: ArrayLike,
        *,
        namespace: str | None = None,
        lora: str | None = None,
        mm_hashes: Iterable[tuple[int, int, bytes]] = (),
    ) -> Int32:
        """Return the cached blocks of a prompt, int32 [groups, blocks], -1 for the others.

        They may be too few to continue from: `match_prefix` returns those that are enough.
        O(tokens * groups). Raises: as `allocate`.
        """
        ids = arguments.token_ids(prompt)
        who = identity(namespace, lora, mm_hashes, len(ids))
        with self._state.lock:
            return self._beginning.held(who, ids)

    def restore(
        self,
        prompt: ArrayLike,
        num_blocks: int,
        *,
        namespace: str | None = None,
        lora: str | None = None,
        mm_hashes: Iterable[tuple[int, int, bytes]] = (),
    ) -> tuple[SequenceHandle, NDArray[np.bool_]]:
        """Begin a sequence of a prompt's first `num_blocks` blocks, whose KV the caller has.

        Groups with a window get only the blocks of the last window. Also returns which blocks are
        not cached, bool [groups, num_blocks]: fill these, then `commit` and `free` the sequence.
        Do not append to it. O(tokens * groups). Raises: as `allocate`.
        """
        ids = arguments.token_ids(prompt)
        most = len(ids) // self.block_size
        num_blocks = arguments.count("num_blocks", num_blocks, at_most=most)
        who = identity(namespace, lora, mm_hashes, len(ids))
        with self._state.lock, self._state.change:
            return self._beginning.restore(who, ids[: num_blocks * self.block_size])
