"""Find the transformers model inside a wrapper, and refuse models that an engine cannot serve."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.model_state.offloaded import execution_device

_TOLERANCE = 1e-3  # of the logits' norm: the same results up to rounding


def unwrapped(model: Any) -> Any:
    """Return `model`, or the transformers model that it wraps. O(modules).

    A wrapper of PEFT or of the user may compute other logits than the model inside it. A short
    forward pass of both compares them.

    Raises: `TypeError` without a transformers model that can generate; `KVPagerError` for a model
    that several processes share, or whose wrapper computes other logits than the model inside it.
    """
    inner = model
    while isinstance(inner, _TRANSPARENT):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    if not isinstance(inner, GenerationMixin):
        wrapper, inner = inner, _generative_inside(inner)
        refuse_sharded(wrapper)
        refuse_sharded(inner)
        _refuse_unlike(wrapper, inner)
    else:
        refuse_sharded(inner)
    return inner


# These wrappers return the results of the model inside unchanged.
_TRANSPARENT = (
    torch._dynamo.eval_frame.OptimizedModule,  # of torch.compile(model)
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
)


def _generative_inside(model: Any) -> Any:
    found = dict(_outermost(model, "")) if isinstance(model, nn.Module) else {}
    if not found:
        raise no_model(model)
    if len(found) > 1:
        paths = ", ".join(f"model.{path}" for path in found)
        raise TypeError(
            f"model: expected one model, got {type(model).__name__}, which holds several. Pass one "
            f"of {paths}."
        )
    return next(iter(found.values()))


def no_model(model: object) -> TypeError:
    """Return the error for an object that is no transformers model that can generate. O(1)."""
    name = type(model).__name__
    expected = "model: expected a transformers model that can generate, got"
    if isinstance(model, str | PathLike):
        load = f"AutoModelForCausalLM.from_pretrained({fspath(model)!r})"
        return TypeError(f"{expected} the name {fspath(model)!r}. Load it: {load}.")
    if isinstance(model, type):
        load = f"{model.__name__}.from_pretrained(...)"
        return TypeError(f"{expected} the class {model.__name__}. Load a model: {load}.")
    if isinstance(getattr(model, "model", None), nn.Module) and not isinstance(model, nn.Module):
        return TypeError(f"{expected} a {name}. Pass its .model.")
    if isinstance(model, PreTrainedModel):
        return TypeError(
            f"{expected} {name}. Load the checkpoint with a class that has a language-model head, "
            "such as AutoModelForCausalLM."
        )
    return TypeError(f"{expected} {name}. Load one with AutoModelForCausalLM.from_pretrained.")


def _outermost(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost models that can generate, with their paths. O(modules)."""
    for name, child in module.named_children():
        where = f"{path}.{name}" if path else name
        if isinstance(child, GenerationMixin):
            yield where, child
        else:
            yield from _outermost(child, where)


@torch.inference_mode()
def _refuse_unlike(wrapper: Any, inner: Any) -> None:
    """Raise `KVPagerError` if `wrapper` computes other logits than `inner`, the model inside it."""
    name, inside = type(wrapper).__name__, type(inner).__name__
    advice = f"Use model.generate(), or pass the {inside} inside it."
    for config in getattr(wrapper, "peft_config", {}).values():
        # Such adapters depend on tokens of the prompt, which only PEFT reads.
        if getattr(config, "alora_invocation_tokens", None):
            raise KVPagerError(f"{name}: activated LoRA cannot be batched continuously. {advice}")
    training = [module for module in wrapper.modules() if module.training]
    wrapper.eval()
    try:
        expected, found = _logits(wrapper, inner), _logits(inner, inner)
    except Exception as error:
        raise KVPagerError(
            f"{name} cannot be batched continuously: its forward pass of three tokens failed: "
            f"{error!r}. {advice}"
        ) from error
    finally:
        for module in training:
            module.training = True
    if expected.shape == found.shape:
        difference = (expected - found).norm()
        if bool(difference <= _TOLERANCE * expected.norm()):
            return
    raise KVPagerError(
        f"{name} cannot be batched continuously: its logits are not those of the {inside} inside "
        "it. PEFT's prompt tuning, for one, has virtual tokens that a block table cannot hold. "
        f"{advice}"
    )


def _logits(model: Any, inner: Any) -> Tensor:
    """Return the logits that `model` computes for three tokens."""
    ids = torch.tensor([[2, 1, 0]], device=execution_device(inner))
    options = {"decoder_input_ids": ids} if inner.config.is_encoder_decoder else {}
    logits: Tensor = model(input_ids=ids, **options).logits
    return logits.float()


def refuse_sharded(model: Any) -> None:
    """Raise `KVPagerError` for a model whose forward pass several processes share. O(parameters).

    Each process has its own engine, and the engines may order requests differently. Collective
    operations of different steps would then be mixed up.
    """
    how = _sharding(model)
    if how is not None:
        raise KVPagerError(
            f"{type(model).__name__} is sharded by {how}, which an engine does not support. "
            "Use model.generate(), or load the whole model in each process."
        )


def _sharding(model: Any) -> str | None:
    if (getattr(model, "_tp_size", None) or 1) > 1:
        return "tensor parallelism"
    if getattr(model, "_device_mesh", None) is not None:
        return "tensor parallelism, or another parallelism of torch.distributed's device meshes"
    if hasattr(model, "_pp_stage") or getattr(model, "hf_split_points", None) is not None:
        return "pipeline parallelism"
    for parameter in model.parameters():
        if getattr(parameter, "device_mesh", None) is not None:
            return "tensor parallelism or FSDP: it has DTensor weights"
        if hasattr(parameter, "ds_id"):
            return "DeepSpeed ZeRO-3"
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return "FSDP"
    return None
