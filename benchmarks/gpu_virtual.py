"""The part of `gpu.py` that maps blocks into rows: mode "virtual" beside block tables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_rig import KV_HEADS, Call, Rig, attention_call, require_close
from kvpager import BlockStorage
from kvpager.ops import AttentionArgs

HEAD_DIM, BLOCK_SIZE = 128, 16
# 16 tokens of 32 layers in bfloat16 are 2 MiB, a page of a GPU.
LAYERS = 32


def virtual(rig: Rig) -> None:
    """Measure mapping and unmapping per block, an unchanged batch, and reading of rows."""
    rows_count, length = (2, 64) if rig.dry else (8, 4096)
    try:
        storage = _storage(rig, rows_count * length // BLOCK_SIZE)
    except ModuleNotFoundError as error:
        rig.remark(f"virtual: skipped, {error}")
        return
    rows = storage.open_rows(rows_count, length)
    numbers = np.arange(rows_count, dtype=np.int32)
    tables = np.random.default_rng(0).permutation(storage.num_blocks).astype(np.int32)
    tables = tables.reshape(rows_count, -1)
    mapping, unmapping, unchanged = [], [], []
    for _ in range(2 if rig.dry else 10):
        mapping.append(_seconds(lambda: rows.follow(numbers, tables)))
        unchanged.append(_seconds(lambda: rows.follow(numbers, tables)))
        _wait(rig)
        # What is released leaves at the next change: here, one block of row 0.
        rows.release(numbers)
        _wait(rig)
        unmapping.append(_seconds(lambda: rows.follow(numbers[:1], tables[:1, :1])))
    rig.row(
        "virtual", f"{tables.size}_blocks",
        map_us=1e6 * statistics.median(mapping) / tables.size,
        unmap_us=1e6 * statistics.median(unmapping) / tables.size,
        unchanged_us=1e6 * statistics.median(unchanged),
    )  # fmt: skip
    rows.follow(numbers, tables)
    _read(rig, storage, rows, tables, length)


def _storage(rig: Rig, num_blocks: int) -> BlockStorage:
    made = BlockStorage(
        num_blocks, BLOCK_SIZE, [(KV_HEADS, HEAD_DIM, HEAD_DIM)] * (2 if rig.dry else LAYERS),
        dtype=torch.bfloat16, device=rig.device, mode="virtual",
    )  # fmt: skip
    made.tier().normal_()
    return made


def _read(rig: Rig, storage: BlockStorage, rows: Any, tables: Any, length: int) -> None:
    """Compare a decode step over block tables with torch's fused attention over rows."""
    count = len(tables)
    query = torch.randn(count, 4 * KV_HEADS, HEAD_DIM, device=rig.device).bfloat16()
    lengths = torch.full((count,), length, dtype=torch.int32, device=rig.device)
    args = AttentionArgs(torch.tensor(tables, device=rig.device), lengths)

    def mapped(layer: int) -> torch.Tensor:
        caches = rows.caches(layer)
        key, value = (cache[:, :length].transpose(1, 2) for cache in (caches.key, caches.value))
        return scaled_dot_product_attention(query[:, :, None], key, value, enable_gqa=True)[:, :, 0]

    layers = range(len(storage.layers))
    works: dict[str, list[Call]] = {
        "paged": [attention_call(query, storage, layer, args) for layer in layers],
        "mapped": [partial(mapped, layer) for layer in layers],
    }
    require_close("virtual rows", works["mapped"][0](), works["paged"][0]())
    times = rig.measure(works)
    num_bytes = storage.nbytes / len(layers)
    rig.row(
        "virtual", f"read_{count}x{length}",
        paged_gbps=num_bytes / min(times["paged"]) / 1e9,
        mapped_gbps=num_bytes / min(times["mapped"]) / 1e9,
        vs_paged=min(times["paged"]) / min(times["mapped"]),
    )  # fmt: skip


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _wait(rig: Rig) -> None:
    if rig.device.type == "cuda":
        torch.cuda.synchronize(rig.device)
