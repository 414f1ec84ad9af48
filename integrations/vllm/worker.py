"""Copies between vLLM's pages and rows of host memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
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
        slots: rows of its chunks, int64 [chunks].
        places: for each block its place in the rows of `slots`, int64 [n].
    """

    group: int
    blocks: Tensor
    slots: Tensor
    places: Tensor


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
        self._per_chunk = blocks_per_chunk
        self._layers = [list(_layers(caches, refs)) for refs in caches.group_data_refs]
        self._num_bytes = [sum(pages.shape[1] for pages, _ in each) for each in self._layers]
        if max(self._num_bytes) > block_bytes:
            raise ValueError(f"caches: a block has {max(self._num_bytes)} of {block_bytes} bytes")
        part_bytes = block_bytes * blocks_per_chunk
        part = rows.rows[:, rank * part_bytes : (rank + 1) * part_bytes].view(np.int8)
        # int8 [rows, blocks of a chunk, bytes of a block]
        self._rows = torch.from_numpy(part).unflatten(1, (blocks_per_chunk, block_bytes))
        self._finished = list[TransferResult]()

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Slots) -> bool:
        start = time.perf_counter()
        for group, blocks, slots, places in self._parts(src_spec, dst_spec):
            row, block = slots[places // self._per_chunk], places % self._per_chunk
            is_full = len(places) == len(slots) * self._per_chunk
            if not is_full or self._num_bytes[group] < self._rows.shape[2]:
                self._rows[slots] = 0  # no store below is to see what the row held before
            for pages, offset in self._layers[group]:
                room = self._rows[:, :, offset : offset + pages.shape[1]]
                room[row, block] = pages.index_select(0, blocks.to(pages.device)).cpu()
        self._note(job_id, src_spec, start)
        return True

    def submit_load(self, job_id: int, src_spec: Slots, dst_spec: GPULoadStoreSpec) -> bool:
        start = time.perf_counter()
        for group, blocks, slots, places in self._parts(dst_spec, src_spec):
            row, block = slots[places // self._per_chunk], places % self._per_chunk
            for pages, offset in self._layers[group]:
                room = self._rows[:, :, offset : offset + pages.shape[1]]
                pages.index_copy_(0, blocks.to(pages.device), room[row, block].to(pages.device))
        self._note(job_id, dst_spec, start)
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Return at once: copies have ended."""

    def _parts(self, device: GPULoadStoreSpec, host: Slots) -> Iterator[Part]:
        """Pair the blocks of each group with places in rows."""
        blocks = torch.from_numpy(device.block_ids.astype(np.int64))
        slots = torch.from_numpy(host.block_ids.astype(np.int64))
        for group, (num_blocks, first) in enumerate(
            zip(device.group_sizes, device.block_indices, strict=True)
        ):
            if not num_blocks:
                continue
            skipped = first % self._per_chunk  # blocks of the first chunk that are left out
            num_slots = -(-(num_blocks + skipped) // self._per_chunk)
            places = torch.arange(skipped, skipped + num_blocks)
            yield Part(group, blocks[:num_blocks], slots[:num_slots], places)
            blocks, slots = blocks[num_blocks:], slots[num_slots:]
        if len(blocks) or len(slots):
            raise ValueError("vLLM's transfer names more blocks or rows than its groups have")

    def _note(self, job_id: int, device: GPULoadStoreSpec, start: float) -> None:
        sizes = zip(device.group_sizes, self._num_bytes, strict=True)
        num_bytes = sum(count * each for count, each in sizes)
        seconds = time.perf_counter() - start
        self._finished.append(TransferResult(job_id, True, num_bytes, seconds))


def _layers(caches: CanonicalKVCaches, refs: Any) -> Iterator[tuple[Tensor, int]]:
    """Yield the pages of each layer of a group, int8 [blocks, bytes], and its place in a block."""
    offset = 0
    for ref in refs:
        pages = caches.tensors[ref.tensor_idx].tensor
        yield pages[:, : ref.page_size_bytes], offset
        offset += ref.page_size_bytes
