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

from kvpager import _validate as arguments
from kvpager.blocks.groups.allocation import GroupAllocation
from kvpager.blocks.groups.commit import GroupCommit
from kvpager.blocks.groups.extension import GroupExtension
from kvpager.blocks.groups.prefix import WindowIndex
from kvpager.blocks.manager import BlockManager
from kvpager.blocks.policies.base import EvictionPolicy
from kvpager.blocks.sequences import SequenceHandle
from kvpager.blocks.state import BlockState
from kvpager.plans import Int64


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
    - `drop_before` raises. `pins`, `cached` and `events` are missing.

    Args:
        windows: the sliding window of each group, in tokens, the token itself included; None for
            full attention.
        num_blocks: blocks on the device, each for `block_size` tokens of one group.
        block_size: token slots of a block, a power of two.
        num_host_blocks: blocks of the host tier, for `swap`.
        max_chunk: tokens for which a group with a window has blocks ahead. None: for all.
        eviction: as for `BlockManager`.
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
        state = BlockState(*sizes, eviction, windows=windows, max_chunk=max_chunk)
        index, self._opening = WindowIndex(state), GroupExtension(state)
        allocation = GroupAllocation(state, index, self._opening)
        self._assemble(state, allocation, self._opening, GroupCommit(state, index))

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
