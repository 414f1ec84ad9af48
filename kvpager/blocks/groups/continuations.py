"""Marks the blocks of groups with a window that stores need: those that a prompt continues from.

A sequence of a window of two blocks, whose prompt had seven blocks; it ends after ten:

    blocks   a b c d e f g | h i j
                       f g   . i j      a later prompt continues after g or after j
             . . . . .       h          passing: they serve no prompt that ends there

A full block is *passing* when it is published, unless it is in the last window of the sequence's
prompt. When a sequence ends, the blocks in its last window stop passing. When a prompt
continues from blocks, these stop passing, too. `manager.cached` does not offer passing blocks.
"""

from __future__ import annotations

import numpy as np

from kvpager.blocks.pool import PASSING
from kvpager.blocks.radix import Node
from kvpager.blocks.state import BlockState
from kvpager.blocks.windows import first_needed
from kvpager.plans import Int32


class Continuations:
    """Marks passing blocks. The caller holds the lock, and the change has begun.

    Writes the pool's marks.
    """

    def __init__(self, state: BlockState) -> None:
        self._state = state

    def publish(self, row: int, begin: int, own: Int32, published: Int32) -> None:
        """Mark the blocks of a row, from block `begin` on, except the last window of its prompt.

        `published` are the blocks in the index, which may be those of other sequences. O(blocks).
        """
        state, table = self._state, self._state.rows
        size, began = state.block_size, int(table.began[row])
        # The last token is always computed, so a prompt continues before it.
        first = self._first_needed(row, max(began - 1, 0) // size)
        positions = np.arange(begin, begin + len(own))
        is_needed = (positions >= first) & (positions < began // size)
        self.keep(published[is_needed])
        state.pool.marks[own[~is_needed & (published == own)]] |= np.uint16(PASSING)

    def keep(self, blocks: Int32) -> None:
        """Let blocks be offered: a prompt continues from them. O(blocks)."""
        self._state.pool.marks[blocks] &= ~np.uint16(PASSING)
        self._state.pool.note_idle(blocks.astype(np.intp))

    def end(self, row: int) -> None:
        """Keep the blocks in the last window of a sequence that ends. O(window)."""
        state, table = self._state, self._state.rows
        blocks = table.device_blocks(row)
        self.keep(blocks[state.pool.cached[blocks]])
        # A prompt continues at the end of a full block: up to one block before the end.
        position, block = int(table.first_blocks[row]) - 1, int(table.behind[row]) - 1
        digests = table.digests[row - table.prompt(row).group]
        if block < 0 or position < self._first_needed(row, int(table.published[row])):
            return
        node = self._node(block)
        is_its_own = node is not None and node.tree == table.prompt(row).tree
        if is_its_own and node is not None and digests[position : position + 1] == [node.digest]:
            self.keep(np.array([block], np.int32))

    def _node(self, block: int) -> Node | None:
        if not self._state.pool.cached[block]:
            return None
        return self._state.forest.nodes[int(self._state.forest.node_of[block])]

    def _first_needed(self, row: int, num_blocks: int) -> int:
        state = self._state
        window = state.windows[row % state.rows.num_groups]
        return first_needed(num_blocks * state.block_size, window, state.block_size)
