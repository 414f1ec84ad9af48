"""Read a few elements of many tensors at once, spread evenly over each tensor's memory."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class SampleSpread(NamedTuple):
    """The elements of a sample: `length` elements, `step` apart."""

    length: int
    step: int


class WeightSamples:
    """A reader of the same elements of the same tensors each time.

    On a CPU it reads the elements at their addresses. Making a view of every tensor would take ten
    times as long, and keeping the views would keep replaced weights alive.
    """

    def __init__(self, tensors: list[Tensor], spreads: list[SampleSpread]) -> None:
        self._on_cpu: list[int] = []  # positions of the tensors in CPU memory
        self._arrays: dict[int, list[NDArray[Any]]] = {}  # by bytes of an element
        self._elsewhere: dict[tuple[torch.device, torch.dtype], list[tuple[int, SampleSpread]]] = {}
        for place, (tensor, spread) in enumerate(zip(tensors, spreads, strict=True)):
            if not spread.length:
                continue
            if tensor.device.type == "cpu":
                self._on_cpu.append(place)
                self._arrays.setdefault(tensor.itemsize, []).append(_array(tensor, spread))
            else:
                kind = tensor.device, tensor.dtype
                self._elsewhere.setdefault(kind, []).append((place, spread))
        self._addresses = [tensors[place].untyped_storage().data_ptr() for place in self._on_cpu]

    def read(self, tensors: list[Tensor]) -> tuple[bytes, ...] | None:
        """Return the elements as bytes, since a NaN does not equal itself. O(tensors).

        Returns None if a tensor has moved.
        """
        # These references keep other threads from freeing the memory during the read.
        storages = [tensors[place].untyped_storage() for place in self._on_cpu]
        if [storage.data_ptr() for storage in storages] != self._addresses:
            return None
        on_cpu = [np.concatenate(arrays).tobytes() for arrays in self._arrays.values()]
        return *on_cpu, *self._read_elsewhere(tensors)

    def _read_elsewhere(self, tensors: list[Tensor]) -> list[bytes]:
        with torch.inference_mode():
            joined = [
                torch.cat(
                    [
                        tensors[place].as_strided((spread.length,), (spread.step,))
                        for place, spread in group
                    ]
                )
                for group in self._elsewhere.values()
            ]
            return [each.view(torch.uint8).cpu().numpy().tobytes() for each in joined]


def _array(tensor: Tensor, spread: SampleSpread) -> NDArray[Any]:
    """Return an array over the sample that does not keep the memory of `tensor` alive."""
    num_bytes = ((spread.length - 1) * spread.step + 1) * tensor.itemsize
    memory: Any = (ctypes.c_char * num_bytes).from_address(tensor.data_ptr())
    numbers: NDArray[Any] = np.frombuffer(memory, np.dtype(f"V{tensor.itemsize}"))
    return numbers[:: spread.step]
