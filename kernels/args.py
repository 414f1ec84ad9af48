"""Cheap checks that the entry points share: shapes, strides, dtypes and devices.

The checks never read values of a GPU tensor, because reading waits for the stream. Debug mode
(`debug.py`) reads and checks them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, dtype, int32, int64

from kvpager.kernels.quantisation import SCALE_DTYPE, is_quantised

INTEGERS = (int32, int64)

_P = ParamSpec("_P")
_R = TypeVar("_R")


def without_gradients(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Wrap `function` in `torch.no_grad`, at no cost if gradients are off already."""

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return wrapped


def require_dims(name: str, tensor: Tensor, meaning: str, dims: int) -> None:
    """Raise `ValueError` unless `tensor` has `dims` dimensions, named by `meaning`. O(1)."""
    if tensor.dim() != dims:
        raise ValueError(f"{name}.shape={list(tensor.shape)}: expected {meaning}")


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raise `ValueError` unless `tensor` has exactly `shape`. O(1)."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}.shape={list(tensor.shape)}: expected {meaning} = {list(shape)}")


def require_contiguous_rows(**tensors: Tensor) -> None:
    """Raise `ValueError` unless the last dimension of every tensor is contiguous. O(tensors).

    Kernels load the elements of a head as one run. Other dimensions may have any strides.
    """
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name} has strides {list(tensor.stride())}, but its last dimension has to be "
                f"contiguous; pass {name}.contiguous()"
            )


def require_apart(name: str, tensor: Tensor, **others: Tensor) -> None:
    """Raise `ValueError` if the memory of `tensor` overlaps that of another. O(tensors).

    Compares the first and last addresses, so a tensor in the gaps of another counts as overlapping.
    """
    first, last = _addresses(tensor)
    for other_name, other in others.items():
        start, stop = _addresses(other)
        if start < last and first < stop:
            raise ValueError(f"{name} shares memory with {other_name}; pass a tensor of its own")


def _addresses(tensor: Tensor) -> tuple[int, int]:
    """Return the address of the first element, and the address after the last one."""
    first = tensor.data_ptr()
    if tensor.numel() == 0:
        return first, first
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return first, first + (last + 1) * tensor.element_size()


def require_integers(name: str, tensor: Tensor) -> None:
    """Raise `TypeError` unless `tensor` is int32 or int64. O(1)."""
    if tensor.dtype not in INTEGERS:
        raise TypeError(f"{name}.dtype={tensor.dtype}: expected torch.int32 or torch.int64")


def require_floating(name: str, of: dtype) -> None:
    """Raise `TypeError` unless `of` is a floating dtype of at least 16 bits. O(1)."""
    if not of.is_floating_point or of.itemsize < 2:
        raise TypeError(f"{name}={of}: expected a floating dtype of at least 16 bits")


def require_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise `TypeError` unless both tensors have the same dtype. O(1)."""
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{name}.dtype={tensor.dtype}: must equal {other_name}.dtype={other.dtype}. "
            "Convert one with .to()."
        )


def require_device(of: Tensor, **tensors: Tensor | None) -> None:
    """Raise `ValueError` unless all tensors are on the device of `of`. O(tensors)."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != of.device:
            raise ValueError(
                f"{name}.device={tensor.device}: expected {of.device}, the device of the cache. "
                f"Move it with .to({str(of.device)!r})."
            )


def require_rows(block_tables: Tensor, seq_lens: Tensor) -> int:
    """Check a table and its lengths against each other; return the number of rows. O(1)."""
    require_dims("block_tables", block_tables, "[rows, max_blocks]", 2)
    require_integers("block_tables", block_tables)
    require_shape("seq_lens", seq_lens, (block_tables.shape[0],), "[rows]")
    require_integers("seq_lens", seq_lens)
    return block_tables.shape[0]


def wrong_length(row: int, length: int, room: int) -> ValueError:
    """Return the error for a length below 0 or above `room`, the tokens its table can hold."""
    if length < 0:
        return ValueError(f"seq_lens[{row}]={length}: expected at least 0")
    return ValueError(
        f"seq_lens reaches {length} tokens, but block_tables has room for {room} per row; "
        "pass wider tables"
    )


def short_mask(mask: Tensor, longest: int) -> ValueError:
    """Return the error for a mask with fewer query rows than a row has queries."""
    return ValueError(
        f"mask has {mask.shape[2]} query rows, but a row has {longest} queries; pass them all"
    )


def unknown_block(row: int, column: int, block: int, num_blocks: int) -> ValueError:
    """Return the error for an entry of block tables that the cache does not have."""
    return ValueError(
        f"block_tables[{row}, {column}]={block}: "
        f"the cache has blocks 0 to {num_blocks - 1}, and -1 is none"
    )


def require_tensors(**tensors: object) -> None:
    """Raise `TypeError` for an argument that is not a tensor, such as a manager's NumPy array."""
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            continue
        kind = type(value)
        shown = f"{kind.__module__}.{kind.__name__}".removeprefix("builtins.")
        raise TypeError(
            f"{name}: expected a torch.Tensor, got {shown}. Use torch.from_numpy or torch.tensor."
        )


def require_lengths(seq_lens: Tensor, room: int) -> None:
    """Raise `ValueError` for a length below 0 or above `room`. CPU tensors only. O(rows)."""
    if seq_lens.device.type != "cpu" or len(seq_lens) == 0:
        return
    for row in (int(seq_lens.argmin()), int(seq_lens.argmax())):
        if not 0 <= int(seq_lens[row]) <= room:
            raise wrong_length(row, int(seq_lens[row]), room)


def wrong_start(row: int, start: int, tokens: int) -> ValueError:
    """Return the error for a `cu_seqlens_q` that does not rise from 0 to `tokens`."""
    return ValueError(
        f"cu_seqlens_q reaches {start} at row {row}; it has to rise from 0 to the {tokens} tokens "
        "of query"
    )


def require_starts(cu_seqlens_q: Tensor, tokens: int) -> None:
    """Raise `ValueError` unless values rise from 0 to `tokens`. CPU tensors only. O(rows)."""
    if cu_seqlens_q.device.type != "cpu":
        return
    last = 0
    for row, start in enumerate(cu_seqlens_q.tolist()):
        if start < last or start > tokens or (row == 0 and start != 0):
            raise wrong_start(row, start, tokens)
        last = start
    if last != tokens:
        raise wrong_start(len(cu_seqlens_q) - 1, last, tokens)


def require_scales(cache_name: str, cache: Tensor, name: str, scales: Tensor | None) -> None:
    """Check that a quantised cache has matching scales, and any other cache none. O(1)."""
    if not is_quantised(cache.dtype):
        require_floating(f"{cache_name}.dtype", cache.dtype)
        if scales is not None:
            raise ValueError(
                f"{name}: expected None, because {cache_name}.dtype={cache.dtype} has no scales"
            )
        return
    if scales is None:
        raise ValueError(
            f"{cache_name}.dtype={cache.dtype}: needs scales. Pass those of the storage."
        )
    if not isinstance(scales, Tensor):
        raise TypeError(
            f"{name}: expected the scales tensor of {cache_name}, got a {type(scales).__name__}"
        )
    require_shape(name, scales, tuple(cache.shape[:3]), "[blocks, block_size, kv_heads]")
    if scales.dtype != SCALE_DTYPE:
        raise TypeError(f"{name}.dtype={scales.dtype}: expected {SCALE_DTYPE}")
    require_contiguous_rows(**{name: scales})
    require_device(cache, **{name: scales})
