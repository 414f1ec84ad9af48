"""Attention of a packed pass: the tokens of many sequences in one row, without padding."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.cache.paged_view import PagedView, packed
from kvpager.ops import LayerCaches
from kvpager.ops import attend as attend_in_place


class CannotPack(KVPagerError):
    """The model uses keys and values in a way that packed rows do not support."""


class PackedView(PagedView):
    """The keys and values of a layer in a packed pass. They support attention only."""

    __slots__ = ("caches", "window")

    def __init__(self, caches: LayerCaches, window: int | None, *args: Any) -> None:
        super().__init__(*args)
        self.caches, self.window = caches, window

    def dense(self) -> tuple[Tensor, Tensor]:
        """Raise `CannotPack`: packed keys and values have no dense form."""
        raise CannotPack("its keys and values are used outside of a registered attention function")


def attend(
    view: PackedView,
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
    if query.shape[2] != view.stop:
        raise CannotPack("its queries are not the tokens of the step")
    view.budget.counters.in_place_reads += 1
    tables = view.parts[0].tables
    args = tables.args(softmax_scale=scaling, window=view.window, softcap=softcap)
    return attend_in_place(packed(query), view.caches, args, sinks=s_aux)[None]
