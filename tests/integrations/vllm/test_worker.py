"""The worker's copies between vLLM's pages and rows, against loops over NumPy arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.vllm_parts import (
    HostRows,
    KvpagerOffloadingWorker,
    Slots,
    caches_of,
    interface,
)

PAGE = 48


def worker_of(
    folder: Path, caches: Any, per_chunk: int = 1, rank: int = 0, block_bytes: int = 4 * PAGE
) -> tuple[KvpagerOffloadingWorker, HostRows]:
    rows = HostRows("w", 8, 2 * 4 * PAGE * per_chunk, num_processes=2, folder=str(folder))
    settings = {"rank": rank, "block_bytes": block_bytes, "blocks_per_chunk": per_chunk}
    return KvpagerOffloadingWorker(caches, rows, **settings), rows


def device(blocks: list[int], sizes: list[int], firsts: list[int]) -> Any:
    return interface.GPULoadStoreSpec(blocks, sizes, firsts)


def content(caches: Any, group: int, block: int) -> Any:
    """Return the bytes of a block through all layers of its group."""
    refs = caches.group_data_refs[group]
    return np.concatenate([caches.tensors[ref.tensor_idx].tensor[block].numpy() for ref in refs])


def test_a_row_holds_a_block_through_all_layers(tmp_path: Path) -> None:
    caches = caches_of([[0, 1, 2, 3]], 6, PAGE)
    worker, rows = worker_of(tmp_path, caches)
    worker.submit_store(1, device([4, 2], [2], [0]), Slots([5, 0]))
    for slot, block in ((5, 4), (0, 2)):
        assert (rows.rows[slot, : 4 * PAGE].view(np.int8) == content(caches, 0, block)).all()


def test_groups_and_chunks_come_back_to_other_blocks(tmp_path: Path) -> None:
    caches = caches_of([[0, 1], [2, 3]], 12, PAGE)
    worker, _ = worker_of(tmp_path, caches, per_chunk=2, block_bytes=2 * PAGE)
    worker.submit_store(1, device([1, 2, 3, 4, 5, 6], [4, 2], [0, 2]), Slots([7, 1, 3]))
    want = [content(caches, 0, block) for block in (1, 2, 3, 4)]
    want += [content(caches, 1, block) for block in (5, 6)]
    for tensor in caches.tensors:
        tensor.tensor[:] = 0
    worker.submit_load(2, Slots([7, 1, 3]), device([8, 9, 10, 11, 8, 9], [4, 2], [0, 2]))
    got = [content(caches, 0, block) for block in (8, 9, 10, 11)]
    got += [content(caches, 1, block) for block in (8, 9)]
    assert np.array_equal(want, got)


def test_a_load_may_begin_within_a_chunk(tmp_path: Path) -> None:
    caches = caches_of([[0]], 8, PAGE)
    worker, _ = worker_of(tmp_path, caches, per_chunk=4, block_bytes=PAGE)
    worker.submit_store(1, device([0, 1, 2, 3, 4, 5, 6, 7], [8], [0]), Slots([2, 6]))
    before = caches.tensors[0].tensor.clone()
    caches.tensors[0].tensor[:5] = 0
    worker.submit_load(2, Slots([2, 6]), device([0, 1, 2, 3, 4], [5], [3]))
    assert (caches.tensors[0].tensor[:5] == before[3:8]).all()


def test_what_a_row_held_before_is_not_kept(tmp_path: Path) -> None:
    caches = caches_of([[0, 1], [2]], 8, PAGE)
    worker, rows = worker_of(tmp_path, caches, per_chunk=2, block_bytes=2 * PAGE)
    worker.submit_store(1, device([1, 2], [2, 0], [0, 0]), Slots([4]))
    # One layer fewer, and the first block of the chunk is outside the window.
    worker.submit_store(2, device([3], [0, 1], [0, 1]), Slots([4]))
    row = rows.rows[4, : 4 * PAGE].view(np.int8)
    assert not row[: 2 * PAGE].any()
    assert (row[2 * PAGE : 3 * PAGE] == content(caches, 1, 3)).all()
    assert not row[3 * PAGE :].any()


def test_two_workers_use_their_own_parts_of_a_row(tmp_path: Path) -> None:
    caches = [caches_of([[0, 1, 2, 3]], 4, PAGE, seed) for seed in (1, 2)]
    workers = [worker_of(tmp_path, caches[rank], rank=rank)[0] for rank in (0, 1)]
    for worker in workers:
        worker.submit_store(1, device([2], [1], [0]), Slots([3]))
    want = [content(each, 0, 2) for each in caches]
    for worker, each in zip(workers, caches, strict=True):
        for tensor in each.tensors:
            tensor.tensor[:] = 0
        worker.submit_load(2, Slots([3]), device([1], [1], [0]))
    assert np.array_equal(want, [content(each, 0, 1) for each in caches])


def test_a_transfer_has_ended_and_says_how_much_it_moved(tmp_path: Path) -> None:
    worker, _ = worker_of(tmp_path, caches_of([[0, 1, 2, 3]], 4, PAGE))
    worker.submit_store(7, device([1, 2], [2], [0]), Slots([0, 1]))
    worker.wait({7})
    [result] = worker.get_finished()
    assert (result.job_id, result.success, result.transfer_size) == (7, True, 2 * 4 * PAGE)
    assert worker.get_finished() == []


def test_more_rows_than_blocks_are_refused(tmp_path: Path) -> None:
    worker, _ = worker_of(tmp_path, caches_of([[0, 1, 2, 3]], 4, PAGE))
    with pytest.raises(ValueError, match="more blocks or rows than its groups have"):
        worker.submit_store(1, device([1], [1], [0]), Slots([0, 1]))


def test_a_block_that_is_larger_than_its_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a block has 192 of 48 bytes"):
        worker_of(tmp_path, caches_of([[0, 1, 2, 3]], 4, PAGE), block_bytes=PAGE)
