"""Notice when a model no longer computes the keys and values that it computed before.

    watch = ModelWatch(model)
    watch.look()        # ModelState(version=7, doubt=None)
    model.set_adapter("other")
    watch.look()        # ModelState(version=8, doubt=None)

Each look compares the model with a snapshot from an earlier look. If nothing has changed, this
takes a fraction of a millisecond. docs/contracts.md lists the changes that are noticed.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import PreTrainedConfig

from kvpager._atomic import Uninterrupted, new_lock
from kvpager.integrations.huggingface.model_state.called_functions import (
    CalledFunctions,
    global_hooks,
    reads_training,
)
from kvpager.integrations.huggingface.model_state.contents import Contents, is_library, is_plain
from kvpager.integrations.huggingface.model_state.offloaded import WeightFile, offloaded
from kvpager.integrations.huggingface.model_state.weights import (
    Ref,
    Weights,
    holds_settings,
    same_objects,
)

# `ModelWatch.glance` divides a model into one of these numbers of parts. They are prime, so that
# modules that every layer has, such as adapters, are spread over all parts.
_PARTS = (31, 23, 17, 11, 7, 5, 3, 2)
_PART_SIZE_MIN = 12  # modules
# Attributes that torch gives every module. The relevant ones are read by name.
_TORCH_OWN = vars(nn.Module()).keys() - {"training"}
_MODULE_DICTS = operator.itemgetter(
    "_modules", "_forward_pre_hooks", "_forward_hooks", "_parameters", "_buffers"
)
_WATCHED: tuple[type, ...] = (Tensor, np.ndarray, nn.Module, PreTrainedConfig, torch.ScriptObject)
_WATCHED += (dict, list, tuple, set)

_call: Callable[..., Any] = operator.call

_versions = itertools.count()


class ModelState(NamedTuple):
    """The state of a model at one look.

    `version` changes with each noticed change, and is unique among all models. `doubt` says why
    some changes cannot be noticed; None if all can.
    """

    version: int
    doubt: str | None


class ModelWatch:
    """A comparison of a model with itself over time. Keeps neither model nor weights alive.

    `has_parts` also takes snapshots of parts of the model, which `glance` needs. Thread-safe.
    """

    def __init__(self, model: nn.Module, *, has_parts: bool = False) -> None:
        self._model = weakref.ref(model)
        self._has_parts = has_parts
        # Signals wait for the end of a look, so that their errors are not taken for the model's.
        self._lock = new_lock()
        self._uninterrupted = Uninterrupted(self._lock)
        self._snapshot: _Snapshot | None = None
        self._version = next(_versions)
        self._turn = 0

    def look(self, *, samples: bool = True) -> ModelState:
        """Compare the whole model with the last look. O(modules + weights).

        `samples` reads a few elements of each weight, to notice writes that torch does not count.
        """
        with self._lock, self._uninterrupted:
            return self._compare(lambda snapshot: snapshot.same(samples))

    def glance(self) -> ModelState:
        """Compare one small part of the model with the last look; the next part at each call."""
        with self._lock, self._uninterrupted:
            self._turn += 1
            return self._compare(lambda snapshot: snapshot.part_same(self._turn))

    def _compare(self, is_same: Callable[[_Snapshot], bool]) -> ModelState:
        try:
            snapshot = self._snapshot
            if snapshot is None or not is_same(snapshot):
                snapshot = self._snapshot = _Snapshot(self._model(), self._has_parts)
                self._version = next(_versions)
        except Exception as error:  # another thread changes the model, or a file is missing
            self._snapshot, self._version = None, next(_versions)
            return ModelState(self._version, f"the model cannot be read: {error!r}")
        return ModelState(self._version, snapshot.doubt)


class _Snapshot:
    """The state of a model at one look: modules, weights, hooks, functions, torch's settings."""

    def __init__(self, model: Any, has_parts: bool) -> None:
        modules = list(model.modules())
        members = {id(module) for module in modules}
        owners: list[Any] = modules + _configs(modules)
        self._whole = _PartSnapshot(owners, members)
        many = next((n for n in _PARTS if n * _PART_SIZE_MIN <= len(owners)), 1) * has_parts
        self._parts = [_PartSnapshot(owners[number::many], members) for number in range(many)]
        hooks, modes = global_hooks(), _modes()
        self._hooks, self._modes = list(map(_ref, hooks)), list(map(_ref, modes))
        roots = [_ref(each) for each in [*hooks, *modes] if not _is_fixed(each, members)]
        roots += self._whole.roots
        kinds = {type(module) for module in modules}
        names = {str(getattr(owner, "_attn_implementation", None)) for owner in owners}
        self._functions = CalledFunctions(kinds, names)
        self._roots = roots + [_ref(function) for function in self._functions.foreign]
        self._members = members
        self._contents = self._read()
        self._is_offloaded = any(hasattr(module, "_hf_hook") for module in modules)
        self._model = weakref.ref(model)
        tensors, self._files = self._outside(self._contents)
        self._weights = Weights(tensors)
        self._settings = _numerics()
        trained = dict.fromkeys(type(module) for module in modules if module.training)
        affected: Iterator[type] = filter(reads_training, trained)
        training = [f"a {kind.__name__} is in training mode" for kind in affected]
        weights = [self._whole.weights.doubt, self._weights.doubt]
        self.doubt = next(filter(None, [*training, *self._contents.doubts, *weights]), None)
        # An object kept in the snapshot would keep the model alive through its references.
        self._contents.forget()

    def same(self, samples: bool) -> bool:
        """Return True if the model equals the snapshot. O(modules + weights)."""
        return (
            self._same_surroundings() and self._whole.same(samples) and self._same_contents(samples)
        )

    def part_same(self, turn: int) -> bool:
        """Return True if a part of the model equals the snapshot. Part 0 includes the settings."""
        number = turn % len(self._parts)
        return (
            (number > 0 or self._same_surroundings())
            and self._parts[number].same(True)
            and self._same_contents(True)
        )

    def _same_surroundings(self) -> bool:
        """Return True if torch's settings, hooks, modes and the model's functions are unchanged."""
        return (
            self._settings == _numerics()
            and same_objects(global_hooks(), self._hooks)
            and same_objects(_modes(), self._modes)
            and self._functions.same()
        )

    def _same_contents(self, samples: bool) -> bool:
        """Return True if values held by hooks, and weights outside of modules, are unchanged."""
        if not self._roots and not self._is_offloaded:
            return True
        contents = self._read()
        tensors, files = self._outside(contents)
        return (
            contents.key == self._contents.key
            and all(ref() is not None for ref in self._contents.refs)
            and files == self._files
            and same_objects(tensors, self._weights.refs)
            and self._weights.same(tensors, samples)
        )

    def _read(self) -> Contents:
        contents = Contents(self._members)
        for root in self._roots:
            contents.add(root())
        return contents

    def _outside(self, contents: Contents) -> tuple[list[Tensor], list[WeightFile]]:
        """Return the tensors that are no module's weights, and the files of weights."""
        model = self._model()
        found = list(offloaded(model)) if self._is_offloaded and model is not None else []
        tensors = [weight for weight in found if isinstance(weight, Tensor)]
        return contents.tensors + tensors, [each for each in found if isinstance(each, WeightFile)]


class _PartSnapshot:
    """The state of some modules and configurations: attributes, children, weights, hooks."""

    def __init__(self, owners: list[Any], members: set[int]) -> None:
        self.roots: list[Ref] = []  # of the objects that may change in place
        self._links: list[tuple[int, str]] = []  # the owner's position, the attribute's name
        self._link_refs: list[Ref] = []
        self._owners = list(map(_ref, owners))
        self._kinds = list(map(type, owners))
        fields: list[Any] = list(map(vars, owners))
        self._sizes = list(map(len, fields))
        self._names = list(map(_relevant, fields))
        self._readers: list[Callable[[Any], Any]] = []
        for place, names in enumerate(self._names):
            plain = [name for name in names if is_plain(fields[place][name])]
            self._readers.append(operator.itemgetter(*plain) if plain else type)
            for name in names - set(plain):
                value = fields[place][name]
                if _is_fixed(value, members):
                    self._links.append((place, name))
                    self._link_refs.append(_ref(value))
                else:
                    self.roots.append(_held(owners[place], name))
        self._values = [_copy(read(each)) for read, each in zip(self._readers, fields, strict=True)]
        self._num_modules = sum(isinstance(owner, nn.Module) for owner in owners)
        objects = _objects(fields[: self._num_modules])
        self._offloaded = [place for place, each in enumerate(objects) if _is_offloaded(each)]
        self._places = [
            place
            for place, each in enumerate(objects)
            if isinstance(each, Tensor) and not _is_offloaded(each)
        ]
        weights = [objects[place] for place in self._places]
        self.weights = Weights(weights)
        # A quantised weight may keep its scales as attributes.
        self.roots += [_held(weight) for weight in weights if holds_settings(weight)]
        for place in self._offloaded:
            objects[place] = None
        self._objects = list(map(_ref, objects))
        hooks = [each for each in objects if not isinstance(each, Tensor | nn.Module | None)]
        self.roots += [_ref(hook) for hook in hooks if not _is_fixed(hook, members)]

    def same(self, samples: bool) -> bool:
        """Return True if these modules are unchanged. O(modules + weights)."""
        owners = [owner() for owner in self._owners]
        if list(map(type, owners)) != self._kinds:
            return False
        fields: list[Any] = list(map(vars, owners))
        sizes = list(map(len, fields))
        if sizes != self._sizes:
            if list(map(_relevant, fields)) != self._names:
                return False
            self._sizes = sizes
        try:
            if list(map(_call, self._readers, fields)) != self._values:
                return False
            links = [fields[place][name] for place, name in self._links]
            if not same_objects(links, self._link_refs):
                return False
        except Exception:  # an attribute is gone, or its value cannot be compared
            return False
        objects = _objects(fields[: self._num_modules])
        if len(objects) != len(self._objects):
            return False
        for place in self._offloaded:
            if not _is_offloaded(objects[place]):
                return False
            objects[place] = None  # accelerate makes a new meta tensor after each pass
        if not same_objects(objects, self._objects):
            return False
        return self.weights.same([objects[place] for place in self._places], samples)


def _relevant(fields: Mapping[str, Any]) -> set[str]:
    """Return the names of the attributes from which a model may compute."""
    return {
        name
        for name in fields.keys() - _TORCH_OWN
        if is_plain(value := fields[name])
        or isinstance(value, _WATCHED)
        or callable(value)
        or name == "_hf_hook"
        or not is_library(type(value).__module__)
    }


def _is_fixed(value: object, members: set[int]) -> bool:
    """Return True if `value` cannot change in place, but only be replaced."""
    if isinstance(value, PreTrainedConfig):  # compared as an owner itself
        return True
    contents = Contents(members)
    contents.add(value)
    return contents.is_fixed and not isinstance(value, tuple)


def _configs(modules: list[nn.Module]) -> list[PreTrainedConfig]:
    """Return the configurations of all modules, nested configurations included."""
    pending = [value for module in modules for value in vars(module).values()]
    found: dict[int, PreTrainedConfig] = {}
    while pending:
        config = pending.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            pending += vars(config).values()
    return list(found.values())


def _objects(fields: list[dict[str, Any]]) -> list[Any]:
    """Return children, hooks, parameters and buffers of modules with these fields."""
    filled = filter(None, chain.from_iterable(map(_MODULE_DICTS, fields)))
    return list(chain.from_iterable(map(dict.values, filled)))


def _is_offloaded(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _ref(value: Any) -> Ref:
    """Return a weak reference to `value`, or a strong one if its class allows no weak ones."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


def _held(owner: object, name: str | None = None) -> Ref:
    """Return a reference to an attribute of `owner`, or to all its attributes."""
    ref = weakref.ref(owner)
    return lambda: vars(ref()) if name is None else vars(ref()).get(name)


def _copy(value: Any) -> Any:
    """Copy a plain value; collections are copied at every level."""
    if isinstance(value, dict):
        return type(value)({key: _copy(item) for key, item in value.items()})
    if type(value) in (list, tuple, set):
        return type(value)(map(_copy, value))
    return value


def _numerics() -> tuple[object, ...]:
    """Return the process-wide settings of torch that change the results of a model."""
    backends: Any = torch.backends
    return (
        torch.get_default_dtype(),
        backends.fp32_precision,
        backends.cuda.matmul.fp32_precision,
        backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        backends.cudnn.conv.fp32_precision,
        backends.mkldnn.matmul.fp32_precision,
        backends.cuda.flash_sdp_enabled(),
        backends.cuda.mem_efficient_sdp_enabled(),
        backends.cuda.math_sdp_enabled(),
        backends.cuda.cudnn_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _modes() -> list[object]:
    """Return the modes that change torch's functions on this thread, without the default device."""
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    return [mode for mode in modes if not isinstance(mode, DeviceContext)]
