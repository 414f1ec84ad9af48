"""A paged cache inside code that `torch.compile` traces.

What a cache does is of the host: blocks are taken, tables grow. A compiled graph has it as three
operators that the compiler does not look into:

    write   keys and values to the columns from `start` on, taking blocks where needed
    read    columns as dense tensors, gathered
    attend  attention that reads columns in place

While a model is traced, `update` is a `write` and a `read`, and the tensors read bear a mark. An
attention function that is handed two marked tensors calls `attend` instead, so that nothing needs
the `read` any more and the compiler drops it. Every other use of the tensors is right as it is.

A graph must not depend on which cache it serves, so operators get the `place` of a group of layers:
a tensor that holds a number, under which the group's layers are found at run time. `write` is
declared to change it, which keeps writes in the graph and all operators of a group in their order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from kvpager.integrations.huggingface.cache import view_attention
from kvpager.integrations.huggingface.cache.groups import LayerGroup
from kvpager.integrations.huggingface.cache.paged_view import PagedView


class Layer(Protocol):
    """What the operators need of a paged layer."""

    group: LayerGroup
    number: int
    num_columns: int

    def store(self, key: Tensor, value: Tensor, start: int) -> None:
        """Write columns from `start` on."""

    def view(self, start: int, stop: int) -> PagedView:
        """Return a view of columns `start` to `stop`."""


class Mark(NamedTuple):
    """Of a tensor that was read: whose columns it holds."""

    layer: Layer
    place: Tensor
    which: int  # 0: keys, 1: values
    start: int
    stop: int


class Shape(NamedTuple):
    """Of the keys and values of a layer."""

    rows: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device


# By the number in the place of their group, and their own.
_layers: weakref.WeakValueDictionary[tuple[int, int], Layer] = weakref.WeakValueDictionary()


def enter(layer: Layer) -> None:
    """Let operators find `layer` for as long as it lives. O(1)."""
    _layers[int(layer.group.place), layer.number] = layer


def is_exporting() -> bool:
    """Return True if `torch.export` traces, on the host and in traced code."""
    # In code that torch.compile traces, torch 2.11 and older answer True to their own question.
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


_F = TypeVar("_F", bound=Callable[..., Any])


def on_the_host(function: _F) -> _F:
    """Keep traces out of `function`, which changes or asks what graphs change as they run."""
    untraced: _F = torch.compiler.disable(function)
    return untraced


# -------------------------------------------------------------------- what is traced


def read(layer: Layer, shape: Shape, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Columns `start` to `stop` as tensors that attention functions know. Traced."""
    place = layer.group.place
    keys, values = _read(place, layer.number, start, stop, *shape)
    # What an operator returns in a tuple cannot be marked in a trace, a view of it can.
    keys, values = keys.view(keys.shape), values.view(values.shape)
    keys.kvpager_mark = Mark(layer, place, 0, start, stop)
    values.kvpager_mark = Mark(layer, place, 1, start, stop)
    return keys, values


def common_mark(key: Tensor, value: Tensor) -> Mark | None:
    """The mark of keys and values that were read together and are up to date. Traced."""
    of_key: Mark | None = getattr(key, "kvpager_mark", None)
    of_value: Mark | None = getattr(value, "kvpager_mark", None)
    if of_key is None or of_value is None or (of_key.which, of_value.which) != (0, 1):
        return None
    layer, same = of_key.layer, (of_key.start, of_key.stop) == (of_value.start, of_value.stop)
    if layer is not of_value.layer or not same:
        return None
    # A step moves the end of the columns; all else that changes them changes the place.
    unchanged = of_key.place is layer.group.place and of_key.stop == layer.num_columns
    return of_key if unchanged else None


def attend(
    mark: Mark,
    query: Tensor,
    value_dim: int,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    scaling: float | None,
    causal: bool,
    softcap: float | None,
) -> Tensor:
    """`view_attention.attend` of the columns behind `mark`. Traced."""
    columns = (mark.place, mark.layer.number, mark.start, mark.stop)
    output: Tensor = _attend(query, *columns, value_dim, mask, sinks, scaling, causal, softcap)
    return output


# -------------------------------------------------------------------- the operators

# What they do on the host cannot be captured in a CUDA graph.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("kvpager::write", mutates_args=("place",), tags=_TAGS)
def write(key: Tensor, value: Tensor, place: Tensor, layer: int, start: int) -> None:
    """Write keys and values [rows, kv_heads, new, dim] to the columns from `start` on."""
    _layers[int(place), layer].store(key, value, start)


@write.register_fake
def _(*given: Any) -> None:
    return None


@torch.library.custom_op("kvpager::read", mutates_args=(), tags=_TAGS)
def _read(
    place: Tensor,
    layer: int,
    start: int,
    stop: int,
    rows: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    return _layers[int(place), layer].view(start, stop).dense()


@_read.register_fake
def _(place: Tensor, layer: int, start: int, stop: int, *given: Any) -> tuple[Tensor, Tensor]:
    shape = Shape(*given)
    sizes = (shape.rows, shape.kv_heads, stop - start)
    of: Any = {"dtype": shape.dtype, "device": shape.device}
    return torch.empty(*sizes, shape.key_dim, **of), torch.empty(*sizes, shape.value_dim, **of)


@torch.library.custom_op("kvpager::attend", mutates_args=(), tags=_TAGS)
def _attend(
    query: Tensor,
    place: Tensor,
    layer: int,
    start: int,
    stop: int,
    value_dim: int,
    mask: Tensor | None,
    sinks: Tensor | None,
    scaling: float | None,
    causal: bool,
    softcap: float | None,
) -> Tensor:
    view = _layers[int(place), layer].view(start, stop)
    return view_attention.attend(
        view, query, mask, sinks, scaling=scaling, causal=causal, softcap=softcap
    )


@_attend.register_fake
def _(
    query: Tensor, place: Tensor, layer: int, start: int, stop: int, value_dim: int, *given: Any
) -> Tensor:
    rows, query_heads, q_len, _ = query.shape
    return query.new_empty(rows, q_len, query_heads, value_dim)
