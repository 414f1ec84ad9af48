"""Lazy tensors of paged keys or values, which gather when an operation needs the elements.

A model passes the results of `Cache.update` to its attention function. kvpager's attention
functions read the blocks of such tensors in place. Any other operation - a slice, an addition, a
print - gathers the blocks once into an ordinary tensor. So every model works, and a model that only
passes keys and values to its attention never gathers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from kvpager.integrations.huggingface.cache.paged_view import PagedView


class PagedTensor(torch.Tensor):
    """A lazy tensor of keys or values, [rows, kv_heads, columns, dim]."""

    view_of: PagedView
    which: int  # 0: keys, 1: values

    @staticmethod
    def __new__(cls, view: PagedView, which: int) -> PagedTensor:
        heads, *dims = view.shape
        shape = (view.num_rows, heads, view.stop - view.start, dims[which])
        handle: PagedTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=view.dtype, device=view.device
        )
        handle.view_of = view
        handle.which = which
        return handle

    def __init__(self, view: PagedView, which: int) -> None:
        # `torch.Tensor.__init__` takes other arguments.
        pass

    def mapped(self) -> Tensor:
        """Return the elements as a view of the blocks if these are mapped, or else `dense`."""
        tensors = self.view_of.mapped()
        return self.dense() if tensors is None else tensors[self.which]

    def dense(self) -> Tensor:
        """Return the elements, contiguous in each row. Gathers once."""
        return self.view_of.dense()[self.which]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return _gathered(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _gathered(func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)


def _gathered(func: Any, args: Any, kwargs: Any) -> Any:
    """Call `func` with every paged tensor among its arguments mapped or else gathered."""
    plain = PagedTensor.mapped if func in _READING else PagedTensor.dense
    args, kwargs = pytree.tree_map_only(PagedTensor, plain, (args, kwargs or {}))
    return func(*args, **kwargs)


# Functions that only read, and take tensors of any strides. Their results may be views.
_READING = {
    getattr(owner, name)
    for owner, names in (
        (torch, "add baddbmm bmm cat chunk einsum matmul mul permute split transpose"),
        (torch.nn.functional, "linear pad scaled_dot_product_attention"),
        (
            Tensor,
            "__getitem__ __matmul__ bmm chunk contiguous expand float matmul permute repeat "
            "repeat_interleave reshape split to transpose",
        ),
    )
    for name in names.split()
} | {getattr(Tensor, name).__get__ for name in ("T", "mT")}

# Functions that need no elements.
_METADATA = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda")
} | {
    getattr(Tensor, name)
    for name in (
        "size", "dim", "numel", "nelement", "element_size", "is_floating_point", "__len__",
        "get_device",
    )
}  # fmt: skip


def paged_tensors(view: PagedView) -> tuple[Tensor, Tensor]:
    """Return the paged tensors of a layer's keys and values. O(1), about 4 us each."""
    return PagedTensor(view, 0), PagedTensor(view, 1)


def common_view(key: Tensor, value: Tensor) -> PagedView | None:
    """Return the view behind paged keys and values if it can be read in place, or None. O(1)."""
    if isinstance(key, PagedTensor) and isinstance(value, PagedTensor):
        view = key.view_of
        if (key.which, value.which) == (0, 1) and view.shows_the_same_as(value.view_of):
            return view
    return None
