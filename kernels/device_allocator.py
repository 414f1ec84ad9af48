"""Tensors of the device-side allocator: blocks, tables and counts on one device."""

from __future__ import annotations

from collections import Counter
from functools import partial

import torch
from torch import Tensor

from kvpager import _validate as arguments
from kvpager._text import counted
from kvpager.errors import require

_INT32_MAX = torch.iinfo(torch.int32).max


class DeviceAllocator:
    """Blocks of a pool, their references and the free list, as int32 tensors on one device.

    A *row* holds one sequence: `block_tables[row]` lists its blocks in order, -1 after the last;
    `seq_lens[row]` is its length in tokens. A row of length 0 is unused. Read the tensors at any
    time. Between calls, code that keeps the invariants of `check` may write them, for example to
    set up prefilled rows. Issue all calls on one allocator from one stream.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_rows: int,
        max_blocks_per_row: int,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make all blocks free and all rows unused. O(num_blocks + num_rows * max_blocks_per_row).

        Raises: `ValueError` unless sizes are positive, `block_size` is a power of two, and slot
        numbers fit int32.
        """
        num_blocks = arguments.count("num_blocks", num_blocks, at_least=1)
        self.block_size = arguments.block_size(block_size)
        num_rows = arguments.count("num_rows", num_rows, at_least=1)
        columns = arguments.count("max_blocks_per_row", max_blocks_per_row, at_least=1)
        for name, blocks in (("num_blocks", num_blocks), ("max_blocks_per_row", columns)):
            if blocks * self.block_size > _INT32_MAX:
                raise ValueError(
                    f"{name} {blocks} * block_size {self.block_size} passes {_INT32_MAX}, "
                    f"the largest int32; pass fewer blocks"
                )
        filled = partial(torch.full, dtype=torch.int32, device=device)
        # The top of the stack is its end, so block 0 is allocated first.
        self.free: Tensor = torch.arange(num_blocks - 1, -1, -1, dtype=torch.int32).to(device)
        """int32 [num_blocks]: a stack. The first `num_free` entries are the free blocks."""
        self.num_free: Tensor = filled((1,), num_blocks)
        """int32 [1]: number of free blocks."""
        self.ref_counts: Tensor = filled((num_blocks,), 0)
        """int32 [num_blocks]: number of tables that hold each block."""
        self.block_tables: Tensor = filled((num_rows, columns), -1)
        """int32 [num_rows, max_blocks_per_row]: -1 after the last block."""
        self.seq_lens: Tensor = filled((num_rows,), 0)
        """int32 [num_rows]: tokens."""
        self.failures: Tensor = filled((1,), 0)
        """int32 [1]: rows refused so far. Callers may reset it."""

    def __repr__(self) -> str:
        rows, columns = self.block_tables.shape
        return (
            f"<DeviceAllocator: {counted(len(self.free), 'block')} of {self.block_size} slots, "
            f"{counted(rows, 'row')} of {counted(columns, 'block')} on {self.free.device}>"
        )

    def check(self) -> None:
        """Raise `BrokenInvariant` unless every block is free or held. O(blocks + rows * columns).

        Waits for the device.
        """
        num_blocks, columns = len(self.free), self.block_tables.shape[1]
        num_free = int(self.num_free)
        require(0 <= num_free <= num_blocks, f"num_free is {num_free} of {num_blocks} blocks")
        holders = Counter[int]()
        for row, (table, length) in enumerate(
            zip(self.block_tables.tolist(), self.seq_lens.tolist(), strict=True)
        ):
            used = -(-length // self.block_size)
            require(0 <= used <= columns, f"row {row}: {length} tokens do not fit {columns} blocks")
            held, rest = table[:used], table[used:]
            require(set(rest) <= {-1}, f"row {row}: a block stands after its {length} tokens")
            is_right = len(set(held)) == used and all(0 <= block < num_blocks for block in held)
            require(is_right, f"row {row}: blocks {held} are not {used} blocks of the pool")
            holders.update(held)
        places = Counter(self.free[:num_free].tolist())
        for block, refs in enumerate(self.ref_counts.tolist()):
            count, times = holders[block], places[block]
            require(refs == count, f"block {block}: refcount {refs}, but {count} tables hold it")
            what = f"block {block}: {count} tables hold it, and it is free {times} times"
            require(times == (count == 0), what)
