"""Notice when a tensor of a model is written or replaced."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kvpager.integrations.huggingface.model_state.weight_samples import SampleSpread, WeightSamples

# Elements read per tensor, to notice writes that torch's version counters do not count.
_SAMPLES = 16
# Up to this many elements, a tensor without a version counter is read in full.
_UNCOUNTED_MAX = 1024
_PLAIN = (Tensor, nn.Parameter)

_version = operator.attrgetter("_version")
_dtype = operator.attrgetter("dtype")

Ref = Callable[[], Any]


class UnreadableTensor(Exception):
    """Changes of a tensor cannot be noticed. The message says why."""


class Weights:
    """A snapshot of tensors at construction. Keeps no tensor alive.

    `doubt` names a tensor whose changes cannot be noticed, and the reason. It is None if there is
    no such tensor.

    Args:
        tensors: parameters, buffers or other tensors. A wrapper subclass (a quantised weight, a
            `DTensor`) counts as the tensors inside it.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.refs: list[Ref] = [weakref.ref(tensor) for tensor in tensors]
        self.doubt: str | None = None
        self._has_wrappers = any(type(tensor) not in _PLAIN for tensor in tensors)
        self._unreadable: set[int] = set()  # positions among the inner tensors
        spreads: list[SampleSpread] = []
        with torch._C.DisableTorchFunctionSubclass():
            for place, tensor in enumerate(self._inner(tensors)):
                try:
                    spreads.append(_spread(tensor))
                except UnreadableTensor as error:
                    shape = "x".join(map(str, _shape(tensor)))
                    self.doubt = f"a tensor [{shape}] of the model may change undetected: {error}"
                    self._unreadable.add(place)
            inner = self._inner(tensors)
            self._inner_refs: list[Ref] = [weakref.ref(tensor) for tensor in inner]
            self.key = (list(map(id, inner)), _state(inner), _shapes(inner))
            self._samples = WeightSamples(inner, spreads)
            self.numbers = self._samples.read(inner)

    def same(self, tensors: list[Tensor], samples: bool) -> bool:
        """Return True if `tensors`, the objects behind `refs`, have the same values. O(tensors).

        Without `samples`, compares addresses and torch's version counters only.
        """
        inner = self._inner(tensors)
        if inner is not tensors and not same_objects(inner, self._inner_refs):
            return False
        with torch._C.DisableTorchFunctionSubclass():
            _, state, shapes = self.key
            if _state(inner) != state:
                return False
            return not samples or (
                _shapes(inner) == shapes and self._samples.read(inner) == self.numbers
            )

    def equals(self, other: Weights) -> bool:
        """Return True if the newer snapshot `other` has the same tensors and values. O(tensors)."""
        are_alive = all(ref() is not None for ref in self.refs + self._inner_refs)
        return are_alive and self.key == other.key and self.numbers == other.numbers

    def _inner(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the readable tensors that hold the values of `tensors`."""
        if self._has_wrappers:
            tensors = [part for tensor in tensors for part in _unwrapped(tensor)]
        if not self._unreadable:
            return tensors
        return [each for place, each in enumerate(tensors) if place not in self._unreadable]


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


def _spread(tensor: Tensor) -> SampleSpread:
    """Return which elements of `tensor` to read. Raises: `UnreadableTensor`."""
    _refuse_unreadable(tensor)
    if not tensor.numel():
        return SampleSpread(0, 1)
    lengths = zip(tensor.shape, tensor.stride(), strict=True)
    # From the first to the last element in memory, in any order of the dimensions.
    span = 1 + sum((size - 1) * stride for size, stride in lengths)
    step = 1 if tensor.is_inference() else -(-span // _SAMPLES)
    return SampleSpread(-(-span // step), step)


def _refuse_unreadable(tensor: Tensor) -> None:
    if tensor.is_nested or tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise UnreadableTensor(f"it is a {'nested' if tensor.is_nested else kind} tensor")
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise UnreadableTensor(f"a {type(tensor).__name__} does not show its values")
    try:
        is_there = bool(tensor.data_ptr()) or not tensor.shape.numel()
    except (RuntimeError, ValueError):
        is_there = False
    if not is_there:
        raise UnreadableTensor("it has no values in memory")
    if tensor.device.type != "cpu" and not _can_be_copied(tensor.dtype):
        raise UnreadableTensor(f"torch cannot copy {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.is_inference() and tensor.numel() > _UNCOUNTED_MAX:
        raise UnreadableTensor("torch does not count writes to inference tensors")


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
