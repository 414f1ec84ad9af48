"""Notice when a tensor of a model is written or replaced."""

from __future__ import annotations

import ctypes
import functools
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Elements read per tensor, to notice writes that torch's version counters do not count.
_SAMPLES = 16
# Up to this many elements, a tensor without a version counter is read in full.
_UNCOUNTED_MAX = 1024
_PLAIN = (Tensor, nn.Parameter)

_version = operator.attrgetter("_version")
_dtype = operator.attrgetter("dtype")

Ref = Callable[[], Any]


class Weights:
    """A snapshot of tensors at construction. Keeps no tensor alive.

    `doubt` names a tensor whose changes cannot be noticed, and the reason; None if there is none.

    Args:
        tensors: parameters, buffers or other tensors. A wrapper subclass (a quantised weight, a
            `DTensor`) counts as the tensors inside it.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.refs: list[Ref] = [weakref.ref(tensor) for tensor in tensors]
        self.doubt: str | None = None
        self._has_wrappers = any(type(tensor) not in _PLAIN for tensor in tensors)
        self._unreadable: set[int] = set()  # positions among the inner tensors
        with torch._C.DisableTorchFunctionSubclass():
            for place, tensor in enumerate(self._inner(tensors)):
                why = _why_unreadable(tensor)
                if why is not None:
                    shape = "x".join(map(str, _shape(tensor)))
                    self.doubt = f"a tensor [{shape}] of the model may change undetected: {why}"
                    self._unreadable.add(place)
            inner = self._inner(tensors)
            self._inner_refs: list[Ref] = [weakref.ref(tensor) for tensor in inner]
            self._state, self._shapes = _state(inner), _shapes(inner)
            self._samples = _Samples(inner)
            self._numbers = self._samples.read(inner)

    def same(self, tensors: list[Tensor], samples: bool) -> bool:
        """Return True if `tensors`, the objects behind `refs`, have the same values. O(tensors).

        Without `samples`, compares addresses and torch's version counters only.
        """
        inner = self._inner(tensors)
        if inner is not tensors and not same_objects(inner, self._inner_refs):
            return False
        with torch._C.DisableTorchFunctionSubclass():
            if _state(inner) != self._state:
                return False
            return not samples or (
                _shapes(inner) == self._shapes and self._samples.read(inner) == self._numbers
            )

    def _inner(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the readable tensors that hold the values of `tensors`."""
        if self._has_wrappers:
            tensors = [part for tensor in tensors for part in _unwrapped(tensor)]
        if not self._unreadable:
            return tensors
        return [each for place, each in enumerate(tensors) if place not in self._unreadable]


class _Samples:
    """A reader of the same few elements of each tensor, spread evenly over its memory.

    On a CPU it reads the elements at their addresses. Making a view of every tensor would take ten
    times as long, and keeping the views would keep replaced weights alive.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._on_cpu: list[int] = []  # positions of the tensors in CPU memory
        self._arrays: dict[int, list[NDArray[Any]]] = {}  # by bytes of an element
        # Position, number of elements and distance between elements of the other tensors.
        self._elsewhere: dict[tuple[torch.device, torch.dtype], list[tuple[int, int, int]]] = {}
        for place, tensor in enumerate(tensors):
            if not tensor.numel():
                continue
            length, step = _spread(tensor)
            if tensor.device.type == "cpu":
                self._on_cpu.append(place)
                self._arrays.setdefault(tensor.itemsize, []).append(_array(tensor, length, step))
            else:
                kind = tensor.device, tensor.dtype
                self._elsewhere.setdefault(kind, []).append((place, length, step))
        self._addresses = [tensors[place].untyped_storage().data_ptr() for place in self._on_cpu]

    def read(self, tensors: list[Tensor]) -> list[bytes] | None:
        """Return the elements as bytes, since a NaN does not equal itself. O(tensors).

        Returns None if a tensor has moved.
        """
        # These references keep other threads from freeing the memory during the read.
        storages = [tensors[place].untyped_storage() for place in self._on_cpu]
        if [storage.data_ptr() for storage in storages] != self._addresses:
            return None
        found = [np.concatenate(arrays).tobytes() for arrays in self._arrays.values()]
        with torch.inference_mode():
            joined = [
                torch.cat([tensors[at].as_strided((size,), (step,)) for at, size, step in group])
                for group in self._elsewhere.values()
            ]
            return found + [each.view(torch.uint8).cpu().numpy().tobytes() for each in joined]


def _spread(tensor: Tensor) -> tuple[int, int]:
    """Return the number of elements to read of `tensor`, and the distance between them."""
    lengths = zip(tensor.shape, tensor.stride(), strict=True)
    # From the first to the last element in memory, in any order of the dimensions.
    span = 1 + sum((size - 1) * stride for size, stride in lengths)
    step = 1 if tensor.is_inference() else -(-span // _SAMPLES)
    return -(-span // step), step


def _array(tensor: Tensor, length: int, step: int) -> NDArray[Any]:
    """Return an array over the elements that does not keep the memory of `tensor` alive."""
    num_bytes = ((length - 1) * step + 1) * tensor.itemsize
    memory: Any = (ctypes.c_char * num_bytes).from_address(tensor.data_ptr())
    numbers: NDArray[Any] = np.frombuffer(memory, np.dtype(f"V{tensor.itemsize}"))
    return numbers[::step]


def same_objects(objects: Iterable[object], refs: list[Ref]) -> bool:
    """Return True if `objects` are the objects behind `refs`, in the same order. O(objects)."""
    found = list(objects)
    return len(found) == len(refs) and all(map(operator.is_, found, [ref() for ref in refs]))


def holds_settings(tensor: Tensor) -> bool:
    """Return True for a weight of a custom class with attributes, as bitsandbytes has them."""
    is_custom = type(tensor) not in _PLAIN and not is_traceable_wrapper_subclass(tensor)
    return is_custom and bool(vars(tensor))


def _unwrapped(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that hold the values of `tensor`."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _unwrapped(getattr(tensor, name))


def _state(inner: list[Tensor]) -> tuple[list[int], list[int | None]]:
    try:
        versions: list[int | None] = list(map(_version, inner))
    except RuntimeError:  # inference tensors have no version counter
        versions = [None if each.is_inference() else each._version for each in inner]
    return list(map(Tensor.data_ptr, inner)), versions


def _shapes(inner: list[Tensor]) -> tuple[list[Any], ...]:
    return list(map(Tensor.size, inner)), list(map(Tensor.stride, inner)), list(map(_dtype, inner))


def _why_unreadable(tensor: Tensor) -> str | None:
    """Return the reason why changes of `tensor` cannot be noticed; None if they can."""
    if tensor.is_nested or tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        return f"it is a {'nested' if tensor.is_nested else kind} tensor"
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {type(tensor).__name__} does not show its values"
    try:
        is_there = bool(tensor.data_ptr()) or not tensor.shape.numel()
    except (RuntimeError, ValueError):
        is_there = False
    if not is_there:
        return "it has no values in memory"
    if tensor.device.type != "cpu" and not _can_be_copied(tensor.dtype):
        return f"torch cannot copy {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.is_inference() and tensor.numel() > _UNCOUNTED_MAX:
        return "torch does not count writes to inference tensors"
    return None


@functools.cache
def _can_be_copied(dtype: torch.dtype) -> bool:
    try:
        torch.cat([torch.empty(4, dtype=dtype)[::2]]).view(torch.uint8).numpy()
    except (RuntimeError, TypeError):  # NotImplementedError included
        return False
    return True


def _shape(tensor: Tensor) -> tuple[int, ...]:
    try:
        return tuple(tensor.shape)
    except (RuntimeError, ValueError):  # nested, or not initialised
        return ()
