"""Tensors of the device-side allocator: blocks, tables and counts on one device."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpager import _validate as arguments
from kvpager._text import counted
from kvpager.errors import BrokenInvariant

_INT32_MAX = torch.iinfo(torch.int32).max


class DeviceAllocator:
    """Blocks of a pool, their references and the free list, as int32 tensors on one device.

    A *row* holds one sequence: `block_tables[row]` lists its blocks in order, -1 after the last;
    `seq_lens[row]` is its length in tokens. A row of length 0 is unused. Read the tensors at any
    time. Between calls, code that keeps the invariants of `check` may write them, for example to
    set up prefilled rows. Issue all calls on one allocator from one stream.
    """

    __slots__ = (
        "block_size",
        "block_tables",
        "failures",
        "free",
        "num_free",
        "ref_counts",
        "seq_lens",
    )

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
        # The top of the stack is its end, so block 0 is allocated first.
        order = torch.arange(num_blocks - 1, -1, -1, dtype=torch.int32)
        self.free: Tensor = order.to(device)
        """int32 [num_blocks]: a stack. The first `num_free` entries are the free blocks."""
        self.num_free: Tensor = torch.full((1,), num_blocks, dtype=torch.int32, device=device)
        """int32 [1]: number of free blocks."""
        self.ref_counts: Tensor = torch.zeros(num_blocks, dtype=torch.int32, device=device)
        """int32 [num_blocks]: number of tables that hold each block."""
        self.block_tables: Tensor = torch.full(
            (num_rows, columns), -1, dtype=torch.int32, device=device
        )
        """int32 [num_rows, max_blocks_per_row]: -1 after the last block."""
        self.seq_lens: Tensor = torch.zeros(num_rows, dtype=torch.int32, device=device)
        """int32 [num_rows]: tokens."""
        self.failures: Tensor = torch.zeros(1, dtype=torch.int32, device=device)
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
        if not 0 <= num_free <= num_blocks:
            raise BrokenInvariant(f"num_free is {num_free} of {num_blocks} blocks")
        holders = [0] * num_blocks
        for row, (table, length) in enumerate(
            zip(self.block_tables.tolist(), self.seq_lens.tolist(), strict=True)
        ):
            used = -(-length // self.block_size)
            if not 0 <= used <= columns:
                raise BrokenInvariant(f"row {row}: {length} tokens do not fit {columns} blocks")
            held = table[:used]
            if any(block != -1 for block in table[used:]):
                raise BrokenInvariant(f"row {row}: a block stands after its {length} tokens")
            if len(set(held)) != used or not all(0 <= block < num_blocks for block in held):
                raise BrokenInvariant(f"row {row}: blocks {held} are not {used} blocks of the pool")
            for block in held:
                holders[block] += 1
        free = self.free[:num_free].tolist()
        places = [0] * num_blocks
        for block in free:
            places[block] += 1
        for block, (count, refs) in enumerate(zip(holders, self.ref_counts.tolist(), strict=True)):
            if refs != count:
                raise BrokenInvariant(f"block {block}: refcount {refs}, but {count} tables hold it")
            if places[block] != (count == 0):
                raise BrokenInvariant(
                    f"block {block}: {count} tables hold it, and it is free {places[block]} times"
                )
