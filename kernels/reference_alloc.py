"""The device-side allocator in plain torch: the reference of `gpu/allocator.py`.

These functions handle rows one after the other. They are the specification, and run on CPUs. The
GPU kernels produce an outcome that some order of the rows has here. `step_alloc.py` describes the
entry points, arguments and algorithm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpager.kernels.device_allocator import DeviceAllocator


def step_alloc(allocator: DeviceAllocator, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return slots int64 [n] and copies int32 [n, 2] for one more token per row. O(n)."""
    slots = torch.full(rows.shape, -1, dtype=torch.int64, device=rows.device)
    copies = torch.full((*rows.shape, 2), -1, dtype=torch.int32, device=rows.device)
    for lane, row in enumerate(rows.tolist()):
        if row < 0:
            continue
        length = int(allocator.seq_lens[row])
        column, offset = divmod(length, allocator.block_size)
        tail = int(allocator.block_tables[row, column]) if offset else None
        if tail is not None and allocator.ref_counts[tail] == 1:
            block = tail
        elif column == allocator.block_tables.shape[1] or allocator.num_free[0] == 0:
            allocator.failures += 1
            continue
        else:
            block = _pop(allocator)
            allocator.block_tables[row, column] = block
            if tail is not None:
                allocator.ref_counts[tail] -= 1
                copies[lane, 0], copies[lane, 1] = tail, block
        slots[lane] = block * allocator.block_size + offset
        allocator.seq_lens[row] = length + 1
    return slots, copies


def fork_rows(allocator: DeviceAllocator, sources: Tensor, targets: Tensor) -> None:
    """Let every unused target share the blocks of its source. O(n * blocks)."""
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        if source < 0 or target < 0:
            continue
        if allocator.seq_lens[target] != 0:
            allocator.failures += 1
            continue
        blocks = allocator.block_tables[source, : _num_blocks(allocator, source)]
        allocator.ref_counts[blocks.long()] += 1
        allocator.block_tables[target, : len(blocks)] = blocks
        allocator.seq_lens[target] = allocator.seq_lens[source]


def release_rows(allocator: DeviceAllocator, rows: Tensor) -> None:
    """Drop each row's references; free blocks without references. O(n * blocks)."""
    for row in rows.tolist():
        if row < 0:
            continue
        for block in allocator.block_tables[row, : _num_blocks(allocator, row)].tolist():
            allocator.ref_counts[block] -= 1
            if allocator.ref_counts[block] == 0:
                allocator.free[allocator.num_free.long()] = block
                allocator.num_free += 1
        allocator.block_tables[row] = -1
        allocator.seq_lens[row] = 0


def _pop(allocator: DeviceAllocator) -> int:
    """Pop a block off the free stack, with one reference."""
    allocator.num_free -= 1
    block = int(allocator.free[int(allocator.num_free)])
    allocator.ref_counts[block] = 1
    return block


def _num_blocks(allocator: DeviceAllocator, row: int) -> int:
    return -(-int(allocator.seq_lens[row]) // allocator.block_size)
