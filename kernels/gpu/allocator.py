# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The device-side allocator in Triton. `kvpager.kernels.step_alloc` describes the algorithm.

`tests/support/allocator_model.py` models these kernels and runs their memory accesses in every
order that a GPU might. Its statements have the same order and the [step] numbers of this file.
"""

# Legend. Names of tensors are pointers inside kernels. A lane is one row of the call; a program has
# LANES lanes. A program handles COLUMNS table entries of a row at a time. -1 is no row, slot or
# block. A slot of PENDING is decided after all programs have finished `step_rows`.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpager.kernels.device_allocator import DeviceAllocator
from kvpager.kernels.gpu import config

# A single program with LANES_MIN to LANES_ALONE_MAX lanes settles pending slots itself. More rows
# take two launches of programs with LANES lanes.
LANES_MIN = 128
LANES_ALONE_MAX = 512
LANES = 256
COLUMNS = 128

PENDING: tl.constexpr = tl.constexpr(-2)


@triton.jit
def _settle(
    slots, seq_lens, ref_counts, failures, lane, row, length, tail, stays,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Let rows keep their last block if no other row holds it; refuse the others."""
    # [S1] Volatile: read the current counter, not a cached value.
    holders = tl.load(ref_counts + tail, mask=stays, other=0, volatile=True)
    alone = stays & (holders == 1)
    slot = tl.where(alone, tail * BLOCK_SIZE + length % BLOCK_SIZE, -1)
    # [S2]
    tl.store(slots + lane, slot.to(tl.int64), mask=stays)
    # [S3]
    tl.store(seq_lens + row, length + 1, mask=alone)
    # [S4]
    tl.atomic_add(failures, tl.sum((stays & (holders != 1)).to(tl.int32), 0), sem="relaxed")


@triton.jit(do_not_specialize=["num_lanes"], do_not_specialize_on_alignment=["rows"])
def step_rows(
    slots, copies, rows, seq_lens, block_tables, ref_counts, free, num_free, failures, num_lanes,
    num_columns,
    BLOCK_SIZE: tl.constexpr, LANES: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Allocate one more slot per row, or PENDING if the row may keep its last block."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    exists = lane < num_lanes
    # [1]
    row = tl.load(rows + lane, mask=exists, other=-1).to(tl.int64)
    live = row >= 0
    row = tl.where(live, row, 0)
    # [2]
    length = tl.load(seq_lens + row, mask=live, other=0)
    column = length // BLOCK_SIZE
    offset = length % BLOCK_SIZE
    entry = block_tables + row * num_columns + column
    partial = live & (offset != 0)
    grows = live & (offset == 0) & (column < num_columns)
    # [3]
    tail = tl.load(entry, mask=partial, other=0)
    # [4]
    holders = tl.load(ref_counts + tail, mask=partial, other=1)
    shared = partial & (holders > 1)
    # [5] Leave the shared block ...
    before = tl.atomic_add(ref_counts + tail, -1, mask=shared, sem="relaxed")
    copying = shared & (before > 1)
    # [6] ... but the last row to leave returns. Other rows may return too, so this is an add.
    tl.atomic_add(ref_counts + tail, 1, mask=shared & (before == 1), sem="relaxed")

    # [7] Pop for all lanes at once: the lane of rank r gets the r-th block from the top.
    needs = (grows | copying).to(tl.int32)
    rank = tl.cumsum(needs, 0) - needs
    wanted = tl.sum(needs, 0)
    found = tl.atomic_add(num_free, -wanted, sem="relaxed")
    served = (needs != 0) & (rank < found)
    # [8] Return what was popped from an empty stack.
    tl.atomic_add(num_free, wanted - tl.sum(served.to(tl.int32), 0), sem="relaxed")
    # [9]
    block = tl.load(free + (found - 1 - rank), mask=served, other=0)
    # [10] No other row has the block yet.
    tl.store(ref_counts + block, 1, mask=served)
    # [11]
    tl.store(entry, block, mask=served)
    # [12] A refused row holds its last block as before.
    tl.atomic_add(ref_counts + tail, 1, mask=copying & (served == 0), sem="relaxed")

    stays = partial & (copying == 0)
    slot = tl.where(served, block * BLOCK_SIZE + offset, tl.where(stays, PENDING, -1))
    # [13]
    tl.store(slots + lane, slot.to(tl.int64), mask=exists)
    # [14]
    copied = copying & served
    tl.store(copies + lane * 2, tl.where(copied, tail, -1), mask=exists)
    tl.store(copies + lane * 2 + 1, tl.where(copied, block, -1), mask=exists)
    # [15]
    tl.store(seq_lens + row, length + 1, mask=served)
    # [16]
    refused = live & (served == 0) & (stays == 0)
    tl.atomic_add(failures, tl.sum(refused.to(tl.int32), 0), sem="relaxed")
    if ALONE:
        # All rows are in this program, so its barrier covers them all.
        tl.debug_barrier()
        _settle(slots, seq_lens, ref_counts, failures, lane, row, length, tail, stays, BLOCK_SIZE)


@triton.jit(do_not_specialize=["num_lanes"], do_not_specialize_on_alignment=["rows"])
def settle_rows(
    slots, rows, seq_lens, block_tables, ref_counts, failures, num_lanes, num_columns,
    BLOCK_SIZE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Settle pending slots in a second launch, after all programs of `step_rows`."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    stays = tl.load(slots + lane, mask=lane < num_lanes, other=-1) == PENDING
    row = tl.load(rows + lane, mask=stays, other=0).to(tl.int64)
    length = tl.load(seq_lens + row, mask=stays, other=0)
    tail = tl.load(block_tables + row * num_columns + length // BLOCK_SIZE, mask=stays, other=0)
    _settle(slots, seq_lens, ref_counts, failures, lane, row, length, tail, stays, BLOCK_SIZE)


@triton.jit(do_not_specialize_on_alignment=["sources", "targets"])
def share_rows(
    sources, targets, seq_lens, block_tables, ref_counts, failures, num_columns,
    BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy the source's table to the target and count its references. One pair per program."""
    pair = tl.program_id(0)
    # [F1]
    source = tl.load(sources + pair).to(tl.int64)
    target = tl.load(targets + pair).to(tl.int64)
    if (source >= 0) & (target >= 0):
        # [F2]
        in_use = tl.load(seq_lens + target)
        if in_use != 0:
            # [F3]
            tl.atomic_add(failures, 1, sem="relaxed")
        else:
            # [F4]
            length = tl.load(seq_lens + source)
            num_blocks = tl.cdiv(length, BLOCK_SIZE)
            for first in range(0, num_blocks, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                held = column < num_blocks
                # [F5]
                block = tl.load(block_tables + source * num_columns + column, mask=held, other=0)
                # [F6]
                tl.atomic_add(ref_counts + block, 1, mask=held, sem="relaxed")
                # [F7]
                tl.store(block_tables + target * num_columns + column, block, mask=held)
            # [F8]
            tl.store(seq_lens + target, length)


@triton.jit(do_not_specialize_on_alignment=["rows"])
def drop_rows(
    rows, seq_lens, block_tables, ref_counts, free, num_free, num_columns,
    BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Drop the references of a row and push blocks without references. One row per program."""
    # [R1]
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    if row >= 0:
        # [R2]
        num_blocks = tl.cdiv(tl.load(seq_lens + row), BLOCK_SIZE)
        for first in range(0, num_blocks, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            held = column < num_blocks
            entry = block_tables + row * num_columns + column
            # [R3]
            block = tl.load(entry, mask=held, other=0)
            # [R4]
            before = tl.atomic_add(ref_counts + block, -1, mask=held, sem="relaxed")
            unheld = held & (before == 1)
            # [R5] Push for all columns at once.
            pushes = unheld.to(tl.int32)
            top = tl.atomic_add(num_free, tl.sum(pushes, 0), sem="relaxed")
            # [R6]
            tl.store(free + top + tl.cumsum(pushes, 0) - pushes, block, mask=unheld)
            # [R7]
            tl.store(entry, tl.full([COLUMNS], -1, tl.int32), mask=held)
        # [R8]
        tl.store(seq_lens + row, 0)


def step_alloc(allocator: DeviceAllocator, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `reference_alloc.step_alloc` without waiting for the GPU. O(n)."""
    num_lanes = len(rows)
    slots = torch.empty(num_lanes, dtype=torch.int64, device=rows.device)
    copies = torch.empty(num_lanes, 2, dtype=torch.int32, device=rows.device)
    if num_lanes == 0:
        return slots, copies
    rows = rows.contiguous()
    alone = num_lanes <= LANES_ALONE_MAX
    lanes = max(LANES_MIN, triton.next_power_of_2(num_lanes)) if alone else LANES
    grid = (triton.cdiv(num_lanes, lanes),)
    options = {"LANES": lanes, "num_warps": _warps(lanes), **config.COMPILER_OPTIONS}
    tensors, sizes = _tensors(allocator), (num_lanes, allocator.block_tables.shape[1])
    with config.on_device(rows):
        step_rows[grid](
            slots, copies, rows, *tensors, allocator.free, allocator.num_free, allocator.failures,
            *sizes,
            BLOCK_SIZE=allocator.block_size, ALONE=alone, **options,
        )  # fmt: skip
        if not alone:
            settle_rows[grid](
                slots,
                rows,
                *tensors,
                allocator.failures,
                *sizes,
                BLOCK_SIZE=allocator.block_size,
                **options,
            )
    return slots, copies


def fork_rows(allocator: DeviceAllocator, sources: Tensor, targets: Tensor) -> None:
    """Compute `reference_alloc.fork_rows` without waiting for the GPU. O(n * blocks)."""
    if len(sources) == 0:
        return
    with config.on_device(sources):
        share_rows[(len(sources),)](
            sources.contiguous(), targets.contiguous(), *_tensors(allocator), allocator.failures,
            allocator.block_tables.shape[1],
            BLOCK_SIZE=allocator.block_size, COLUMNS=COLUMNS, **config.COMPILER_OPTIONS,
        )  # fmt: skip


def release_rows(allocator: DeviceAllocator, rows: Tensor) -> None:
    """Compute `reference_alloc.release_rows` without waiting for the GPU. O(n * blocks)."""
    if len(rows) == 0:
        return
    with config.on_device(rows):
        drop_rows[(len(rows),)](
            rows.contiguous(), *_tensors(allocator), allocator.free, allocator.num_free,
            allocator.block_tables.shape[1],
            BLOCK_SIZE=allocator.block_size, COLUMNS=COLUMNS, **config.COMPILER_OPTIONS,
        )  # fmt: skip


def _warps(lanes: int) -> int:
    """Return the warps for one thread per lane; more would have to use shared memory."""
    return max(1, lanes // 32)


def _tensors(allocator: DeviceAllocator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensors that every kernel takes, in order."""
    return allocator.seq_lens, allocator.block_tables, allocator.ref_counts
