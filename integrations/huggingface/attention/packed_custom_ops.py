"""Compute a packed pass inside code that `torch.compile` traces.

The rows of a step are known on the host only. So a compiled graph has one opaque operator for each
layer, which writes the new tokens and then attends. During a trace, the layer marks the keys and
values that it is given. An attention function that is given two marked tensors calls the operator.

The operator's argument `place` is a tensor with a number by which it finds the cache at run time.
The operator is declared to mutate `place`, which keeps the layers in order.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kvpager.integrations.huggingface.attention import packed


class Mark(NamedTuple):
    """The mark on keys or values that a layer was given in this trace."""

    place: Tensor
    number: int  # of the layer, in the cache
    which: int  # 0: keys, 1: values


_caches: weakref.WeakValueDictionary[int, DynamicCache] = weakref.WeakValueDictionary()


def enter(cache: DynamicCache) -> Tensor:
    """Register `cache` while it lives; return the tensor by which operators find it. O(1)."""
    with torch.inference_mode(False):
        place = torch.tensor(id(cache), device="cpu")
    _caches[id(cache)] = cache
    return place


def marked(key: Tensor, value: Tensor, place: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Return the tensors with marks. Traced."""
    key, value = key.view(key.shape), value.view(value.shape)
    key.kvpager_packed = Mark(place, index, 0)  # type: ignore[attr-defined]
    value.kvpager_packed = Mark(place, index, 1)  # type: ignore[attr-defined]
    return key, value


def common_mark(key: Tensor, value: Tensor) -> Mark | None:
    """Return the mark that keys and values of one layer share, or None. Traced."""
    of_key: Mark | None = getattr(key, "kvpager_packed", None)
    of_value: Mark | None = getattr(value, "kvpager_packed", None)
    if of_key is None or of_value is None or (of_key.which, of_value.which) != (0, 1):
        return None
    return of_key if of_key.number == of_value.number else None


def attend(
    mark: Mark,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Call `packed.attend` as an operator. Traced; the engine has probed the model before."""
    output: Tensor = _attend(query, key, value, mark.place, mark.number, s_aux, scaling, softcap)
    return output


@torch.library.custom_op(
    "kvpager::packed_attend", mutates_args=("place",), tags=(torch.Tag.cudagraph_unsafe,)
)
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    place: Tensor,
    index: int,
    sinks: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    layer: Any = _caches[int(place)].layers[index]
    layer.write(key, value)
    view = layer.packed_view()
    return packed.attend(view, None, query, scaling=scaling, softcap=softcap, s_aux=sinks)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *given: Any) -> Tensor:
    rows, heads, tokens, _ = query.shape
    return query.new_empty(rows, tokens, heads, value.shape[3])
