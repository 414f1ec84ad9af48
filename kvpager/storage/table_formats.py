"""Block tables in the forms that attention kernels take.

Nothing here touches a tensor: wrap the arrays by `torch.from_numpy`, or send them elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvpager import _validate as arguments
from kvpager.blocks.protocol import CacheManager
from kvpager.blocks.sequences import Target
from kvpager.plans import Int32, Int64, Step


class RaggedTables(NamedTuple):
    """What FlashInfer's paged wrappers `plan` with: table i is `indices[indptr[i]:indptr[i + 1]]`.

    `indptr` int32 [n + 1]; `indices` int32 [blocks of all]; `last_page_len` int32 [n], 1 to
    block_size, and 0 for an empty sequence, as FlashInfer has it.
    """

    indptr: Int32
    indices: Int32
    last_page_len: Int32


class PaddedTables(NamedTuple):
    """What flash-attn's `flash_attn_with_kvcache` and vLLM's backends take.

    `block_table` int32 [rows, width]; `seq_lens` int32 [rows]; `slot_mapping` int64 [tokens].
    Entries behind a sequence's last block name block 0 (never read, but must exist); slots of
    padded tokens are -1 (never written). Padded rows have length 0.
    """

    block_table: Int32
    seq_lens: Int32
    slot_mapping: Int64


def flashinfer(manager: CacheManager, sequences: Target) -> RaggedTables:
    """Tables for FlashInfer. O(blocks).

    Raises: `StaleSequence`, `SequenceSwapped`; `ValueError` for sequences whose front slid away,
    since FlashInfer has no word for that.
    """
    tables, lengths = manager.tables_and_lengths(sequences)
    counts = -(-lengths // manager.block_size)
    used = np.arange(tables.shape[1]) < counts[:, None]
    indices = tables[used]
    if np.any(indices < 0):
        raise ValueError("the front of a sequence slid away: FlashInfer has no word for that")
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    last = (lengths - (counts - 1) * manager.block_size) * (lengths > 0)
    return RaggedTables(indptr, indices, last.astype(np.int32))


def flash_attention(
    manager: CacheManager,
    sequences: Target,
    step: Step | None = None,
    *,
    num_rows: int | None = None,
    width: int | None = None,
    num_tokens: int | None = None,
) -> PaddedTables:
    """Tables for flash-attn and vLLM. O(rows * width).

    Args:
        step: what `append` returned; its slots become `slot_mapping`.
        num_rows, width, num_tokens: pad to so many, for a captured CUDA graph.

    Blocks that slid out of a window are padding, too: the kernel must not look back so far.
    Raises: `StaleSequence`, `SequenceSwapped`; `ValueError` where it does not fit.
    """
    tables, lengths = manager.tables_and_lengths(sequences)
    tables = np.maximum(tables, 0)
    slots = np.empty(0, np.int64) if step is None else step.slots
    count, widest = tables.shape
    num_rows = arguments.count("num_rows", count if num_rows is None else num_rows, at_least=count)
    width = arguments.count("width", widest if width is None else width, at_least=widest)
    num_slots = len(slots)
    num_tokens = arguments.count(
        "num_tokens", num_slots if num_tokens is None else num_tokens, at_least=num_slots
    )
    padded = PaddedTables(
        np.zeros((num_rows, width), np.int32),
        np.zeros(num_rows, np.int32),
        np.full(num_tokens, -1, np.int64),
    )
    padded.block_table[:count, :widest] = tables
    padded.seq_lens[:count] = lengths
    padded.slot_mapping[:num_slots] = slots
    return padded
