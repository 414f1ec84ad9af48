"""Use a paged cache inside code that `torch.compile` traces.

A cache works on the host: it takes blocks and extends tables. A compiled graph contains it as three
opaque operators:

    write   write keys and values to the columns from `start` on, and take blocks if needed
    read    gather columns into dense tensors
    attend  compute attention that reads columns in place

During a trace, `update` is a `write` and a `read`, and marks the tensors that it returns. An
attention function that is given two marked tensors calls `attend`. Then no operation uses the
`read`, and the compiler drops it. Every other use of the tensors works, too.

A graph must not depend on the cache that it serves. So operators take the `place` of a group of
layers: a tensor with a number by which they find the layers at run time. `write` is declared to
mutate `place`, which keeps all writes in the graph and all operators of a group in order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from kvpager.integrations.huggingface.cache.budget import LayerKind
from kvpager.integrations.huggingface.cache.paged_view import PagedView


class Mark(NamedTuple):
    """The mark on a tensor that `read` returned: its layer and columns."""

    layer: Any  # a `PagedLayer`
    place: Tensor
    which: int  # 0: keys, 1: values
    start: int
    stop: int


# `PagedLayer`s by the number of the group, and the layer's number.
_layers: weakref.WeakValueDictionary[tuple[int, int], Any] = weakref.WeakValueDictionary()


def enter(layer: Any) -> None:
    """Register `layer` for the operators while it lives. O(1)."""
    _layers[int(layer.group.place), layer.number] = layer


def is_exporting() -> bool:
    """Return True if `torch.export` is tracing. Works on the host and in traced code."""
    # In code under torch.compile, `is_exporting` of torch 2.11 and older returns True, too.
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


_F = TypeVar("_F", bound=Callable[..., Any])


def on_the_host(function: _F) -> _F:
    """Exclude `function` from traces, since it uses state that graphs change when they run."""
    untraced: _F = torch.compiler.disable(function)
    return untraced


# -------------------------------------------------------------------- what is traced


def read(
    layer: Any, num_rows: int, kind: LayerKind, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Return columns `start` to `stop` as marked tensors. Traced."""
    place, shape = layer.group.place, (num_rows, *kind.shape)
    keys, values = _read(place, layer.number, start, stop, *shape, kind.dtype, kind.device)
    # A trace cannot mark an operator's results in a tuple, but it can mark views of them.
    keys, values = keys.view(keys.shape), values.view(values.shape)
    keys.kvpager_mark = Mark(layer, place, 0, start, stop)
    values.kvpager_mark = Mark(layer, place, 1, start, stop)
    return keys, values


def common_mark(key: Tensor, value: Tensor) -> Mark | None:
    """Return the mark of keys and values that were read together and are current. Traced."""
    of_key: Mark | None = getattr(key, "kvpager_mark", None)
    of_value: Mark | None = getattr(value, "kvpager_mark", None)
    if of_key is None or of_value is None or (of_key.which, of_value.which) != (0, 1):
        return None
    layer, same = of_key.layer, (of_key.start, of_key.stop) == (of_value.start, of_value.stop)
    if layer is not of_value.layer or not same:
        return None
    # A step changes the number of columns; every other change renews the place.
    unchanged = of_key.place is layer.group.place and of_key.stop == layer.num_columns
    return of_key if unchanged else None


def attend(
    mark: Mark,
    query: Tensor,
    value_dim: int,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    softmax_scale: float | None,
    causal: bool,
    softcap: float | None,
) -> Tensor:
    """Call `PagedView.attend` for the columns behind `mark`. Traced."""
    columns = (mark.place, mark.layer.number, mark.start, mark.stop)
    options = (softmax_scale, causal, softcap)
    output: Tensor = _attend(query, *columns, value_dim, mask, sinks, *options)
    return output


# -------------------------------------------------------------------- the operators

# The operators work on the host, which a CUDA graph cannot capture.
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
    view: PagedView = _layers[int(place), layer].view(start, stop)
    return view.dense()


@_read.register_fake
def _(place: Tensor, layer: int, start: int, stop: int, *given: Any) -> tuple[Tensor, Tensor]:
    rows, kv_heads, key_dim, value_dim, dtype, device = given
    key, value = (
        torch.empty(rows, kv_heads, stop - start, dim, dtype=dtype, device=device)
        for dim in (key_dim, value_dim)
    )
    return key, value


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
    softmax_scale: float | None,
    causal: bool,
    softcap: float | None,
) -> Tensor:
    view: PagedView = _layers[int(place), layer].view(start, stop)
    options: Any = {"softmax_scale": softmax_scale, "causal": causal, "softcap": softcap}
    return view.attend(query, mask, sinks, **options)


@_attend.register_fake
def _(
    query: Tensor, place: Tensor, layer: int, start: int, stop: int, value_dim: int, *given: Any
) -> Tensor:
    rows, query_heads, q_len, _ = query.shape
    return query.new_empty(rows, q_len, query_heads, value_dim)
