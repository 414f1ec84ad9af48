"""Blocks for the next token of every row, decided on the device: nothing for the host to wait for.

    allocator = DeviceAllocator(num_blocks, block_size, num_rows, max_blocks_per_row, device="cuda")

    slots, copies = step_alloc(allocator, rows)     # one more token slot for each row
    copy_blocks(storage, copies)                    # copy-on-write, before anything is written
    append_kv(key, value, *layer, slots)            # each layer; a slot of -1 is skipped
    paged_attention(query, *layer, allocator.tables[rows], allocator.lens[rows])

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

from kvpager import _validate as arguments
from kvpager._words import counted
from kvpager.errors import BrokenInvariant
from kvpager.kernels import debug
from kvpager.kernels.args import require_device, require_dims, require_integers, require_shape
from kvpager.kernels.backends import select

_INT32_MAX = torch.iinfo(torch.int32).max


class AllocatedStep(NamedTuple):
    """Where the tokens of a step go, and which blocks are copied first."""

    slots: Tensor
    """int64 [rows]: `block * block_size + offset`; -1 for a row that was refused, or is -1."""
    copies: Tensor
    """int32 [rows, 2]: pairs (source, destination), -1 where a row needs no copy."""


class DeviceAllocator:
    """The blocks of a pool, who holds them, and which are free: int32 tensors on one device.

    A *row* is a sequence's place: `tables[row]` are its blocks, in order, -1 after the last, and
    `lens[row]` its tokens. Rows of length 0 are unused. The tensors may be read at any time, and
    written between calls by who keeps the laws of `check` (to set up rows that were prefilled).
    All calls on one allocator belong on one stream.
    """

    __slots__ = (
        "block_size",
        "failures",
        "free",
        "lens",
        "num_free",
        "ref_counts",
        "tables",
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
        """All blocks free, all rows unused. O(num_blocks + num_rows * max_blocks_per_row).

        `ValueError` unless sizes are positive, `block_size` is a power of two, and slots can be
        counted in int32.
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
        # The top of the stack is its end, so block 0 is the first to be handed out.
        order = torch.arange(num_blocks - 1, -1, -1, dtype=torch.int32)
        self.free: Tensor = order.to(device)
        """int32 [num_blocks]: the free blocks are the first `num_free`, the top is the last."""
        self.num_free: Tensor = torch.full((1,), num_blocks, dtype=torch.int32, device=device)
        """int32 [1]."""
        self.ref_counts: Tensor = torch.zeros(num_blocks, dtype=torch.int32, device=device)
        """int32 [num_blocks]: how many tables hold each block."""
        self.tables: Tensor = torch.full((num_rows, columns), -1, dtype=torch.int32, device=device)
        """int32 [num_rows, max_blocks_per_row]."""
        self.lens: Tensor = torch.zeros(num_rows, dtype=torch.int32, device=device)
        """int32 [num_rows]: tokens."""
        self.failures: Tensor = torch.zeros(1, dtype=torch.int32, device=device)
        """int32 [1]: rows refused so far; set it to 0 at will."""

    def __repr__(self) -> str:
        rows, columns = self.tables.shape
        return (
            f"<DeviceAllocator: {counted(len(self.free), 'block')} of {self.block_size} slots, "
            f"{counted(rows, 'row')} of {counted(columns, 'block')} on {self.free.device}>"
        )

    def check(self) -> None:
        """Raise `BrokenInvariant` unless every block is free or held. O(blocks + rows * columns).

        Waits for the device.
        """
        num_blocks, columns = len(self.free), self.tables.shape[1]
        num_free = int(self.num_free)
        if not 0 <= num_free <= num_blocks:
            raise BrokenInvariant(f"num_free is {num_free} of {num_blocks} blocks")
        holders = [0] * num_blocks
        for row, (table, length) in enumerate(
            zip(self.tables.tolist(), self.lens.tolist(), strict=True)
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
    slots, copies = select("step_alloc", allocator.lens.device)(allocator, rows)
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
    select("fork_rows", allocator.lens.device)(allocator, sources, targets)


@torch.no_grad()
def release_rows(allocator: DeviceAllocator, rows: Tensor) -> None:
    """Give all blocks of `rows` back; the rows are unused again. O(rows * blocks), one launch.

    - `rows` int32 or int64 [n]: each row at most once; -1 is skipped, an unused row changes
      nothing.

    Blocks that other rows hold stay with them. Errors as those of `step_alloc`.
    """
    require_dims("rows", rows, "[n]", 1)
    _require_row_numbers(allocator, rows=rows)
    select("release_rows", allocator.lens.device)(allocator, rows)


def _require_row_numbers(
    allocator: DeviceAllocator, distinct: bool = True, **tensors: Tensor
) -> None:
    require_device(allocator.lens, **tensors)
    num_rows = len(allocator.lens)
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
