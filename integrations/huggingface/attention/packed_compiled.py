"""A packed pass inside code that `torch.compile` traces.

What a step's rows are is of the host; a compiled graph has it as one operator for each layer that
the compiler does not look into: write the new tokens, then attend. While a model is traced, keys
and values that a layer was handed bear a mark, and an attention function that meets two marked
tensors calls the operator. It gets the `place` of the cache, a tensor that holds a number under
which it is found at run time, and is declared to change it: that keeps layers in their order.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kvpager.integrations.huggingface.attention import packed


class Layer(packed.PackedLayer, Protocol):
    """What the operator needs of a layer."""

    def write(self, key: Tensor, value: Tensor) -> None:
        """Write the pass's new tokens, [1, kv_heads, tokens, dim]."""


class Cache(Protocol):
    """Where layers are found."""

    layers: list[Any]


class Mark(NamedTuple):
    """Of keys or values that a layer was handed in this trace."""

    place: Tensor
    number: int  # of the layer, in the cache
    which: int  # 0: keys, 1: values


_caches: weakref.WeakValueDictionary[int, Cache] = weakref.WeakValueDictionary()


def enter(cache: Cache) -> Tensor:
    """Let operators find `cache` for as long as it lives: by the place returned. O(1)."""
    with torch.inference_mode(False):
        place = torch.tensor(id(cache), device="cpu")
    _caches[id(cache)] = cache
    return place


def marked(key: Tensor, value: Tensor, place: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """The tensors with marks. Traced."""
    key, value = key.view(key.shape), value.view(value.shape)
    key.kvpager_packed = Mark(place, index, 0)  # type: ignore[attr-defined]
    value.kvpager_packed = Mark(place, index, 1)  # type: ignore[attr-defined]
    return key, value


def common_mark(key: Tensor, value: Tensor) -> Mark | None:
    """The mark of keys and values of one layer. Traced."""
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
    """As `packed.attend`. Traced; that the model can be packed was found out before."""
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
    layer: Layer = _caches[int(place)].layers[index]
    layer.write(key, value)
    return packed.attend(layer, None, query, scaling=scaling, softcap=softcap, s_aux=sinks)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *given: Any) -> Tensor:
    rows, heads, tokens, _ = query.shape
    return query.new_empty(rows, tokens, heads, value.shape[3])
