"""Code of others that runs inside a model's forward pass, and may tell one row from another."""

from __future__ import annotations

import dis
import functools
import itertools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from kvpager.integrations.huggingface.contents import attributes, is_plain, names_read

# Hooks that these packages register themselves treat all rows alike.
_KNOWN = ("torch.", "transformers.")
_CODE = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    torch.jit.ScriptFunction,
)
_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks")
# What a hook that only takes notes may call, besides methods of tensors.
_HARMLESS = {"float", "int", "len", "list", "str", "tuple", "type"}
_NOTING = {"add", "append", "appendleft", "extend"}  # these return None
_WRITING = ("STORE_SUBSCR", "STORE_ATTR", "STORE_DEREF", "STORE_GLOBAL", "DELETE_SUBSCR")


def treats_rows_alike(model: nn.Module) -> bool:
    """True if no hook or replaced method can treat rows by their place in the batch. O(modules).

    Adapters chosen per row, soft prompts and steering vectors come this way. A hook that only takes
    notes is no obstacle.
    """
    prepare: Any = vars(model).get("prepare_inputs_for_generation")
    if prepare is not None and not _is_its_own(prepare, model):
        return False
    modules = list(model.modules())
    if not all(map(_keeps_forward, modules)) or not all(
        map(_has_own_forward, set(map(type, modules)))
    ):
        return False
    return all(_origin(hook).startswith(_KNOWN) or _only_notes(hook) for hook in _hooks(model))


def _keeps_forward(module: nn.Module) -> bool:
    """True unless a `forward` that is no method of the module's takes the place of its own."""
    forward: Any = vars(module).get("forward")
    if forward is None:
        return True
    offload: Any = vars(module).get("_hf_hook")
    if offload is not None:  # accelerate, which calls what was there before
        forward = vars(module).get("_old_forward", module.forward)
        hooks = getattr(offload, "hooks", (offload,))
        if not all(type(hook).__module__.startswith("accelerate.") for hook in hooks):
            return False
    return _is_its_own(forward, module)


def _has_own_forward(kind: type) -> bool:
    """True unless a function that holds data of its own takes the place of a class's `forward`."""
    home: Any = next(each for each in kind.__mro__ if "forward" in vars(each))
    forward = vars(home)["forward"]
    origin = _origin(forward)
    return origin == home.__module__ or origin.startswith(_KNOWN) or not _holds_data(forward)


def _holds_data(function: Any) -> bool:
    """True if a function reads variables of an outer function, or globals that are no code."""
    code = getattr(function, "__code__", None)
    if code is None or function.__closure__:
        return True
    _, named = names_read(code)
    found = [function.__globals__[name] for name in named & function.__globals__.keys()]
    return not all(isinstance(value, _CODE) or is_plain(value) for value in found)


def _is_its_own(method: Any, module: nn.Module) -> bool:
    """True for a method of `module`, compiled or not, that holds nothing besides."""
    method = getattr(method, "_torchdynamo_orig_callable", method)
    function = getattr(method, "__func__", None)
    if function is None or method.__self__ is not module:
        return False
    if function is getattr(type(module), function.__name__, None):
        return True
    return _origin(function).startswith(_KNOWN) or not _holds_data(function)


def _hooks(model: nn.Module) -> Iterator[Any]:
    for name in _GLOBAL:
        yield from getattr(torch_module, name).values()
    for module in model.modules():
        if module._forward_pre_hooks or module._forward_hooks:
            pre, post = module._forward_pre_hooks, module._forward_hooks
            yield from itertools.chain(pre.values(), post.values())


def _origin(hook: Any) -> str:
    """Return the module that defines a hook, be it a function or an object."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", None) or type(hook).__module__)


def _only_notes(hook: Any) -> bool:
    """True for a function that appends to a collection, and surely does nothing else."""
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
    """True if `code` writes nothing in place and returns None, or what appending returns."""
    found = [each for each in dis.get_instructions(code) if each.opname not in _PREPARING]
    pairs = list(zip([None, *found], found, strict=False))
    if any(_writes(before, each) for before, each in pairs):
        return False
    returns = [pair for pair in pairs if pair[1].opname.startswith("RETURN_")]
    if all(_is_none(before, each) for before, each in returns):
        return True
    # One expression: the function that it loads first is the one it calls last.
    straight = not any("JUMP" in each.opname for each in found)
    calls = [before is not None and before.opname.startswith("CALL") for before, _ in returns]
    return straight and calls == [True] and found[1].argval in _NOTING


_PREPARING = ("RESUME", "COPY_FREE_VARS", "PUSH_NULL", "PRECALL", "CACHE", "NOP", "MAKE_CELL")
_OUTER = ("LOAD_DEREF", "LOAD_GLOBAL")


def _writes(before: dis.Instruction | None, each: dis.Instruction) -> bool:
    """True if an instruction may change what the model computes from."""
    if each.opname == "BINARY_OP":
        return each.argrepr.endswith("=")
    is_outer = before is not None and before.opname in _OUTER
    return each.opname in _WRITING or (each.argval in _NOTING and not is_outer)


def _is_none(before: dis.Instruction | None, last: dis.Instruction) -> bool:
    """True if an instruction returns None."""
    if last.opname == "RETURN_VALUE" and before is not None:
        last = before
    return last.opname in ("RETURN_CONST", "LOAD_CONST") and last.argval is None
