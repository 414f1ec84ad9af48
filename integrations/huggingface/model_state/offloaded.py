"""Find the weights that accelerate keeps in host memory or on disk between forward passes.

accelerate's hooks load a module's weights before it computes, and replace them by new meta tensors
afterwards. So changes are visible only at the source from which the hooks load.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class WeightFile(NamedTuple):
    """A file with weights: its size and the time of its last write."""

    path: str
    num_bytes: int
    written_ns: int


def offloaded(model: nn.Module) -> Iterator[Tensor | WeightFile]:
    """Yield the tensors and files from which the hooks of `model` load its weights. O(weights).

    Does not read the files. Raises: `OSError` for a missing file, as the next forward pass would.
    """
    for module in model.modules():
        for hook in _hooks_of(module):
            if getattr(hook, "offload", False):
                yield from _weights_of(module, hook)


def _hooks_of(module: nn.Module) -> tuple[Any, ...]:
    hook = vars(module).get("_hf_hook")
    return tuple(getattr(hook, "hooks", (hook,)))


def execution_device(model: nn.Module) -> torch.device:
    """Return the device on which `model` computes its first layer. O(modules)."""
    device: torch.device = next(model.parameters()).device
    if device.type != "meta":
        return device
    for module in model.modules():
        for hook in _hooks_of(module):
            found = getattr(hook, "execution_device", None)
            if found is not None:
                return torch.device(found)
    return device


def _weights_of(module: nn.Module, hook: Any) -> Iterator[Tensor | WeightFile]:
    deep = bool(hook.place_submodules)
    for named in (module.named_parameters(recurse=deep), module.named_buffers(recurse=deep)):
        for name, tensor in named:
            if tensor.device.type == "meta":
                yield _source(hook.weights_map, name)


def _source(weights: Any, name: str) -> Tensor | WeightFile:
    while hasattr(weights, "dataset"):  # a view of one module's weights
        name, weights = f"{weights.prefix}{name}", weights.dataset
    in_memory = getattr(weights, "state_dict", weights)
    if name in in_memory:
        found: Tensor = in_memory[name]
        return found
    path = weights.index[name].get("safetensors_file")
    path = os.path.join(weights.save_folder, f"{name}.dat") if path is None else path
    state = os.stat(path)
    return WeightFile(str(path), state.st_size, state.st_mtime_ns)
