"""Block tables in the formats of other attention kernels.

The functions return NumPy arrays. Wrap them with `torch.from_numpy`, or send them elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvpager import _validate as arguments
from kvpager.blocks.protocol import CacheManager
from kvpager.blocks.sequences import Target
from kvpager.plans import AppendPlan, Int32, Int64


class RaggedTables(NamedTuple):
    """Tables for `plan` of FlashInfer's paged wrappers."""

    indptr: Int32  # [n + 1]; table i is `indices[indptr[i]:indptr[i + 1]]`
    indices: Int32  # [blocks of all tables]
    last_page_len: Int32  # [n], 1 to block_size, or 0 for an empty sequence


class PaddedTables(NamedTuple):
    """Tables for flash-attn's `flash_attn_with_kvcache` and vLLM's backends.

    Entries of `block_table` after a sequence's last block are 0: kernels never read them, but the
    block must exist.
    """

    block_table: Int32  # [rows, width]
    seq_lens: Int32  # [rows]; 0 for padded rows
    slot_mapping: Int64  # [tokens]; -1 for padded tokens, which are never written


def flashinfer(manager: CacheManager, sequences: Target) -> RaggedTables:
    """Return tables for FlashInfer. O(blocks).

    Raises: `StaleSequence`, `SequenceSwapped`; `ValueError` for a sequence with dropped front
    blocks, which the format cannot express.
    """
    tables, lengths = manager.tables_and_lengths(sequences)
    counts = -(-lengths // manager.block_size)
    used = np.arange(tables.shape[1]) < counts[:, None]
    indices = tables[used]
    if np.any(indices < 0):
        raise ValueError("sequences: the first blocks of one are gone. Pass whole sequences.")
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    last = (lengths - (counts - 1) * manager.block_size) * (lengths > 0)
    return RaggedTables(indptr, indices, last.astype(np.int32))


def flash_attention(
    manager: CacheManager,
    sequences: Target,
    step: AppendPlan | None = None,
    *,
    num_rows: int | None = None,
    width: int | None = None,
    num_tokens: int | None = None,
) -> PaddedTables:
    """Return tables for flash-attn and vLLM. O(rows * width).

    Args:
        step: the result of `append`; its slots become `slot_mapping`.
        num_rows, width, num_tokens: sizes to pad to, for a captured CUDA graph.

    Blocks dropped before a window become padding: the kernel must not look back that far.
    Raises: `StaleSequence`, `SequenceSwapped`; `ValueError` where it does not fit.
    """
    tables, lengths = manager.tables_and_lengths(sequences)
    tables = np.maximum(tables, 0)
    slots = np.empty(0, np.int64) if step is None else step.slots
    (count, widest), num_slots = tables.shape, len(slots)
    num_rows = _at_least(count, "num_rows", num_rows)
    width = _at_least(widest, "width", width)
    num_tokens = _at_least(num_slots, "num_tokens", num_tokens)
    block_table = np.zeros((num_rows, width), np.int32)
    block_table[:count, :widest] = tables
    seq_lens = np.zeros(num_rows, np.int32)
    seq_lens[:count] = lengths
    slot_mapping = np.full(num_tokens, -1, np.int64)
    slot_mapping[:num_slots] = slots
    return PaddedTables(block_table, seq_lens, slot_mapping)


def _at_least(least: int, name: str, size: int | None) -> int:
    return least if size is None else arguments.count(name, size, at_least=least)
