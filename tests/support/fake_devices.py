"""Fake devices, for machines without a GPU.

torch has a name for the device type `maia`, but no driver. Within `fake_devices()`, a tensor on
`maia` wraps a CPU tensor, and operations run on the wrapped tensors. As on a real device, an
operation refuses tensors of two devices, and its result is on the device of its operands.

`late_copies()` queues copies from host memory to a fake device. A queued copy runs as late as on a
GPU: when a program waits for it, or before the next operation on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kvpager.ops import AttentionArgs
from kvpager.storage import streams

TYPE = "maia"
_CPU = torch.device("cpu")
_data_ptr = torch.Tensor.data_ptr
_numpy = torch.Tensor.numpy
# Functions that tell or change a tensor's device. All others run on the wrapped tensors, before
# torch asks for the device's driver.
_ON_THE_TENSOR = {"__get__", "__set__", "to", "cpu", "detach", "requires_grad_"}
_READS_NOTHING = {"__getitem__", "__get__", "element_size", "size", "stride", "dim"}
# Operations that copy between devices.
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.Tensor.copy_)
# Operations that read values on the host, and so wait for the device.
_READS = {
    "__bool__", "__contains__", "__float__", "__index__", "__int__", "_local_scalar_dense",
    "allclose", "equal", "is_nonzero", "item", "masked_select", "nonzero", "tolist", "unique",
}  # fmt: skip
_INDEXING = {"__getitem__", "__setitem__", "index", "index_put", "index_put_"}
_listeners: list[list[str]] = []


class DeviceTensor(torch.Tensor):
    """A tensor that claims to be on a fake device; `inner` is the CPU tensor with its values."""

    inner: Tensor

    @staticmethod
    def __new__(
        cls, inner: Tensor, device: torch.device | None = None, requires_grad: bool = False
    ) -> DeviceTensor:
        if isinstance(inner, DeviceTensor):  # as accelerate makes a parameter of a tensor
            inner, device = inner.inner, inner.device
        tensor: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device or inner.device,
        )
        tensor.inner = inner
        return tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # `torch.Tensor.__init__` takes other arguments.
        pass

    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["inner"], self.device

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], device: torch.device, _size: object, _stride: object
    ) -> DeviceTensor:
        return DeviceTensor(inner["inner"], device)

    def __repr__(self) -> str:
        return f"{self.inner!r} on {self.device}"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _data_ptr:
            return args[0].inner.data_ptr()
        if func is _numpy:
            raise TypeError(f"can't convert a tensor on {args[0].device} to numpy")
        if not all(issubclass(cls, kind) or kind is torch.nn.Parameter for kind in types):
            return NotImplemented  # another kind of tensor knows better what to do
        if func.__name__ not in _ON_THE_TENSOR:
            return _on_fake_devices(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _on_fake_devices(func, args, kwargs or {})


class _FakeDevices(TorchDispatchMode):
    """Runs operations on fake devices, factories such as `torch.empty(device=...)` included."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # where composite operations arrive whole
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        flat = [*_leaves(args), *_leaves(kwargs)]
        if any(isinstance(leaf, DeviceTensor) for leaf in flat) or _is_fake(kwargs.get("device")):
            return _on_fake_devices(func, args, kwargs)
        return func(*args, **kwargs)


class _Tensors(TorchFunctionMode):
    """Handles `torch.tensor`, which asks for the device's driver before dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_fake(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@contextmanager
def fake_devices() -> Iterator[Callable[[int], torch.device]]:
    """Make `torch.device("maia", number)` usable within the context."""
    with _FakeDevices(), _Tensors():
        yield lambda number: torch.device(TYPE, number)


@dataclass(eq=False)
class LateStream:
    """A stream that defers its copies until a program waits for them."""

    copies: list[Callable[[], None]] = field(default_factory=list)
    num_made: int = 0

    def synchronize(self, number: int | None = None) -> None:
        """Run the first `number` copies, or all copies."""
        for copy in self.copies[self.num_made : number]:
            copy()
        self.num_made = max(self.num_made, len(self.copies) if number is None else number)

    def record_event(self) -> LateEvent:
        return LateEvent(self, len(self.copies))

    def wait_stream(self, other: LateStream) -> None:
        other.synchronize()


@dataclass(frozen=True)
class LateEvent:
    """The end of the first `number` copies of a stream."""

    stream: LateStream
    number: int

    def query(self) -> bool:
        return self.stream.num_made >= self.number

    def synchronize(self) -> None:
        self.stream.synchronize(self.number)


_late: list[LateStream] = []


@contextmanager
def late_copies() -> Iterator[LateStream]:
    """Queue copies from host memory to fake devices on the yielded stream."""
    stream = LateStream()

    def current_stream(device: torch.device) -> LateStream | None:
        return stream if _is_fake(device) else None

    with (
        mock.patch.object(streams, "current_stream", current_stream),
        mock.patch.object(streams, "keep_for"),
        mock.patch.object(streams, "is_capturing", return_value=False),
    ):
        _late.append(stream)
        try:
            yield stream
        finally:
            _late.remove(stream)


@contextmanager
def waits() -> Iterator[list[str]]:
    """Collect the operations that make the host wait for the device."""
    found: list[str] = []
    _listeners.append(found)
    try:
        yield found
    finally:
        _listeners.remove(found)


def on_wrapped_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel of the fake device that runs `function` on the wrapped tensors."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in [*_leaves(args), *_leaves(kwargs)] if isinstance(t, DeviceTensor)]
        args, kwargs = _mapped(DeviceTensor, lambda t: t.inner, (args, kwargs))
        result = function(*(_unwrapped(each) for each in args), **kwargs)
        device = tensors[0].device
        return _mapped(Tensor, lambda t: DeviceTensor(t, device), result)

    return kernel


def _unwrapped(argument: Any) -> Any:
    """Return `argument`, with wrapped tensors if it is an `AttentionArgs`."""
    if not isinstance(argument, AttentionArgs):
        return argument
    values = {field.name: getattr(argument, field.name) for field in fields(argument)}
    numbers = _mapped(DeviceTensor, lambda t: t.inner, values)
    return AttentionArgs(**numbers)


# torch's own tree functions take longer than everything that the tests compute.
def _leaves(value: Any) -> Iterator[Any]:
    """Yield the leaves of nested lists, tuples and dictionaries."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        yield value
        return
    for each in value:
        yield from _leaves(each)


def _mapped(kind: type, change: Callable[[Any], Any], value: Any) -> Any:
    """Return nested lists, tuples and dictionaries with each leaf of a `kind` changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(kind, change, each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_mapped(kind, change, each) for each in value])
    return value


def _is_wait(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> bool:
    name = func.__name__.partition(".")[0]
    if name in ("_to_copy", "copy_"):
        source = args[0] if name == "_to_copy" else args[1]
        there = kwargs.get("device", source.device) if name == "_to_copy" else args[0].device
        to_device = kwargs.get("non_blocking", False) or (name == "copy_" and True in args[2:])
        return source.device != there and not (_is_fake(torch.device(there)) and to_device)
    if name in _INDEXING:  # only the device knows the size of a masked result
        kinds = (torch.bool, torch.uint8)
        indices = _leaves(args[1])
        return any(isinstance(leaf, DeviceTensor) and leaf.dtype in kinds for leaf in indices)
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None and isinstance(args[-1], DeviceTensor)
    return name in _READS


def _is_fake(device: object) -> bool:
    return isinstance(device, torch.device) and device.type == TYPE


def _on_fake_devices(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = [*_leaves(args), *_leaves(kwargs)]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if _listeners:
        with torch._C.DisableTorchFunctionSubclass():
            if _is_wait(func, args, kwargs):
                for found in _listeners:
                    found.append(func.__name__)
    with torch._C.DisableTorchFunctionSubclass():
        device = kwargs.get("device") or _common_device(func, tensors)
    outer = {id(t.inner): t for t in tensors if isinstance(t, DeviceTensor)}
    if _late and func is Tensor.copy_ and kwargs.get("non_blocking"):
        target, source = args
        if isinstance(target, DeviceTensor) and not isinstance(source, DeviceTensor):
            _late[-1].copies.append(lambda: target.inner.copy_(source))
            return target
    if _late and func.__name__ not in _READS_NOTHING:
        _late[-1].synchronize()
    args, kwargs = _mapped(DeviceTensor, lambda t: t.inner, (args, kwargs))
    if _is_fake(kwargs.get("device")):
        kwargs["device"] = _CPU
    result = func(*args, **kwargs)
    if not _is_fake(device):
        return result
    # In-place operations return the tensor they were given.
    return _mapped(
        Tensor,
        lambda t: outer.get(id(t)) if id(t) in outer else DeviceTensor(t, device),
        result,
    )


def _common_device(func: object, tensors: list[Tensor]) -> torch.device:
    if func in _COPIES:
        return tensors[0].device
    # torch accepts a CPU scalar beside tensors of any device.
    devices = {t.device for t in tensors if t.dim() or t.device.type != "cpu"}
    if len(devices) > 1:
        raise RuntimeError(f"{func}: tensors on {sorted(map(str, devices))}")
    return devices.pop() if devices else _CPU
