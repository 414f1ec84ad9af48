"""Allocate blocks for the next token of every row on the device, without host synchronisation.

    allocator = DeviceAllocator(num_blocks, block_size, num_rows, max_blocks_per_row, device="cuda")

    slots, copies = step_alloc(allocator, rows)     # one more slot per row
    copy_blocks(storage, copies)                    # copy-on-write, before writing
    append_kv(key, value, *layer, slots)            # per layer; skips slots of -1
    paged_attention(query, *layer, allocator.block_tables[rows], allocator.seq_lens[rows])

    fork_rows(allocator, sources, targets)          # targets share every block of their sources
    release_rows(allocator, rows)                   # frees blocks without other references

No value passes through the host and the allocator's tensors keep their addresses, so a CUDA graph
can capture whole decode steps. `BlockManager` does far more (prefixes, eviction, swapping). Use
this allocator in loops that cannot afford to call it.

**The algorithm.** Free blocks are a stack with a counter. A step only pops and a release only
pushes. Kernels of one stream run one after another, so a pop never races with a push: the stack
needs only a counter with atomic additions (no compare-and-swap, no ABA). A program counts the
blocks its rows need and pops them at once. If the stack runs empty, the program returns the excess
to the counter and refuses the rows it cannot serve. Copy-on-write is a race between all rows that
share their last block:

1. A row that finds its last block shared decrements the reference count. The old value tells the
   row how many references were left. If others were left, the row needs a new block to copy to. The
   last row increments the count again and may keep the block. It adds 1 instead of storing 1,
   because a refused row may restore its own reference at this moment.
2. After all rows have finished step 1, each row that may keep its last block reads the reference
   count again. It writes to the block if it holds the only reference. If another row was refused a
   copy, both rows hold the block, and both are refused. Deciding this in step 1 would let a row
   write into a block that another row still holds.

Aggregated pops come from SGLang's `alloc_decode_kernel`, which ranks rows in a list that the host
truncates. Reference counts and copy-on-write come from vLLM (Kwon et al., 2023), moved to the
device. `reference_alloc.py` is the specification in plain torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvpager.kernels import debug
from kvpager.kernels.args import require_device, require_dims, require_integers, require_shape
from kvpager.kernels.backends import select
from kvpager.kernels.device_allocator import DeviceAllocator


class AllocatedStep(NamedTuple):
    """Slots of a step's tokens, and the block copies to run first."""

    slots: Tensor
    """int64 [rows]: `block * block_size + offset`; -1 for a refused row, or a row of -1."""
    copies: Tensor
    """int32 [rows, 2]: pairs (source, destination), -1 where a row needs no copy."""


@torch.no_grad()
def step_alloc(allocator: DeviceAllocator, rows: Tensor) -> AllocatedStep:
    """Allocate one more token slot for every row of `rows`. O(rows), one or two launches.

    - `rows` int32 or int64 [n]: each row at most once. -1 is no row, so a captured CUDA graph can
      keep its shape.

    A row whose last block is full gets a new block. A row whose last block is shared gets a new
    block too, with an entry in `copies` to copy before writing. The last of the rows that share a
    block keeps it. The call refuses a row if the pool is empty or the row's table is full: its
    length and table stay, its slot is -1, and `failures` rises by one. When blocks run out, the
    order in which the GPU runs rows decides which rows are refused.

    Raises: `ValueError`, `TypeError` for wrong shapes, dtypes or devices. Only debug mode
    (`debug.py`) checks row numbers.
    """
    require_dims("rows", rows, "[n]", 1)
    _require_row_numbers(allocator, rows=rows)
    slots, copies = select("step_alloc", allocator.seq_lens.device)(allocator, rows)
    return AllocatedStep(slots, copies)


@torch.no_grad()
def fork_rows(allocator: DeviceAllocator, sources: Tensor, targets: Tensor) -> None:
    """Let each target row share all blocks of its source row. O(rows * blocks), one launch.

    - `sources`, `targets` int32 or int64 [n]: pairs with a -1 are skipped. A source may occur
      several times. A target occurs once, is not a source of the same call, and is unused.

    The call refuses a target in use: it stays as it is, and `failures` rises by one.
    Raises: as `step_alloc`.
    """
    require_dims("sources", sources, "[n]", 1)
    require_shape("targets", targets, tuple(sources.shape), "[n]")
    _require_row_numbers(allocator, targets=targets)
    _require_row_numbers(allocator, distinct=False, sources=sources)
    if debug.enabled() and bool(torch.isin(targets[targets >= 0], sources).any()):
        raise ValueError("a row is a source and a target of one call; fork in two calls")
    select("fork_rows", allocator.seq_lens.device)(allocator, sources, targets)


@torch.no_grad()
def release_rows(allocator: DeviceAllocator, rows: Tensor) -> None:
    """Release all blocks of `rows` and make the rows unused. O(rows * blocks), one launch.

    - `rows` int32 or int64 [n]: each row at most once. -1 and unused rows are skipped.

    Blocks that other rows share stay allocated. Raises: as `step_alloc`.
    """
    require_dims("rows", rows, "[n]", 1)
    _require_row_numbers(allocator, rows=rows)
    select("release_rows", allocator.seq_lens.device)(allocator, rows)


def _require_row_numbers(
    allocator: DeviceAllocator, distinct: bool = True, **tensors: Tensor
) -> None:
    require_device(allocator.seq_lens, **tensors)
    num_rows = len(allocator.seq_lens)
    for name, rows in tensors.items():
        require_integers(name, rows)
        if not debug.enabled() or len(rows) == 0:
            continue
        highest = int(rows.max())
        if highest >= num_rows:
            raise ValueError(
                f"{name} has row {highest}; the allocator has rows 0 to {num_rows - 1}"
            )
        used, times = rows[rows >= 0].unique(return_counts=True)
        if distinct and bool((times > 1).any()):
            raise ValueError(f"{name} has row {int(used[times > 1][0])} twice; pass every row once")
