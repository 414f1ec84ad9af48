"""Blocks for the next token of every row, decided on the device: nothing for the host to wait for.

    allocator = DeviceAllocator(num_blocks, block_size, num_rows, max_blocks_per_row, device="cuda")

    slots, copies = step_alloc(allocator, rows)     # one more token slot for each row
    copy_blocks(storage, copies)                    # copy-on-write, before anything is written
    append_kv(key, value, *layer, slots)            # each layer; a slot of -1 is skipped
    paged_attention(query, *layer, allocator.block_tables[rows], allocator.seq_lens[rows])

    fork_rows(allocator, sources, targets)          # targets share every block of their sources
    release_rows(allocator, rows)                   # blocks that nobody else holds are free again

No value goes through the host, so whole decode steps can be captured in a CUDA graph and replayed:
the tensors of the allocator stay where they are. The control plane's `BlockManager` does far more
(prefixes, eviction, swapping); this one is for the loops that cannot afford to ask it.

**The algorithm.** Free blocks are a stack with a counter. A step only pops, a release only pushes,
and kernels of one stream run one after another, so no pop meets a push: a counter that is changed
by atomic additions is all the stack needs (no compare-and-swap, no ABA). A program counts what its
rows need and pops that at once; what it took beyond the bottom it gives back, and the rows that
came too late are refused. Copy-on-write is a race between all rows that share their last block:

1. A row that sees more holders than itself takes its hold away, and the counter's old value
   tells it how many were left. With others left, it needs a block to copy to; the last one takes
   its hold back and may keep the block. It adds 1 rather than store 1: at this moment a refused row
   may be putting its own hold back.
2. Only when all rows are through step 1, those that may keep their last block look at its holders
   again, and write to it if they are alone. They are not where another row was refused a copy; then
   both are refused. To decide this in step 1 would let a row write into a block that another one
   still holds, whose tokens are overwritten a step later.

Aggregated pops are those of SGLang's `alloc_decode_kernel` (which ranks rows in a list that the
host has cut off); reference counts and copy-on-write are vLLM's (Kwon et al., 2023), moved to the
device. `reference_alloc.py` says in plain torch what the kernels compute.
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
    """Where the tokens of a step go, and which blocks are copied first."""

    slots: Tensor
    """int64 [rows]: `block * block_size + offset`; -1 for a row that was refused, or is -1."""
    copies: Tensor
    """int32 [rows, 2]: pairs (source, destination), -1 where a row needs no copy."""


@torch.no_grad()
def step_alloc(allocator: DeviceAllocator, rows: Tensor) -> AllocatedStep:
    """One more token slot for every row of `rows`. O(rows), one or two launches.

    - `rows` int32 or int64 [n]: each row at most once; -1 is no row, which lets a captured CUDA
      graph keep its shape.

    A row whose last block is full gets a new one. A row whose last block is shared gets a new one
    too, and `copies` says what to copy into it before anything is written; the last of the rows
    that share a block keeps it. A row is refused, its length and table unchanged, its slot -1 and
    `failures` one higher, when the pool has no block left for it or its table is full. When blocks
    run out, *which* rows are refused is up to the order in which a GPU runs them.

    `ValueError` and `TypeError` for wrong shapes, dtypes and devices; row numbers are looked at in
    debug mode only (`debug.py`).
    """
    require_dims("rows", rows, "[n]", 1)
    _require_row_numbers(allocator, rows=rows)
    slots, copies = select("step_alloc", allocator.seq_lens.device)(allocator, rows)
    return AllocatedStep(slots, copies)


@torch.no_grad()
def fork_rows(allocator: DeviceAllocator, sources: Tensor, targets: Tensor) -> None:
    """Let each target row share all blocks of its source row. O(rows * blocks), one launch.

    - `sources`, `targets` int32 or int64 [n]; a pair with a -1 is skipped. A source may stand
      several times. A target stands once, is no source of the same call, and is unused.

    A target that is in use is refused: nothing changes for it, and `failures` is one higher.
    Errors as those of `step_alloc`.
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
    """Give all blocks of `rows` back; the rows are unused again. O(rows * blocks), one launch.

    - `rows` int32 or int64 [n]: each row at most once; -1 is skipped, an unused row changes
      nothing.

    Blocks that other rows hold stay with them. Errors as those of `step_alloc`.
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
