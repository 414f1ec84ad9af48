"""Devices for machines that have none: tensors on a board live apart, and never mix with others.

`maia` is a device that torch has a name for and nothing else. Within `boards()`, its tensors keep
their numbers in ordinary ones, and every operation is done on those; but one that is given tensors
of two devices is refused, as a real device would do, and what it makes is on its tensors' device.

`late_copies()` queues copies from host memory to a board, which are then made when a program waits
for them, or when the board computes something else: as late as a GPU may.
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
# What says where a tensor is or takes it elsewhere. Everything else is done on the numbers before
# torch asks for the device's driver.
_OF_THE_BOARD = {"__get__", "__set__", "to", "cpu", "detach", "requires_grad_"}
_READS_NOTHING = {"__getitem__", "__get__", "element_size", "size", "stride", "dim"}
# What moves numbers from one device to another.
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.Tensor.copy_)


# What reads numbers of a device on the host, and so waits for it.
_READS = {
    "__bool__", "__contains__", "__float__", "__index__", "__int__", "_local_scalar_dense",
    "allclose", "equal", "is_nonzero", "item", "masked_select", "nonzero", "tolist", "unique",
}  # fmt: skip
_INDEXING = {"__getitem__", "__setitem__", "index", "index_put", "index_put_"}
_listeners: list[list[str]] = []


class BoardTensor(torch.Tensor):
    """Looks like a tensor on a board; `inner` has the numbers."""

    inner: Tensor

    @staticmethod
    def __new__(
        cls, inner: Tensor, device: torch.device | None = None, requires_grad: bool = False
    ) -> BoardTensor:
        if isinstance(inner, BoardTensor):  # as accelerate makes a parameter of a tensor
            inner, device = inner.inner, inner.device
        tensor: BoardTensor = torch.Tensor._make_wrapper_subclass(
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
    ) -> BoardTensor:
        return BoardTensor(inner["inner"], device)

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
        if func.__name__ not in _OF_THE_BOARD:
            return _on_boards(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _on_boards(func, args, kwargs or {})


class _Boards(TorchDispatchMode):
    """Also what makes tensors from nothing (`torch.empty(.., device=..)`) comes through here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # where composite operations arrive whole
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        flat = [*_leaves(args), *_leaves(kwargs)]
        if any(isinstance(leaf, BoardTensor) for leaf in flat) or _is_board(kwargs.get("device")):
            return _on_boards(func, args, kwargs)
        return func(*args, **kwargs)


class _Tensors(TorchFunctionMode):
    """`torch.tensor` asks for the device's driver before it is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_board(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@contextmanager
def boards() -> Iterator[Callable[[int], torch.device]]:
    """While this lasts, `torch.device("maia", number)` can be computed on."""
    with _Boards(), _Tensors():
        yield lambda number: torch.device(TYPE, number)


@dataclass(eq=False)
class LateStream:
    """A stream that makes its copies when it has to."""

    copies: list[Callable[[], None]] = field(default_factory=list)
    num_made: int = 0

    def synchronize(self, number: int | None = None) -> None:
        """Make the first `number` copies, or all of them."""
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
    """Queue copies from host memory to devices on the stream that this yields."""
    stream = LateStream()

    def current_stream(device: torch.device) -> LateStream | None:
        return stream if _is_board(device) else None

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


def on_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel of the device: `function`, called with the tensors' numbers."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in [*_leaves(args), *_leaves(kwargs)] if isinstance(t, BoardTensor)]
        args, kwargs = _mapped(BoardTensor, lambda t: t.inner, (args, kwargs))
        result = function(*(_with_numbers(each) for each in args), **kwargs)
        device = tensors[0].device
        return _mapped(Tensor, lambda t: BoardTensor(t, device), result)

    return kernel


def _with_numbers(argument: Any) -> Any:
    """Return `argument`; of attention's arguments, the same with the tensors' numbers."""
    if not isinstance(argument, AttentionArgs):
        return argument
    values = {field.name: getattr(argument, field.name) for field in fields(argument)}
    numbers = _mapped(BoardTensor, lambda t: t.inner, values)
    return AttentionArgs(**numbers)


# torch's own walks through nested values take longer than all that the tests compute.
def _leaves(value: Any) -> Iterator[Any]:
    """Yield what nested lists, tuples and dictionaries hold."""
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
        to_board = kwargs.get("non_blocking", False) or (name == "copy_" and True in args[2:])
        return source.device != there and not (_is_board(torch.device(there)) and to_board)
    if name in _INDEXING:  # a mask's result has a size that only the device knows
        kinds = (torch.bool, torch.uint8)
        indices = _leaves(args[1])
        return any(isinstance(leaf, BoardTensor) and leaf.dtype in kinds for leaf in indices)
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None and isinstance(args[-1], BoardTensor)
    return name in _READS


def _is_board(device: object) -> bool:
    return isinstance(device, torch.device) and device.type == TYPE


def _on_boards(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = [*_leaves(args), *_leaves(kwargs)]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if _listeners:
        with torch._C.DisableTorchFunctionSubclass():
            if _is_wait(func, args, kwargs):
                for found in _listeners:
                    found.append(func.__name__)
    with torch._C.DisableTorchFunctionSubclass():
        device = kwargs.get("device") or _common_device(func, tensors)
    outer = {id(t.inner): t for t in tensors if isinstance(t, BoardTensor)}
    if _late and func is Tensor.copy_ and kwargs.get("non_blocking"):
        target, source = args
        if isinstance(target, BoardTensor) and not isinstance(source, BoardTensor):
            _late[-1].copies.append(lambda: target.inner.copy_(source))
            return target
    if _late and func.__name__ not in _READS_NOTHING:
        _late[-1].synchronize()
    args, kwargs = _mapped(BoardTensor, lambda t: t.inner, (args, kwargs))
    if _is_board(kwargs.get("device")):
        kwargs["device"] = _CPU
    result = func(*args, **kwargs)
    if not _is_board(device):
        return result
    # In-place operations return the tensor they were given.
    return _mapped(
        Tensor, lambda t: outer.get(id(t)) if id(t) in outer else BoardTensor(t, device), result
    )


def _common_device(func: object, tensors: list[Tensor]) -> torch.device:
    if func in _MOVES:
        return tensors[0].device
    # As everywhere in torch, a number is at home on every device.
    devices = {t.device for t in tensors if t.dim() or t.device.type != "cpu"}
    if len(devices) > 1:
        raise RuntimeError(f"{func}: tensors on {sorted(map(str, devices))}")
    return devices.pop() if devices else _CPU
