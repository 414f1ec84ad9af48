"""Copies between vLLM's pages and rows of host memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvpager.integrations.vllm.host_rows import HostRows
from kvpager.integrations.vllm.interface import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from kvpager.integrations.vllm.page_order import PageOrder


class Slots(BlockIDsLoadStoreSpec):  # type: ignore[misc]
    """Rows of host memory, one for each chunk."""


class Copy(NamedTuple):
    """The blocks of one group in a transfer.

    Attributes:
        group: the number of the group.
        blocks: blocks of the device, int64 [n].
        places: for each block, the row of its chunk and its position in the chunk.
        slots: the rows.
    """

    group: int
    blocks: NDArray[np.int64]
    places: list[tuple[int, int]]
    slots: NDArray[np.int64]


class KvpagerOffloadingWorker(OffloadingWorker):  # type: ignore[misc]
    """Copies blocks when vLLM asks for it, in order with the model's own work on the device.

    A copy has ended when its call returns, so no block and no row is in use between two steps.
    """

    def __init__(
        self,
        caches: CanonicalKVCaches,
        rows: HostRows,
        *,
        rank: int,
        block_bytes: int,
        blocks_per_chunk: int,
        orders: Sequence[PageOrder] = (),
    ) -> None:
        """Copy between `caches` and the part of each row that belongs to worker `rank`.

        A worker has `block_bytes` for each block of a chunk. With `orders`, one for each layer of
        the only group and worker, rows have the layout that stacks share. Raises: `ValueError` if a
        block of `caches` has more bytes.
        """
        self._memory, self._per_chunk = rows, blocks_per_chunk
        self._num_bytes = [
            sum(ref.page_size_bytes for ref in refs) for refs in caches.group_data_refs
        ]
        if max(self._num_bytes) > block_bytes:
            raise ValueError(f"caches: a block has {max(self._num_bytes)} of {block_bytes} bytes")
        part_bytes = block_bytes * blocks_per_chunk
        part = rows.rows[:, rank * part_bytes : (rank + 1) * part_bytes].view(np.int8)
        # int8 [rows, blocks of a chunk, bytes of a block], a view: rows are not contiguous.
        self._rows = _by_block(part, blocks_per_chunk)
        if orders:
            self._parts = [list(_common_parts(caches, orders, part, blocks_per_chunk))]
        else:
            self._parts = [
                list(_page_parts(caches, refs, self._rows)) for refs in caches.group_data_refs
            ]
        self._finished = list[TransferResult]()

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Slots) -> bool:
        start = time.perf_counter()
        for group, blocks, places, slots in self._copies(src_spec, dst_spec):
            is_full = len(places) == len(slots) * self._per_chunk
            if not is_full or self._num_bytes[group] < self._rows.shape[2]:
                self._rows[slots] = 0  # stores must not get the earlier content of the row
            for part in self._parts[group]:
                for place, page in zip(places, _read(part, blocks), strict=True):
                    part.room[place] = page
        self._note(job_id, src_spec, start)
        return True

    def submit_load(self, job_id: int, src_spec: Slots, dst_spec: GPULoadStoreSpec) -> bool:
        start = time.perf_counter()
        for group, blocks, places, _ in self._copies(dst_spec, src_spec):
            for part in self._parts[group]:
                _write(part, blocks, [part.room[place] for place in places])
        self._note(job_id, dst_spec, start)
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Return at once: copies have ended."""

    def _copies(self, device: GPULoadStoreSpec, host: Slots) -> Iterator[Copy]:
        """Pair the blocks of each group with places in rows."""
        blocks, slots = (each.block_ids.astype(np.int64) for each in (device, host))
        for group, (num_blocks, first) in enumerate(
            zip(device.group_sizes, device.block_indices, strict=True)
        ):
            if not num_blocks:
                continue
            skipped = first % self._per_chunk  # blocks of the first chunk before the transfer
            num_slots = -(-(num_blocks + skipped) // self._per_chunk)
            numbers = np.arange(skipped, skipped + num_blocks)
            rows = slots[numbers // self._per_chunk].tolist()
            places = list(zip(rows, (numbers % self._per_chunk).tolist(), strict=True))
            yield Copy(group, blocks[:num_blocks], places, slots[:num_slots])
            blocks, slots = blocks[num_blocks:], slots[num_slots:]
        if len(blocks) or len(slots):
            raise ValueError("vLLM's transfer names more blocks or rows than its groups have")

    def _note(self, job_id: int, device: GPULoadStoreSpec, start: float) -> None:
        sizes = zip(device.group_sizes, self._num_bytes, strict=True)
        num_bytes = sum(count * each for count, each in sizes)
        seconds = time.perf_counter() - start
        self._finished.append(TransferResult(job_id, True, num_bytes, seconds))


class _Part(NamedTuple):
    """Numbers of each page of one layer, and the room of these numbers in rows.

    Attributes:
        pages: [blocks, numbers of a page].
        room: [rows, blocks of a chunk, numbers].
        order: the place in the page of each number in the room; None for all, in the same order.
    """

    pages: Tensor
    room: NDArray[Any]
    order: NDArray[np.int64] | None = None


def _page_parts(caches: CanonicalKVCaches, refs: Any, rows: NDArray[np.int8]) -> Iterator[_Part]:
    """Yield all bytes of pages, layer after layer."""
    start = 0
    for ref in refs:
        stop = start + ref.page_size_bytes
        pages = caches.tensors[ref.tensor_idx].tensor[:, : stop - start]
        yield _Part(pages, rows[:, :, start:stop])
        start = stop


def _common_parts(
    caches: CanonicalKVCaches, orders: Sequence[PageOrder], row: NDArray[np.int8], per_chunk: int
) -> Iterator[_Part]:
    """Yield keys and values of each layer. Their rooms are those of `CommonLayout`."""
    [refs], start = caches.group_data_refs, 0
    for ref, order in zip(refs, orders, strict=True):
        bits = 8 * ref.page_size_bytes // sum(map(len, order))
        pages = caches.tensors[ref.tensor_idx].tensor.view(getattr(torch, f"int{bits}"))
        numbers = row.view(f"i{bits // 8}")
        for places in order:
            stop = start + per_chunk * len(places)
            yield _Part(pages, _by_block(numbers[:, start:stop], per_chunk), places)
            start = stop


def _by_block(rows: NDArray[Any], per_chunk: int) -> NDArray[Any]:
    """Return a view [rows, blocks of a chunk, numbers]: rows are not contiguous."""
    by_block: NDArray[Any] = torch.from_numpy(rows).unflatten(1, (per_chunk, -1)).numpy()
    return by_block


# On a CPU a loop takes a tenth of the time of torch's indexing, which copies byte by byte.


def _read(part: _Part, blocks: NDArray[np.int64]) -> Iterable[NDArray[Any]]:
    """Return the numbers of blocks, in order."""
    if part.pages.device.type == "cpu":
        pages = part.pages.numpy()
        read: Iterable[NDArray[Any]] = (pages[block] for block in blocks.tolist())
    else:
        chosen = torch.from_numpy(blocks).to(part.pages.device)
        read = part.pages.index_select(0, chosen).cpu().numpy()
    order = part.order
    return read if order is None else (page.take(order) for page in read)


def _write(part: _Part, blocks: NDArray[np.int64], contents: Sequence[NDArray[Any]]) -> None:
    """Replace the numbers of blocks."""
    if part.pages.device.type == "cpu":
        pages, place = part.pages.numpy(), slice(None) if part.order is None else part.order
        for block, content in zip(blocks.tolist(), contents, strict=True):
            pages[block][place] = content
        return
    device = part.pages.device
    rows, new = torch.from_numpy(blocks).to(device), torch.from_numpy(np.stack(contents)).to(device)
    if part.order is None:
        part.pages.index_copy_(0, rows, new)
    else:
        part.pages[rows[:, None], torch.from_numpy(part.order).to(device)] = new
