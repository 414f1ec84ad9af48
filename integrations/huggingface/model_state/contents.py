"""What functions and objects that a model calls hold: closures, defaults, globals, attributes.

A hook or a replaced `forward` computes from them. Their change is a change of the model.
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

# Code of these is known to keep no state of its own that a model computes from.
_LIBRARIES = {"accelerate", "kvpager", "numpy", "peft", "tokenizers", "torch", "torchao"}
_LIBRARIES |= {"torchvision", "tqdm", "transformers", *sys.stdlib_module_names} - {"test"}
_NUMBERS = (bool, int, float, complex, range, torch.dtype, torch.device, torch.Size)
_IMMUTABLE: tuple[type, ...] = (*_NUMBERS, str, bytes, Enum, type(Ellipsis))
_RANDOM = (random.Random, torch.Generator)
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)
_BY_NAME: tuple[type, ...] = (types.BuiltinFunctionType, types.ModuleType, types.CodeType)
_BY_NAME += (logging.Logger, torch.ScriptObject)
_ITEMS = (list, tuple, set, frozenset, collections.deque)
# Methods that write into a collection and tell nothing of what it holds.
_RECORDING = {"add", "append", "appendleft", "extend", "put", "write"}
_DEPTH_MAX = 8
_VALUES_MAX = 5000
_ARRAY_BYTES_MAX = 1 << 16


def is_plain(value: object, depth: int = 3) -> bool:
    """True if `value` is a number, a name, or a small collection of those."""
    if value is None or isinstance(value, _IMMUTABLE):
        return True
    if not depth:
        return False
    if isinstance(value, dict):
        return all(is_plain(item, depth - 1) for pair in value.items() for item in pair)
    return isinstance(value, _ITEMS) and all(is_plain(item, depth - 1) for item in value)


def is_library(module: str | None) -> bool:
    """True for the name of a module whose code is taken as it is."""
    return (module or "").partition(".")[0] in _LIBRARIES


def module_of(value: object) -> str:
    """Return the name of the module that the code of `value` is from; "" if it is not known. O(1).

    `functools.wraps` gives a wrapper the `__module__` of what it wraps, so a function is asked for
    its globals.
    """
    if isinstance(value, types.FunctionType):
        return str(value.__globals__.get("__name__", ""))
    return str(getattr(value, "__module__", None) or type(value).__module__)


class Contents:
    """Collects what values hold, as a key that compares equal as long as nothing changed.

    Args:
        members: ids of the modules of the model, which are looked at by other means.

    `tensors` are compared by the caller. `doubts` say what may change without a trace.
    """

    def __init__(self, members: Collection[int] = ()) -> None:
        self.key: list[object] = []
        self.tensors: list[Tensor] = []
        self.doubts: list[str] = []
        self.refs: list[Any] = []  # of every object that the key names by its id
        self.is_fixed = True  # nothing was met that can change in place
        self._members = members
        # The objects are kept until all is read: another one could take the id of one that is gone.
        self._met: dict[int, tuple[int, object]] = {}
        self._num_values = 0

    def add(self, value: object) -> None:
        """Read `value`, and all that it leads to. O(values)."""
        self.key.append(self._read(value, 0))

    def forget(self) -> None:
        """Let go of every object, and keep what is compared with later. O(1)."""
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
            return self._doubt(value, "leads to more than is looked at")
        if isinstance(value, Tensor):
            self.is_fixed = False
            self.tensors.append(value)
            return "tensor"
        if isinstance(value, dict | types.MappingProxyType):
            return self._mapping(value, depth)
        if isinstance(value, _ITEMS):
            self.is_fixed &= isinstance(value, tuple | frozenset)
            return type(value), [self._read(item, depth + 1) for item in value]
        return self._object(value, depth)

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> object:
        self.is_fixed = False
        keys = [self._read(key, depth + 1) for key in value]
        return keys, [self._read(item, depth + 1) for item in value.values()]

    def _object(self, value: Any, depth: int) -> object:
        """The key of what is none of Python's collections."""
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
        """The id of `value`, which is believed as long as the object lives."""
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
            return self._doubt(value, "is an array whose writes are not counted")
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
                return self._doubt(value, "may change without a trace")
            return self._named(value)
        self.is_fixed = False
        if not hasattr(value, "__dict__") and not any(_slots(kind)):
            return self._doubt(value, "may change without a trace")
        return self._named(value), self._read(kind, depth + 1), self._read(held, depth + 1)

    def _doubt(self, value: object, why: str) -> object:
        self.is_fixed = False
        self.doubts.append(f"a {type(value).__name__} {why}")
        return None


def _settings(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if is_plain(value)}


def _data(held: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a class holds, less the names that Python gives every class."""
    own = {name: value for name, value in held.items() if not name.startswith("__")}
    return own | {"__call__": held.get("__call__")}


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots


def _held_by(function: types.FunctionType) -> Iterator[Any]:
    """The values that `function` may compute from, besides its arguments."""
    code = function.__code__
    free, named = names_read(code)
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if name in free:
            yield _content(cell)
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


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


@functools.lru_cache(maxsize=4096)
def names_read(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The variables of outer functions and the globals that `code` reads. O(instructions).

    A collection that `code` only appends to is not read.
    """
    free: set[str] = set()
    named: set[str] = set()
    found = list(dis.get_instructions(code))
    for one, following in zip(found, [*found[1:], None], strict=True):
        is_free = one.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF")
        if not is_free and one.opname not in ("LOAD_GLOBAL", "LOAD_NAME"):
            continue
        is_method = following is not None and following.opname in ("LOAD_METHOD", "LOAD_ATTR")
        if not (is_method and following and following.argval in _RECORDING):
            (free if is_free else named).add(one.argval)
    for nested in code.co_consts:
        if isinstance(nested, types.CodeType):
            of_outer, of_module = names_read(nested)
            free |= of_outer
            named |= of_module
    return frozenset(free), frozenset(named)


@functools.lru_cache(maxsize=4096)
def attributes(code: types.CodeType) -> frozenset[str]:
    """The names of attributes and globals that `code` mentions. O(instructions)."""
    nested = [attributes(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    return frozenset(code.co_names).union(*nested)
