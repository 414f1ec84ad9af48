"""Keys and values of many layers and batches, so that decode reads memory and not a cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpager import BlockStorage
from kvpager.ops import append_kv, paged_attention

KV_HEADS, QUERY_HEADS, BLOCK_SIZE = 4, 16, 16
# Layers of the storage: the blocks of a layer lie as far apart as in a model.
LAYERS = 16
ROTATION_BYTES = 256 << 20

# As fractions of the largest output element. A bfloat16 output has rounding errors of its own.
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2, "int8": 5e-2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Case(NamedTuple):
    """One decode step: every row attends with one query over `length` tokens."""

    dtype: str
    head_dim: int
    rows: int
    length: int

    @property
    def name(self) -> str:
        length = f"{self.length // 1024}k" if self.length >= 1024 else str(self.length)
        return f"decode_{self.dtype}_d{self.head_dim}_b{self.rows}_{length}"

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of one layer."""
        elements = 2 * self.rows * self.length * KV_HEADS * self.head_dim
        return elements * DTYPES[self.dtype].itemsize

    @property
    def num_items(self) -> int:
        return max(2, -(-ROTATION_BYTES // self.kv_bytes))


class Rotation:
    """Keys and values of many layers and batches, contiguous and in blocks."""

    def __init__(
        self,
        case: Case,
        kv_cache_dtype: str | None = None,
        room: int = 0,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        """`room`: slots per row beyond `case.length`."""
        self.case = case
        dtype = DTYPES[case.dtype]
        shape = (case.rows, KV_HEADS, case.length, case.head_dim)
        torch.manual_seed(0)
        self.query = torch.randn(case.rows, QUERY_HEADS, case.head_dim).to(dtype)
        self.pairs = [
            (torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))
            for _ in range(case.num_items)
        ]
        batches = -(-case.num_items // LAYERS)
        columns = -(-(case.length + room) // block_size)
        layer = (KV_HEADS, case.head_dim, case.head_dim)
        self.storage = BlockStorage(
            batches * case.rows * columns, block_size, [layer] * LAYERS, dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
        )  # fmt: skip
        # A pool that has been used for a while hands out blocks in random order.
        blocks = torch.randperm(self.storage.num_blocks, dtype=torch.int32)
        self.block_tables = blocks.view(batches, case.rows, columns)
        self.seq_lens = torch.full((case.rows,), case.length, dtype=torch.int32)
        self.stride = max(1, LAYERS // case.num_items)
        for item in range(case.num_items):
            self._fill(item)

    def place(self, item: int) -> tuple[int, Tensor]:
        """Return the layer and the block tables of an item."""
        batch, layer = divmod(item, LAYERS)
        return layer * self.stride, self.block_tables[batch]

    def _fill(self, item: int) -> None:
        layer, tables = self.place(item)
        positions = torch.arange(self.case.length)
        slots = token_slots(tables, positions, self.storage.block_size).flatten()
        keys, values = (packed(each) for each in self.pairs[item])
        append_kv(
            keys, values, *self.storage.layer(layer), slots, scales=self.storage.scales(layer)
        )

    def attend(self, item: int) -> Tensor:
        """Return attention over the blocks, [rows, query_heads, head_dim]."""
        layer, tables = self.place(item)
        return paged_attention(
            self.query, *self.storage.layer(layer), tables, self.seq_lens,
            scales=self.storage.scales(layer),
        )  # fmt: skip

    def expected(self, item: int) -> Tensor:
        """Return the same in float32, from the contiguous tensors."""
        keys, values = (each.float() for each in self.pairs[item])
        query = self.query.float()[:, :, None]
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)[:, :, 0]


def packed(tensor: Tensor) -> Tensor:
    """Return [rows, heads, length, dim] as [tokens, heads, dim]."""
    return tensor.transpose(1, 2).flatten(0, 1)


def token_slots(tables: Tensor, positions: Tensor, block_size: int = BLOCK_SIZE) -> Tensor:
    """Return the slots of positions, int64 [rows, positions]."""
    return tables.long()[:, positions // block_size] * block_size + positions % block_size


def require_close(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((found.float() - expected).abs().max() / expected.abs().max())
    if not error <= tolerance:
        raise SystemExit(
            f"{name}: wrong by {error:.2e} of the largest element; timing is pointless"
        )
