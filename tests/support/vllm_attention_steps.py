"""A step of vLLM for the attention of one layer: prompts and decodes, on vLLM's pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kvpager.kernels import reference
from kvpager.ops import paged_attention

HEADS, KV_HEADS, DIM, SIZE, BLOCKS = 4, 2, 32, 32, 12


def config(dtype: torch.dtype = torch.float32, transfer: Any = None) -> Any:
    model = SimpleNamespace(dtype=dtype)
    return SimpleNamespace(model_config=model, kv_transfer_config=transfer)


def pages_of(dtype: torch.dtype = torch.float32, content: float = float("nan")) -> Tensor:
    """Return pages of one layer, full of `content`."""
    return torch.full((BLOCKS, KV_HEADS, SIZE, 2 * DIM), content, dtype=dtype)


class Step:
    """A decode of a long row, a chunk of a prompt over its prefix, and a whole prompt."""

    def __init__(self, stale: float = float("nan")) -> None:
        """Make a step on pages whose unused elements are `stale`."""
        lengths, counts, self.stale = (100, 57, 40), (1, 20, 40), stale
        self.tables = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(1)).int()
        self.tables = self.tables.view(3, 4)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.starts = torch.tensor([0, *counts]).cumsum(0).int()
        positions = torch.cat([torch.arange(length) for length in lengths])
        rows = torch.repeat_interleave(torch.arange(3), self.lengths.long())
        self.slots = self.tables[rows, positions // SIZE].long() * SIZE + positions % SIZE
        made = torch.Generator().manual_seed(2)
        self.key, self.value = torch.randn(2, sum(lengths), KV_HEADS, DIM, generator=made)
        self.query = torch.randn(sum(counts), HEADS, DIM, generator=made)

    def metadata(self, **changes: Any) -> Any:
        made = SimpleNamespace(
            num_actual_tokens=len(self.query),
            block_table=self.tables,
            seq_lens=self.lengths,
            query_start_loc=self.starts,
            causal=True,
            dynamic_causal=None,
        )
        vars(made).update(changes)
        return made

    def run(self, impl: Any, **changes: Any) -> Tensor:
        """Write the keys and values, and attend; three tokens of padding follow the others."""
        dtype = self.query.dtype
        pages, padding = pages_of(dtype, self.stale), torch.zeros(3, KV_HEADS, DIM, dtype=dtype)
        slots = torch.cat((self.slots, torch.tensor([-1, -1, -1])))
        key, value = torch.cat((self.key, padding)), torch.cat((self.value, padding))
        layer = SimpleNamespace(isa="vec", _k_scale_float=1.0, _v_scale_float=1.0)
        impl.do_kv_cache_update(layer, key, value, pages, slots)
        query = torch.cat((self.query, torch.zeros(3, HEADS, DIM, dtype=dtype)))
        output = torch.full_like(query, 7)
        args = (layer, query, key, value, pages, self.metadata(**changes), output)
        assert impl.forward(*args) is output
        assert output[-3:].eq(7).all()
        return output[:-3]

    def expected(self, **options: Any) -> Tensor:
        """The same by the reference kernel, over pages of kvpager."""
        caches = torch.zeros(2, BLOCKS, SIZE, KV_HEADS, DIM)
        reference.append_kv(self.key, self.value, *caches, self.slots)
        rows = (self.tables, self.lengths, self.starts)
        return paged_attention(self.query, *caches, *rows, softmax_scale=0.3, **options)
