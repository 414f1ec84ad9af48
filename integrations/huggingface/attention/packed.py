"""Attention of a packed pass: the tokens of many sequences in one row, without padding."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.cache.paged_view import Blocks, packed
from kvpager.ops import attend as attend_in_place
from kvpager.storage.block_storage import LayerShape


class CannotPack(KVPagerError):
    """The model uses keys and values in a way that packed rows do not support."""


class PackedRows(NamedTuple):
    """A layer's blocks, its window, and the number of tokens in the pass."""

    blocks: Blocks
    window: int | None
    num_tokens: int


class PackedLayer(Protocol):
    """The members of a layer that its view uses."""

    shape: LayerShape
    dtype: torch.dtype
    device: torch.device

    def packed_rows(self) -> PackedRows: ...


class PackedView:
    """The keys and values of a layer in a packed pass. They support attention only."""

    __slots__ = ("device", "dtype", "layer", "num_rows", "shape", "start", "stop")

    def __init__(self, layer: PackedLayer, num_tokens: int) -> None:
        self.layer = layer
        self.num_rows = 1
        self.start, self.stop = 0, num_tokens
        self.shape, self.dtype, self.device = layer.shape, layer.dtype, layer.device

    def shows_the_same_as(self, other: object) -> bool:
        """Return True for the same view, as `PagedView.shows_the_same_as`. O(1)."""
        return self is other

    def dense(self) -> tuple[Tensor, Tensor]:
        """Raise `CannotPack`: packed keys and values have no dense form."""
        raise CannotPack("its keys and values are used outside of a registered attention function")


def attend(
    layer: PackedLayer,
    module: Any,
    query: Tensor,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Return the output [1, tokens, query_heads, value_dim].

    `query` is [1, query_heads, tokens, dim]. O(queries * kv tokens * heads * dims).
    Raises: `CannotPack` for options that packed rows do not support.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if position_bias is not None or dropout or not is_causal:
        raise CannotPack("its attention is not plainly causal")
    rows = layer.packed_rows()
    if query.shape[2] != rows.num_tokens:
        raise CannotPack("its queries are not the tokens of the step")
    blocks = rows.blocks
    args = blocks.tables.args(softmax_scale=scaling, window=rows.window, softcap=softcap)
    output = attend_in_place(packed(query), blocks.caches, args, sinks=s_aux)
    return output[None]
