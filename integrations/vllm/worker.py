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


class Slots(BlockIDsLoadStoreSpec):  # type: ignore[misc]
    """Rows of host memory, one for each chunk."""


class Part(NamedTuple):
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
    ) -> None:
        """Copy between `caches` and the part of each row that belongs to worker `rank`.

        A worker has `block_bytes` for each block of a chunk. Raises: `ValueError` if a block of
        `caches` has more.
        """
        self._memory, self._per_chunk = rows, blocks_per_chunk
        self._layers = [list(_layers(caches, refs)) for refs in caches.group_data_refs]
        self._num_bytes = [each[-1].stop for each in self._layers]
        if max(self._num_bytes) > block_bytes:
            raise ValueError(f"caches: a block has {max(self._num_bytes)} of {block_bytes} bytes")
        part_bytes = block_bytes * blocks_per_chunk
        part = rows.rows[:, rank * part_bytes : (rank + 1) * part_bytes].view(np.int8)
        # int8 [rows, blocks of a chunk, bytes of a block], a view: rows are not contiguous.
        self._rows = torch.from_numpy(part).unflatten(1, (blocks_per_chunk, block_bytes)).numpy()
        self._finished = list[TransferResult]()

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Slots) -> bool:
        start = time.perf_counter()
        for group, blocks, places, slots in self._parts(src_spec, dst_spec):
            is_full = len(places) == len(slots) * self._per_chunk
            if not is_full or self._num_bytes[group] < self._rows.shape[2]:
                self._rows[slots] = 0  # stores must not get the earlier content of the row
            for layer in self._layers[group]:
                for (slot, place), page in zip(places, _read(layer.pages, blocks), strict=True):
                    self._rows[slot, place, layer.start : layer.stop] = page
        self._note(job_id, src_spec, start)
        return True

    def submit_load(self, job_id: int, src_spec: Slots, dst_spec: GPULoadStoreSpec) -> bool:
        start = time.perf_counter()
        for group, blocks, places, _ in self._parts(dst_spec, src_spec):
            for layer in self._layers[group]:
                room = self._rows[:, :, layer.start : layer.stop]
                _write(layer.pages, blocks, [room[place] for place in places])
        self._note(job_id, dst_spec, start)
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Return at once: copies have ended."""

    def _parts(self, device: GPULoadStoreSpec, host: Slots) -> Iterator[Part]:
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
            yield Part(group, blocks[:num_blocks], places, slots[:num_slots])
            blocks, slots = blocks[num_blocks:], slots[num_slots:]
        if len(blocks) or len(slots):
            raise ValueError("vLLM's transfer names more blocks or rows than its groups have")

    def _note(self, job_id: int, device: GPULoadStoreSpec, start: float) -> None:
        sizes = zip(device.group_sizes, self._num_bytes, strict=True)
        num_bytes = sum(count * each for count, each in sizes)
        seconds = time.perf_counter() - start
        self._finished.append(TransferResult(job_id, True, num_bytes, seconds))


class _Layer(NamedTuple):
    """Pages of one layer, int8 [blocks, bytes], and the range of its bytes in a row."""

    pages: Tensor
    start: int
    stop: int


def _layers(caches: CanonicalKVCaches, refs: Any) -> Iterator[_Layer]:
    start = 0
    for ref in refs:
        stop = start + ref.page_size_bytes
        yield _Layer(caches.tensors[ref.tensor_idx].tensor[:, : stop - start], start, stop)
        start = stop


# On a CPU a loop takes a tenth of the time of torch's indexing, which copies byte by byte.


def _read(pages: Tensor, blocks: NDArray[np.int64]) -> Iterable[NDArray[np.int8]]:
    """Return the bytes of blocks, in order."""
    if pages.device.type == "cpu":
        array = pages.numpy()
        return (array[block] for block in blocks.tolist())
    chosen = pages.index_select(0, torch.from_numpy(blocks).to(pages.device))
    read: NDArray[np.int8] = chosen.cpu().numpy()
    return read


def _write(pages: Tensor, blocks: NDArray[np.int64], contents: Sequence[NDArray[np.int8]]) -> None:
    """Replace the bytes of blocks."""
    if pages.device.type == "cpu":
        array = pages.numpy()
        for block, content in zip(blocks.tolist(), contents, strict=True):
            array[block] = content
    else:
        chosen = torch.from_numpy(blocks).to(pages.device)
        pages.index_copy_(0, chosen, torch.from_numpy(np.stack(contents)).to(pages.device))
