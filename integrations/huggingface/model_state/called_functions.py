"""Notice when a function that a model's classes call is replaced.

`LlamaAttention.forward = ...` and `modeling_llama.apply_rotary_pos_emb = ...` change a model, too.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from kvpager.integrations.huggingface.model_state.contents import (
    attributes,
    cell_content,
    is_library,
    module_of,
    names_read,
)

# Functions of these libraries are searched for the functions that they call in turn.
_CALLED_BY = ("transformers", "kvpager")
_CALLS = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__")

_GLOBAL_HOOKS = [
    hooks
    for name, hooks in vars(torch_module).items()
    if name.startswith("_global_") and isinstance(hooks, dict)
]

Place = tuple[Mapping[str, Any], str]


def global_hooks() -> list[Any]:
    """Return the hooks that torch calls for all modules. O(hooks)."""
    return [hook for hooks in _GLOBAL_HOOKS for hook in hooks.values()]


class CalledFunctions:
    """The functions of `classes`, the functions that these call, and attention functions by name.

    `foreign` lists the functions that belong to no known library. The values that such a function
    holds may change as well. O(instructions) for functions that were not read before.
    """

    def __init__(self, classes: Iterable[type], names: Iterable[str]) -> None:
        self.foreign: list[Any] = []
        self._met: set[int] = set()
        self._places: dict[tuple[int, str], tuple[Place, object]] = {}
        for name in _CALLS:
            self._place(vars(nn.Module), name)
        for name in names:
            self._place(AttentionInterface._global_mapping, name)
        for base in dict.fromkeys(base for kind in classes for base in kind.__mro__):
            if not issubclass(PreTrainedModel, base) and not issubclass(GenerationMixin, base):
                fields = vars(base)
                for name in [name for name in fields if name == "__call__" or name[:2] != "__"]:
                    self._place(fields, name)
        places, self._objects = zip(*self._places.values(), strict=True)
        self._mappings, self._names = zip(*places, strict=True)

    def same(self) -> bool:
        """Return True if every name still refers to the same function. O(functions)."""
        try:
            now = map(operator.getitem, self._mappings, self._names)
            return all(map(operator.is_, now, self._objects))
        except KeyError:
            return False

    def _place(self, mapping: Mapping[str, Any], name: str) -> None:
        value = mapping.get(name)
        if value is None or (id(mapping), name) in self._places:
            return
        # `vars` of a class returns a new view each time; this view is kept, so its id stays valid.
        self._places[id(mapping), name] = (mapping, name), value
        if isinstance(value, functools.partial):
            self.foreign.append(value)
        for function in functions_in(value):
            if id(function) not in self._met:
                self._met.add(id(function))
                self._follow(function)

    def _follow(self, function: types.FunctionType) -> None:
        module_name = module_of(function)
        if not is_library(module_name):
            self.foreign.append(function)
        elif module_name.startswith("torch.nn.modules"):
            self._add_torch_functions(function)
        elif module_name.startswith(_CALLED_BY):
            self._add_torch_functions(function)
            for name in names_read(function.__code__)[1]:
                if _is_function(function.__globals__.get(name)):
                    self._place(function.__globals__, name)

    def _add_torch_functions(self, function: types.FunctionType) -> None:
        """Add the functions that `function` calls through torch's modules, such as `F.linear`."""
        read = attributes(function.__code__)
        pending = [function.__globals__.get(name) for name in names_read(function.__code__)[1]]
        while pending:
            module = pending.pop()
            if not isinstance(module, types.ModuleType) or not module.__name__.startswith("torch"):
                continue
            fields = vars(module)
            for name in read & fields.keys():
                if _is_function(fields[name]):
                    self._place(fields, name)
                elif (id(fields), name) not in self._places and fields[name] is not module:
                    pending += [fields[name]] if name in ("nn", "functional") else []


def _is_function(value: object) -> bool:
    return callable(value) and not isinstance(value, type)


@functools.lru_cache(maxsize=4096)
def reads_training(kind: type) -> bool:
    """Return True if `forward` of class `kind` reads the training mode. O(instructions)."""
    functions = functions_in(getattr(kind, "forward", None))
    return any("training" in attributes(function.__code__) for function in functions)


def functions_in(value: object) -> Iterator[types.FunctionType]:
    """Yield the functions that calling `value` runs: decorators, and what these wrap."""
    pending, met = [value], set()
    while pending:
        each = pending.pop()
        if id(each) in met:
            continue
        met.add(id(each))
        if isinstance(each, staticmethod | classmethod):
            pending.append(each.__func__)
        elif isinstance(each, property):
            pending.append(each.fget)
        elif isinstance(each, types.FunctionType):
            yield each
            pending += filter(callable, map(cell_content, each.__closure__ or ()))
