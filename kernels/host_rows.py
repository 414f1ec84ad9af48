"""The rows of a step as NumPy arrays, from which GPU kernels plan without asking the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int32] | NDArray[np.int64]
_Plan = TypeVar("_Plan")


class HostRows:
    """Block tables, lengths and `cu_seqlens_q` of one step in NumPy, and plans made from them.

    Pass the same object, beside tensors with the same values, to every layer of a step. A GPU
    kernel then plans once for all layers of the same shape and never waits for the device. Make a
    new object for every step: the object keeps the arrays uncopied, so they must not change.

    The arrays are those of `paged_attention`: `block_tables` int32 [rows, blocks], `seq_lens`
    [rows], and `cu_seqlens_q` [rows + 1], or None if every row has one query.
    """

    __slots__ = ("_plans", "_with_queries", "block_tables", "cu_seqlens_q", "seq_lens")

    def __init__(
        self, block_tables: NDArray[np.int32], seq_lens: Ints, cu_seqlens_q: Ints | None = None
    ) -> None:
        self.block_tables = block_tables
        self.seq_lens = seq_lens
        self.cu_seqlens_q = cu_seqlens_q
        self._plans: dict[Hashable, object] = {}
        self._with_queries: dict[int, HostRows] = {}

    def row(self, number: int) -> HostRows:
        """Return row `number` alone, with one query. O(1)."""
        return HostRows(self.block_tables[number : number + 1], self.seq_lens[number : number + 1])

    def with_queries(self, count: int) -> HostRows:
        """Return the same rows with `count` queries each: one object per `count`. O(rows)."""
        if count == 1 and self.cu_seqlens_q is None:
            return self
        found = self._with_queries.get(count)
        if found is None:
            starts = np.arange(len(self.seq_lens) + 1, dtype=np.int32) * np.int32(count)
            found = self._with_queries[count] = HostRows(self.block_tables, self.seq_lens, starts)
        return found

    def plan(self, key: Hashable, make: Callable[[HostRows], _Plan]) -> _Plan:
        """Return the plan made for `key`; the first call makes it. O(1) afterwards."""
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = make(self)
        return found  # type: ignore[return-value]

    def require_fit(
        self, block_tables: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor | None
    ) -> None:
        """Check that the arrays have the shapes of the tensors. O(1). Raises: `ValueError`."""
        tensors = {"block_tables": block_tables, "seq_lens": seq_lens, "cu_seqlens_q": cu_seqlens_q}
        for name, tensor in tensors.items():
            theirs = None if tensor is None else tuple(tensor.shape)
            ours = getattr(getattr(self, name), "shape", None)
            if theirs != ours:
                raise ValueError(
                    f"host_rows has {name} of shape {ours}, but the call has {theirs}; pass the "
                    "arrays that the call's tensors were made from"
                )


def to_device(data: NDArray[np.generic] | Tensor, device: torch.device) -> Tensor:
    """Return an array or tensor of the host on `device`, without waiting for it. O(bytes).

    On the CPU the result may share the memory of `data`.
    """
    tensor = data
    if not isinstance(tensor, Tensor):
        tensor = torch.from_numpy(np.ascontiguousarray(data))
    if device.type == "cpu":
        return tensor
    if device.type == "cuda":
        # A copy from other memory may wait for the stream. torch keeps this until the copy ends.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
