"""Block tables of a step's rows, and the attention arguments that layers share."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpager.ops import AttentionArgs, HostRows


class RowTables:
    """Block tables and lengths of rows, on a device and on the host. All layers share them.

    Args:
        block_tables: int32 [rows, blocks], on the device of the blocks.
        seq_lens: int32 [rows], tokens.
        host: both as arrays.
        cu_seqlens_q: int32 [rows + 1] for packed rows of several queries. None: all rows have
            equally many queries.
    """

    __slots__ = ("_args", "block_tables", "cu_seqlens_q", "host", "seq_lens")

    def __init__(
        self,
        block_tables: Tensor,
        seq_lens: Tensor,
        host: HostRows,
        cu_seqlens_q: Tensor | None = None,
    ) -> None:
        self.block_tables = block_tables
        self.seq_lens = seq_lens
        self.host = host
        self.cu_seqlens_q = cu_seqlens_q
        self._args: dict[tuple[object, ...], AttentionArgs] = {}

    def row(self, number: int) -> RowTables:
        """Return row `number` alone, with one query. O(1)."""
        one = slice(number, number + 1)
        return RowTables(self.block_tables[one], self.seq_lens[one], self.host.row(number))

    def args(
        self,
        num_queries: int = 1,
        *,
        softmax_scale: float | None,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None,
        mask: Tensor | None = None,
        num_columns: int | None = None,
    ) -> AttentionArgs:
        """Return the arguments of `attend`, the same object for all layers that ask alike.

        `num_queries`: of each row, unless there are `cu_seqlens_q`. `num_columns`: read the last
        ones only. O(1) once made, else O(rows).
        """
        # The kept arguments refer to their mask, so no other mask has its id.
        key = (num_queries, softmax_scale, causal, window, softcap, num_columns, id(mask))
        found = self._args.get(key)
        if found is None:
            starts, host = self.cu_seqlens_q, self.host
            if starts is None:
                starts, host = self._equal_starts(num_queries), host.with_queries(num_queries)
            found = AttentionArgs(
                self.block_tables,
                self.seq_lens,
                starts,
                softmax_scale=softmax_scale,
                causal=causal,
                window=window,
                softcap=softcap,
                mask=mask,
                # Each row's first token among the last columns.
                kv_starts=None if num_columns is None else (self.seq_lens - num_columns).clamp_(0),
                host_rows=host,
            )
            if mask is None or num_queries == 1:  # other masks are large: do not keep them
                self._args[key] = found
        return found

    def _equal_starts(self, num_queries: int) -> Tensor | None:
        if num_queries == 1:
            return None
        end = len(self.block_tables) * num_queries + 1
        device = self.block_tables.device
        return torch.arange(0, end, num_queries, dtype=torch.int32, device=device)
