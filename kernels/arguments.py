"""Cheap checks that the entry points share: shapes, dtypes and devices, never values.

Values are not looked at because they may be on a GPU, and reading one would wait for the stream.
"""

from __future__ import annotations

from torch import Tensor, int32, int64

INTEGERS = (int32, int64)


def require_dims(name: str, tensor: Tensor, meaning: str, dims: int) -> None:
    """`ValueError` unless `tensor` has `dims` dimensions; `meaning` names them. O(1)."""
    if tensor.dim() != dims:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; pass {meaning}")


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """`ValueError` unless `tensor` has exactly `shape`. O(1)."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; pass {meaning} = {list(shape)}")


def require_integers(name: str, tensor: Tensor) -> None:
    """`TypeError` unless `tensor` is int32 or int64. O(1)."""
    if tensor.dtype not in INTEGERS:
        raise TypeError(f"{name} is {tensor.dtype}; pass torch.int32 or torch.int64")


def require_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """`TypeError` unless both tensors have one dtype. O(1)."""
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{name} is {tensor.dtype}, but {other_name} is {other.dtype}; convert one with .to()"
        )


def require_device(of: Tensor, **tensors: Tensor | None) -> None:
    """`ValueError` unless every tensor given is on the device of `of`. O(tensors)."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != of.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but the cache is on {of.device}; "
                f"move it with .to({str(of.device)!r})"
            )


def require_rows(block_tables: Tensor, kv_lens: Tensor) -> int:
    """Check a table and its lengths against each other; return the number of rows. O(1)."""
    require_dims("block_tables", block_tables, "[rows, max_blocks]", 2)
    require_integers("block_tables", block_tables)
    require_shape("kv_lens", kv_lens, (block_tables.shape[0],), "[rows]")
    require_integers("kv_lens", kv_lens)
    return block_tables.shape[0]
