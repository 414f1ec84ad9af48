"""Weights that accelerate keeps elsewhere - in host memory, on disk - between forward passes.

Its hooks put them in before a module computes and leave tensors without numbers behind, new ones
each time. So what tells whether a model is the same as before is what the hooks take them from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class WeightFile(NamedTuple):
    """A file with weights, as it was last written."""

    path: str
    num_bytes: int
    written_ns: int


def offloaded(model: nn.Module) -> Iterator[Tensor | WeightFile]:
    """What the hooks of `model` take its weights from. O(weights); looks at files, not into them.

    Raises: `OSError` for a file that is gone, which the next forward pass would raise as well.
    """
    for module in model.modules():
        hook = vars(module).get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "offload", False):
                yield from _weights_of(module, one)


def execution_device(model: nn.Module) -> torch.device:
    """Return where `model` computes its first layer. O(modules)."""
    device: torch.device = next(model.parameters()).device
    if device.type != "meta":
        return device
    for module in model.modules():
        hook = vars(module).get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            found = getattr(one, "execution_device", None)
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
    while hasattr(weights, "dataset"):  # one module's part of the weights of all
        name, weights = f"{weights.prefix}{name}", weights.dataset
    in_memory = getattr(weights, "state_dict", weights)
    if name in in_memory:
        found: Tensor = in_memory[name]
        return found
    path = weights.index[name].get("safetensors_file")
    path = os.path.join(weights.save_folder, f"{name}.dat") if path is None else path
    state = os.stat(path)
    return WeightFile(str(path), state.st_size, state.st_mtime_ns)
