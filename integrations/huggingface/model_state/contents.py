"""Read the values that functions and objects hold: closures, defaults, globals, attributes.

A hook or a replaced `forward` computes from these values. If they change, the model has changed.
"""

from __future__ import annotations

import collections
import dis
import functools
import logging
import random
import sys
import types
import weakref
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

# The code of these libraries keeps no state from which a model computes.
_LIBRARIES = {"accelerate", "kvpager", "numpy", "peft", "tokenizers", "torch", "torchao"}
_LIBRARIES |= {"torchvision", "tqdm", "transformers", *sys.stdlib_module_names} - {"test"}
_NUMBERS = (bool, int, float, complex, range, torch.dtype, torch.device, torch.Size)
_IMMUTABLE: tuple[type, ...] = (*_NUMBERS, str, bytes, Enum, type(Ellipsis))
_RANDOM = (random.Random, torch.Generator)
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)
_BY_NAME: tuple[type, ...] = (types.BuiltinFunctionType, types.ModuleType, types.CodeType)
_BY_NAME += (logging.Logger, torch.ScriptObject)
_ITEMS = (list, tuple, set, frozenset, collections.deque)
# Methods that write into a collection and return nothing of its content.
_RECORDING = {"add", "append", "appendleft", "extend", "put", "write"}
_DEPTH_MAX = 8
_VALUES_MAX = 5000
_ARRAY_BYTES_MAX = 1 << 16


def is_plain(value: object, depth: int = 3) -> bool:
    """Return True if `value` is a number, a name, or a small collection of those."""
    if value is None or isinstance(value, _IMMUTABLE):
        return True
    if not depth:
        return False
    if isinstance(value, dict):
        return all(is_plain(item, depth - 1) for pair in value.items() for item in pair)
    return isinstance(value, _ITEMS) and all(is_plain(item, depth - 1) for item in value)


def is_library(module: str | None) -> bool:
    """Return True if `module` belongs to a library whose code is assumed not to change."""
    return (module or "").partition(".")[0] in _LIBRARIES


def module_of(value: object) -> str:
    """Return the name of the module that defines the code of `value`; "" if it is unknown. O(1).

    `functools.wraps` copies `__module__` from the wrapped function. So the name of a function's
    module is read from its globals.
    """
    if isinstance(value, types.FunctionType):
        return str(value.__globals__.get("__name__", ""))
    return str(getattr(value, "__module__", None) or type(value).__module__)


class Contents:
    """A comparison key of values and of all objects that they refer to.

    The keys of two reads are equal if nothing has changed between them. The caller compares
    `tensors`. `doubts` names the objects whose changes cannot be seen.

    Args:
        members: ids of the model's modules. They are named by id only; `_PartSnapshot` reads them.
    """

    def __init__(self, members: Collection[int] = ()) -> None:
        self.key: list[object] = []
        self.tensors: list[Tensor] = []
        self.doubts: list[str] = []
        self.refs: list[Any] = []  # weak references to the objects that the key names by id
        self.is_fixed = True  # until an object is read that can change in place
        self._members = members
        # Keeps the objects alive during the read, so that no id is used twice.
        self._met: dict[int, tuple[int, object]] = {}
        self._num_values = 0

    def add(self, value: object) -> None:
        """Read `value` and all values that it refers to. O(values)."""
        self.key.append(self._read(value, 0))

    def forget(self) -> None:
        """Release the objects; keep the key and the references. O(1)."""
        self._met.clear()
        self.tensors = []

    def _read(self, value: Any, depth: int) -> object:
        self._num_values += 1
        if value is None or isinstance(value, _IMMUTABLE):
            return repr(value) if value != value else value
        if id(value) in self._met:
            return "met", self._met[id(value)][0]
        self._met[id(value)] = len(self._met), value
        if depth > _DEPTH_MAX or self._num_values > _VALUES_MAX:
            return self._doubt(value, "refers to more values than are compared")
        if isinstance(value, Tensor):
            self.is_fixed = False
            self.tensors.append(value)
            return "tensor"
        if isinstance(value, dict | types.MappingProxyType):
            self.is_fixed = False
            keys = [self._read(key, depth + 1) for key in value]
            return keys, [self._read(item, depth + 1) for item in value.values()]
        if isinstance(value, _ITEMS):
            self.is_fixed &= isinstance(value, tuple | frozenset)
            return type(value), [self._read(item, depth + 1) for item in value]
        return self._object(value, depth)

    def _object(self, value: Any, depth: int) -> object:
        """Return the key of an object that is not one of Python's collections."""
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, types.MethodType):
            parts: tuple[Any, ...] = (value.__func__, value.__self__)
        elif isinstance(value, functools.partial):
            parts = (value.func, *value.args, *value.keywords, *value.keywords.values())
        elif isinstance(value, weakref.ref):
            parts = (value(),)
        elif isinstance(value, nn.Module):
            return self._module(value, depth)
        elif isinstance(value, np.ndarray | np.generic):
            return self._array(value)
        elif isinstance(value, type):
            parts = () if is_library(value.__module__) else (_data(vars(value)),)
        elif isinstance(value, property):
            parts = (value.fget,)
        elif isinstance(value, staticmethod | classmethod):
            parts = (value.__func__,)
        elif isinstance(value, (*_BY_NAME, *_DESCRIPTORS)) or type(value) is object:
            parts = ()
        else:
            return self._instance(value, depth)
        return self._named(value), [self._read(part, depth + 1) for part in parts]

    def _named(self, value: Any) -> int:
        """Return the id of `value`. It identifies the object for as long as its reference lives."""
        try:
            self.refs.append(weakref.ref(value))
        except TypeError:
            self.refs.append(lambda: value)
        return id(value)

    def _function(self, value: types.FunctionType, depth: int) -> object:
        known = is_library(module_of(value))
        read: list[Any] = [value.__code__]
        key: list[object] = [self._named(value), self._named(value.__code__)]
        if value.__closure__ or not known:
            self.is_fixed &= known
            read = [held for held in _held_by(value) if not known or callable(held)]
            key += [self._read(held, depth + 1) for held in read]
        return key

    def _module(self, value: nn.Module, depth: int) -> object:
        if id(value) in self._members:
            return self._named(value)
        self.is_fixed = False
        self.tensors += [*value.parameters(), *value.buffers()]
        return [
            (self._named(module), type(module), self._read(_settings(module), depth + 1))
            for module in value.modules()
        ]

    def _array(self, value: Any) -> object:
        self.is_fixed = False
        if value.nbytes > _ARRAY_BYTES_MAX or value.dtype.hasobject:
            return self._doubt(value, "is too large to compare, and writes to it are not counted")
        return str(value.dtype), value.shape, value.tobytes()

    def _instance(self, value: Any, depth: int) -> object:
        kind = type(value)
        self.is_fixed &= is_library(kind.__module__)
        held = dict(getattr(value, "__dict__", {}))
        for name in _slots(kind):
            if hasattr(value, name):
                held[name] = getattr(value, name)
        is_settings = isinstance(value, PreTrainedConfig | types.SimpleNamespace)
        if is_library(kind.__module__) and not is_settings:
            if isinstance(value, _RANDOM) or not held:
                return self._doubt(value, "may change undetected")
            return self._named(value)
        self.is_fixed = False
        if not hasattr(value, "__dict__") and not any(_slots(kind)):
            return self._doubt(value, "may change undetected")
        return self._named(value), self._read(kind, depth + 1), self._read(held, depth + 1)

    def _doubt(self, value: object, why: str) -> object:
        self.is_fixed = False
        self.doubts.append(f"a {type(value).__name__} {why}")
        return None


def _settings(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if is_plain(value)}


def _data(held: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a class without those that Python gives every class."""
    own = {name: value for name, value in held.items() if not name.startswith("__")}
    return own | {"__call__": held.get("__call__")}


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots


def _held_by(function: types.FunctionType) -> Iterator[Any]:
    """Yield the values, besides its arguments, from which `function` may compute."""
    code = function.__code__
    free, named = names_read(code)
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if name in free:
            yield cell_content(cell)
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from vars(function).values()
    if is_library(module_of(function)):
        return
    for name in named:
        if name in function.__globals__:
            value = function.__globals__[name]
            yield value
            if isinstance(value, types.ModuleType) and not is_library(value.__name__):
                yield from (vars(value)[each] for each in attributes(code) & vars(value).keys())


def cell_content(cell: types.CellType) -> Any:
    """Return the value in a closure's cell; None if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


@functools.lru_cache(maxsize=4096)
def names_read(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Return the outer functions' variables and the globals that `code` reads. O(instructions).

    A collection to which `code` only appends does not count as read.
    """
    free: set[str] = set()
    named: set[str] = set()
    found = list(dis.get_instructions(code))
    for load, following in zip(found, [*found[1:], None], strict=True):
        is_free = load.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF")
        if not is_free and load.opname not in ("LOAD_GLOBAL", "LOAD_NAME"):
            continue
        is_method = following is not None and following.opname in ("LOAD_METHOD", "LOAD_ATTR")
        if not (is_method and following and following.argval in _RECORDING):
            (free if is_free else named).add(load.argval)
    for nested in code.co_consts:
        if isinstance(nested, types.CodeType):
            of_outer, of_module = names_read(nested)
            free |= of_outer
            named |= of_module
    return frozenset(free), frozenset(named)


@functools.lru_cache(maxsize=4096)
def attributes(code: types.CodeType) -> frozenset[str]:
    """Return the names of attributes and globals that `code` uses. O(instructions)."""
    nested = [attributes(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    return frozenset(code.co_names).union(*nested)
