"""Tensors of a model, and whether they still hold the numbers that they held."""

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

# Numbers read per tensor: a write that no version counter counts leaves no other trace.
_SAMPLES = 16
# A tensor without a version counter is read in full up to this size.
_UNCOUNTED_MAX = 1024
_PLAIN = (Tensor, nn.Parameter)

_version = operator.attrgetter("_version")
_dtype = operator.attrgetter("dtype")

Ref = Callable[[], Any]


class UnreadableTensor(Exception):
    """A tensor whose changes cannot be told. The message says why."""


class Weights:
    """Tensors as they are when this is made. Keeps no tensor alive.

    Args:
        tensors: parameters, buffers, or any others; wrapper subclasses (quantised weights,
            `DTensor`) count as the tensors inside.

    `doubt` names a tensor whose changes cannot be told, and why. It is None if there is none.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.refs: list[Ref] = [weakref.ref(tensor) for tensor in tensors]
        self.doubt: str | None = None
        self._has_wrappers = any(type(tensor) not in _PLAIN for tensor in tensors)
        self._unreadable: set[int] = set()  # places among the tensors inside
        spreads: list[SampleSpread] = []
        with torch._C.DisableTorchFunctionSubclass():
            for place, tensor in enumerate(self._inner(tensors)):
                try:
                    spreads.append(_spread(tensor))
                except UnreadableTensor as error:
                    shape = "x".join(map(str, _shape(tensor)))
                    self.doubt = f"a tensor [{shape}] of the model may change unseen: {error}"
                    self._unreadable.add(place)
            inner = self._inner(tensors)
            self._inner_refs: list[Ref] = [weakref.ref(tensor) for tensor in inner]
            self.key = (list(map(id, inner)), _state(inner), _shapes(inner))
            self._samples = WeightSamples(inner, spreads)
            self.numbers = self._samples.read(inner)

    def same(self, tensors: list[Tensor], samples: bool) -> bool:
        """True if `tensors`, the objects that `refs` refer to, have the same numbers. O(tensors).

        Without `samples`, only addresses and torch's own version counters are compared.
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
        """True if `other`, which was just made, has the same tensors and numbers. O(tensors)."""
        are_alive = all(ref() is not None for ref in self.refs + self._inner_refs)
        return are_alive and self.key == other.key and self.numbers == other.numbers

    def _inner(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors that hold the numbers of `tensors`, less those that cannot be read."""
        if self._has_wrappers:
            tensors = [part for tensor in tensors for part in _unwrapped(tensor)]
        if not self._unreadable:
            return tensors
        return [each for place, each in enumerate(tensors) if place not in self._unreadable]


def same_objects(objects: Iterable[object], refs: list[Ref]) -> bool:
    """True if `objects` are those that `refs` refer to, in their order. O(objects)."""
    found = list(objects)
    return len(found) == len(refs) and all(map(operator.is_, found, [ref() for ref in refs]))


def holds_settings(tensor: Tensor) -> bool:
    """True for a weight of a class of its own with attributes, as bitsandbytes has them."""
    is_own = type(tensor) not in _PLAIN and not is_traceable_wrapper_subclass(tensor)
    return is_own and bool(vars(tensor))


def _unwrapped(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the numbers of `tensor`."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _unwrapped(getattr(tensor, name))


def _state(inner: list[Tensor]) -> tuple[list[int], list[int | None]]:
    try:
        versions: list[int | None] = list(map(_version, inner))
    except RuntimeError:  # inference tensors have none
        versions = [None if each.is_inference() else each._version for each in inner]
    return list(map(Tensor.data_ptr, inner)), versions


def _shapes(inner: list[Tensor]) -> tuple[list[Any], ...]:
    return list(map(Tensor.size, inner)), list(map(Tensor.stride, inner)), list(map(_dtype, inner))


def _spread(tensor: Tensor) -> SampleSpread:
    """Choose a few numbers of `tensor`, or all of them. Raises: `UnreadableTensor`."""
    _refuse_unreadable(tensor)
    if not tensor.numel():
        return SampleSpread(0, 1)
    lengths = zip(tensor.shape, tensor.stride(), strict=True)
    # From the first to the last number in memory, whatever the order of the dimensions.
    span = 1 + sum((size - 1) * stride for size, stride in lengths)
    step = 1 if tensor.is_inference() else -(-span // _SAMPLES)
    return SampleSpread(-(-span // step), step)


def _refuse_unreadable(tensor: Tensor) -> None:
    if tensor.is_nested or tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise UnreadableTensor(f"it is a {'nested' if tensor.is_nested else kind} tensor")
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise UnreadableTensor(f"a {type(tensor).__name__} does not tell what it holds")
    try:
        is_there = bool(tensor.data_ptr()) or not tensor.shape.numel()
    except (RuntimeError, ValueError):
        is_there = False
    if not is_there:
        raise UnreadableTensor("it has no numbers in memory")
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
    except (RuntimeError, ValueError):  # nested, or not there yet
        return ()
