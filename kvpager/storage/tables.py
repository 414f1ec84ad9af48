"""Block tables in the forms that attention kernels take, and what changed since the last step.

Nothing here touches a tensor: wrap the arrays by `torch.from_numpy`, or send them elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpager import _validate as arguments
from kvpager.blocks.manager import BlockManager
from kvpager.blocks.state import Target
from kvpager.plans import Step

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


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


class TableDelta(NamedTuple):
    """What to write into a copy of the tables: `copy[rows, columns] = blocks`, int32 [n] each."""

    rows: Int32
    columns: Int32
    blocks: Int32


def flashinfer(manager: BlockManager, sequences: Target) -> RaggedTables:
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
    manager: BlockManager,
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


class TableMirror:
    """Keeps a copy of some tables elsewhere, on a GPU say, up to date by its changes alone.

        mirror = TableMirror(manager, num_rows=256, width=512)
        delta = mirror.update(batch)        # after each step
        device_tables[delta.rows, delta.columns] = delta.blocks

    Row i of the copy is the i-th sequence named in `update`; the copy begins filled with
    `padding`, and so is what a sequence does not use. A decode step of 256 sequences with 16-token
    blocks changes some 16 entries instead of 256 rows.
    """

    def __init__(
        self, manager: BlockManager, num_rows: int, width: int, *, padding: int = -1
    ) -> None:
        num_rows = arguments.count("num_rows", num_rows, at_least=1)
        width = arguments.count("width", width, at_least=1)
        self._manager = manager
        least = -arguments.COUNT_MAX
        self._padding = arguments.count("padding", padding, at_least=least)
        self._copy = np.full((num_rows, width), padding, np.int32)

    def update(self, sequences: Target) -> TableDelta:
        """What changed since the last call. O(rows * width).

        Raises: `StaleSequence`; `ValueError` where there are more rows or columns than agreed.
        """
        tables = self._manager.block_tables(sequences, padding=self._padding)
        rows, width = tables.shape
        most_rows, most = self._copy.shape
        if rows > most_rows or width > most:
            raise ValueError(
                f"tables {rows} x {width}: this mirror has room for {most_rows} x {most}"
            )
        now = np.full_like(self._copy, self._padding)
        now[:rows, :width] = tables
        at = np.nonzero(now != self._copy)
        self._copy = now
        return TableDelta(at[0].astype(np.int32), at[1].astype(np.int32), now[at])
