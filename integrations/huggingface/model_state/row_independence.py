"""Decide whether a model computes each row of a batch independently of the row's position.

The code of a module does not show whether its result depends on a row's position in the batch. So
equal rows are merged only in models whose code comes from known libraries: transformers, torch,
PEFT, and libraries that quantise weights.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from kvpager.integrations.huggingface.model_state.called_functions import (
    CalledFunctions,
    functions_in,
)
from kvpager.integrations.huggingface.model_state.contents import (
    attributes,
    is_library,
    module_of,
    names_read,
)

# Hooks that these packages register compute every row in the same way.
_KNOWN = ("torch.", "transformers.")
# Modules of these libraries, and of those in `is_library`, compute every row in the same way.
_ROWWISE = {"aqlm", "auto_round", "bitsandbytes", "compressed_tensors", "eetq", "fbgemm_gpu"}
_ROWWISE |= {"gptqmodel", "hqq", "liger_kernel", "optimum", "spqr_quant", "vptq"}
# Modules of torch's classes that run code of the user.
_CONTAINERS = (torch.jit.ScriptModule, torch.fx.GraphModule)
# Attributes of every module. Hooks are among them; `_of_module` reads these by name.
_TORCH_OWN = vars(nn.Module()).keys() - {"forward"}
_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks")
# Functions that a hook which only records may call, besides methods of tensors.
_HARMLESS = {"float", "int", "len", "list", "str", "tuple", "type"}
_RECORDING = {"add", "append", "appendleft", "extend"}  # these return None
_WRITING = ("STORE_SUBSCR", "STORE_ATTR", "STORE_DEREF", "STORE_GLOBAL", "DELETE_SUBSCR")


def row_dependence(model: nn.Module) -> str | None:
    """Name the first part of `model` whose result may depend on a row's position. O(modules).

    Returns None if there is no such part. Adapters per row, soft prompts and steering vectors come
    as hooks, replaced methods or modules of the user. A hook that only records values is allowed.
    """
    modules = list(model.modules())
    found = next(itertools.chain(_of_model(model, modules), *map(_of_module, modules)), None)
    return None if found is None else f"{found}, which may treat rows differently"


def _of_model(model: nn.Module, modules: list[nn.Module]) -> Iterator[str]:
    """Name foreign code that belongs to the model or to its classes."""
    prepare: Any = vars(model).get("prepare_inputs_for_generation")
    if prepare is not None and not _is_its_own(prepare, model):
        yield "a replaced prepare_inputs_for_generation"
    for kind in {type(module) for module in modules}:
        if issubclass(kind, _CONTAINERS):
            yield f"a {kind.__name__}"
        elif _is_foreign(forward := inspect.getattr_static(kind, "forward")):
            yield f"the forward of {kind.__name__}, defined in {_origin(forward)}"
    for function in _functions_of(model, modules).foreign:
        if _is_foreign(function):
            name = getattr(function, "__qualname__", type(function).__name__)
            yield f"{name} of {_origin(function)}"
    for name in _GLOBAL:
        yield from _of_hooks(getattr(torch_module, name).values(), "all modules")


def _of_module(module: nn.Module) -> Iterator[str]:
    """Name foreign code that a module has in its own attributes and hooks."""
    name = type(module).__name__
    fields = vars(module)
    for attribute in fields.keys() - _TORCH_OWN:
        value = fields[attribute]
        if attribute == "_hf_hook":  # of accelerate, which calls the original forward
            hooks = getattr(value, "hooks", (value,))
            if not all(type(hook).__module__.startswith("accelerate.") for hook in hooks):
                yield f"a custom accelerate hook on {name}"
        elif attribute in ("forward", "_old_forward"):
            is_accelerate = "_hf_hook" in fields and attribute == "forward"
            if _is_foreign(value) if is_accelerate else not _is_its_own(value, module):
                yield f"a replaced forward of {name}"
        elif callable(value) and not isinstance(value, type) and _is_foreign(value):
            yield f"{attribute} of {name}, from {_origin(value)}"
    if module._forward_pre_hooks or module._forward_hooks:
        pre, post = module._forward_pre_hooks, module._forward_hooks
        yield from _of_hooks([*pre.values(), *post.values()], name)


def _of_hooks(hooks: Any, where: str) -> Iterator[str]:
    for hook in hooks:
        is_known = all(origin.startswith(_KNOWN) for origin in _origins(hook))
        if not is_known and not _only_records(hook):
            yield f"a hook on {where}"


_functions: weakref.WeakKeyDictionary[nn.Module, tuple[object, CalledFunctions]] = (
    weakref.WeakKeyDictionary()
)


def _functions_of(model: nn.Module, modules: list[nn.Module]) -> CalledFunctions:
    """Return the functions that the classes of `modules` call. O(functions) once they are known."""
    configs = {id(config): config for config in (vars(each).get("config") for each in modules)}
    names = {str(getattr(config, "_attn_implementation", None)) for config in configs.values()}
    key = set(map(type, modules)), names
    known = _functions.get(model)
    if known is not None and known[0] == key and known[1].same():
        return known[1]
    found = CalledFunctions(*key)
    if not found.foreign:  # a foreign function may refer to the model and keep it alive
        _functions[model] = key, found
    return found


def _is_foreign(value: object) -> bool:
    """Return True if calling `value` runs code outside the known libraries."""
    return not all(map(_is_known, _origins(value)))


def _origins(value: Any) -> list[str]:
    """Return the names of the modules that define the functions which calling `value` runs."""
    value = _unwrapped(value)
    if isinstance(value, torch.jit.ScriptFunction):
        return [""]  # the class belongs to torch, the code inside may not
    return [module_of(value), *map(module_of, functions_in(value))]


def _origin(value: Any) -> str:
    """Return the name of the first unknown module among those that define `value`."""
    origins = _origins(value)
    return next((each for each in origins if not _is_known(each)), origins[0])


def _unwrapped(value: Any) -> Any:
    """Return the function or object behind a partial, a method or a compiled function."""
    while True:
        if isinstance(value, functools.partial):
            value = value.func
        elif isinstance(value, types.MethodType):
            value = value.__func__
        elif hasattr(value, "_torchdynamo_orig_callable"):
            value = value._torchdynamo_orig_callable
        else:
            return value


def _is_known(module: str) -> bool:
    return is_library(module) or module.partition(".")[0] in _ROWWISE


def _is_its_own(method: Any, module: nn.Module) -> bool:
    """Return True for a method of `module`, compiled or not, that a known library defines."""
    method = getattr(method, "_torchdynamo_orig_callable", method)
    function = getattr(method, "__func__", None)
    return function is not None and method.__self__ is module and not _is_foreign(function)


def _only_records(hook: Any) -> bool:
    """Return True for a function that provably does nothing but append to a collection."""
    if not isinstance(hook, types.FunctionType):
        return False
    code = hook.__code__
    free, named = names_read(code)
    if free or not named <= _HARMLESS or named & hook.__globals__.keys():
        return False
    # Methods of tensors that write end with an underscore.
    return not any(name.endswith("_") for name in attributes(code)) and _changes_nothing(code)


@functools.lru_cache(maxsize=256)
def _changes_nothing(code: types.CodeType) -> bool:
    """Return True if `code` writes nothing in place and returns None or an append's result."""
    found = [each for each in dis.get_instructions(code) if each.opname not in _PREPARING]
    pairs = list(zip([None, *found], found, strict=False))
    if any(_writes(before, each) for before, each in pairs):
        return False
    returns = [pair for pair in pairs if pair[1].opname.startswith("RETURN_")]
    if all(_is_none(before, each) for before, each in returns):
        return True
    # A single expression calls last the function that it loads first.
    straight = not any("JUMP" in each.opname for each in found)
    calls = [before is not None and before.opname.startswith("CALL") for before, _ in returns]
    return straight and calls == [True] and found[1].argval in _RECORDING


_PREPARING = ("RESUME", "COPY_FREE_VARS", "PUSH_NULL", "PRECALL", "CACHE", "NOP", "MAKE_CELL")
_OUTER = ("LOAD_DEREF", "LOAD_GLOBAL")


def _writes(before: dis.Instruction | None, each: dis.Instruction) -> bool:
    """Return True if an instruction may write to an object that the model reads."""
    if each.opname == "BINARY_OP":
        return each.argrepr.endswith("=")
    is_outer = before is not None and before.opname in _OUTER
    return each.opname in _WRITING or (each.argval in _RECORDING and not is_outer)


def _is_none(before: dis.Instruction | None, last: dis.Instruction) -> bool:
    """Return True if an instruction returns None."""
    if last.opname == "RETURN_VALUE" and before is not None:
        last = before
    return last.opname in ("RETURN_CONST", "LOAD_CONST") and last.argval is None
