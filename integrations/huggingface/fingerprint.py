"""Whether a model is the one that it was, as far as that can be seen."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from kvpager.integrations.huggingface.offloaded import offloaded

# Numbers looked at per weight tensor to notice that it was written.
_SAMPLES = 16


def model_state(model: nn.Module) -> object:
    """Changes when a weight is replaced, moved, cast or written, and when a module's hooks or plain
    settings (numbers, names, truth values: scales, active adapters) change. O(parameters).
    Weights that are offloaded count as what they are loaded from.

    A write through `.data` is seen only if it touches one of a few samples of the tensor, and code
    that computes differently for reasons of its own is not seen: `Patch.clear` is for those.
    """
    present = itertools.chain(model.parameters(), model.buffers())
    weights = [tensor for tensor in present if tensor.device.type != "meta"]
    elsewhere = list(offloaded(model))
    weights += [weight for weight in elsewhere if isinstance(weight, Tensor)]
    files = tuple(weight for weight in elsewhere if not isinstance(weight, Tensor))
    tensors = tuple(
        (id(tensor), tensor.data_ptr(), tensor.dtype, str(tensor.device), _version(tensor))
        for tensor in weights
    )
    modules = tuple(
        (
            tuple(module._forward_pre_hooks),
            tuple(module._forward_hooks),
            id(vars(module).get("_hf_hook")),
            tuple((name, repr(value)) for name, value in vars(module).items() if _plain(value)),
        )
        for module in model.modules()
    )
    attention = getattr(model.config, "_attn_implementation", None)
    return tensors, files, _sample(weights), modules, attention


def _plain(value: object, depth: int = 0) -> bool:
    """Whether `value` is a number or a name, or a small collection of those."""
    if isinstance(value, dict) and depth < 2:
        return all(_plain(item, depth + 1) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple) and depth < 2:
        return all(_plain(item, depth + 1) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _version(tensor: Tensor) -> int:
    # Inference tensors have no version; nothing can write to them outside inference mode.
    return -1 if tensor.is_inference() else tensor._version


def _sample(tensors: list[Tensor]) -> tuple[bytes, ...]:
    """A few numbers of each tensor: what is written through `.data` leaves no other trace."""
    by_device: dict[torch.device, list[Tensor]] = {}
    with torch.no_grad():
        for tensor in tensors:
            if tensor.numel() and tensor.is_contiguous():
                flat = tensor.detach().view(-1)
                few = flat[:: -(-flat.numel() // _SAMPLES)].to(torch.float64)
                by_device.setdefault(tensor.device, []).append(few)
        # As bytes: a NaN is not equal to itself.
        return tuple(torch.cat(few).cpu().numpy().tobytes() for few in by_device.values())
