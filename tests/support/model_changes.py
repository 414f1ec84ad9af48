"""Changes of a model, each of which makes it another model."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from tests.support import tiny_models  # noqa: E402

IDS = torch.arange(3, 60)[None]
PROMPT = IDS[0].tolist()
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def llama(seed: int = 0) -> Any:
    return tiny_models.tiny_model("llama", seed=seed)


def tokens(model: Any) -> list[int]:
    reply: list[int] = model.generate(IDS, **GREEDY)[0, IDS.shape[1] :].tolist()
    return reply


# A change is a generator: what it does between two `yield`s makes another model.
Change = Callable[[Any], Iterator[None]]
CHANGES: list[Change] = []


def change(function: Change) -> Change:
    CHANGES.append(function)
    return function


def mlp(model: Any) -> Any:
    return model.model.layers[0].mlp


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@change
def a_weight_is_written(model: Any) -> Iterator[None]:
    yield
    with torch.no_grad():
        model.lm_head.weight.mul_(1.05)
    yield


@change
def a_weight_is_written_through_data(model: Any) -> Iterator[None]:
    yield
    mlp(model).up_proj.weight.data.mul_(1.05)
    yield


@change
def a_weight_is_written_through_numpy(model: Any) -> Iterator[None]:
    yield
    mlp(model).up_proj.weight.detach().numpy()[...] *= 1.05
    yield


@change
def a_weight_has_other_data(model: Any) -> Iterator[None]:
    weight = model.model.layers[0].self_attn.q_proj.weight
    yield
    weight.data = weight.data.t()
    yield
    weight.data = weight.data.clone()
    yield


@change
def weights_are_loaded(model: Any) -> Iterator[None]:
    yield
    model.load_state_dict(llama(seed=5).state_dict())
    yield
    model.load_state_dict(llama(seed=6).state_dict(), assign=True)
    yield


@change
def the_model_is_cast(model: Any) -> Iterator[None]:
    yield
    model.to(torch.bfloat16)
    yield
    model.to(torch.float32)
    yield


@change
def a_buffer_is_written(model: Any) -> Iterator[None]:
    yield
    model.model.rotary_emb.inv_freq.mul_(0.5)
    yield


@change
def an_expanded_weight_is_written(model: Any) -> Iterator[None]:
    mlp(model).up_proj.weight = nn.Parameter(torch.randn(1, 64).expand(128, 64))
    yield
    mlp(model).up_proj.weight.data[0].add_(1)
    yield


@change
def a_small_inference_tensor_is_written(model: Any) -> Iterator[None]:
    with torch.inference_mode():
        mlp(model).register_buffer("scale", torch.ones(100))
    yield
    with torch.inference_mode():
        mlp(model).scale[37] = 2
    yield


@change
def a_weight_of_eight_bits_is_written(model: Any) -> Iterator[None]:
    mlp(model).register_buffer("packed", torch.randn(400).to(torch.float8_e4m3fn))
    yield
    mlp(model).packed.data.view(torch.uint8).bitwise_xor_(1)
    yield


class Scaled(nn.Parameter):
    """A weight whose numbers are to be multiplied by an attribute of it."""


@change
def an_attribute_of_a_weight_changes(model: Any) -> Iterator[None]:
    weight = mlp(model).up_proj.weight = Scaled(mlp(model).up_proj.weight.detach())
    weight.state = types.SimpleNamespace(scale=torch.ones(3), kind="nf4")
    yield
    weight.state.scale.mul_(2)
    yield
    weight.state.kind = "fp4"
    yield


@change
def global_hooks_come_and_go(model: Any) -> Iterator[None]:
    yield
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
        nn.modules.module.register_module_buffer_registration_hook,
        nn.modules.module.register_module_module_registration_hook,
        nn.modules.module.register_module_parameter_registration_hook,
    ):
        handle = register(lambda *_: None)
        try:
            yield
        finally:
            handle.remove()
        yield


@change
def hooks_come_and_go(model: Any) -> Iterator[None]:
    yield
    for register in (mlp(model).register_forward_hook, mlp(model).register_forward_pre_hook):
        handle = register(lambda *_: None)
        yield
        handle.remove()
        yield


@change
def a_hooks_variable_changes(model: Any) -> Iterator[None]:
    scale = 1.0
    mlp(model).register_forward_hook(lambda _module, _inputs, output: output * scale)
    yield
    scale = 2.0
    yield


SCALE = [1.0]


@change
def a_hooks_global_changes(model: Any) -> Iterator[None]:
    nn.modules.module.register_module_forward_hook(lambda *call: call[2] * SCALE[0])
    try:
        yield
        SCALE[0] += 1
        yield
    finally:
        nn.modules.module._global_forward_hooks.clear()


class Steering:
    """A hook with settings of its own."""

    factor = 1.0

    def __init__(self) -> None:
        self.vector = torch.zeros(64)
        self.scale = 1.0

    def __call__(self, _module: Any, _inputs: Any, output: Any) -> Any:
        return output + self.vector * self.scale * self.factor


@change
def what_a_hook_holds_changes(model: Any) -> Iterator[None]:
    steering = Steering()
    mlp(model).register_forward_hook(steering)
    yield
    steering.vector += 1
    yield
    steering.scale = 2.0
    yield
    steering.vector = torch.ones(64)
    yield
    with replaced(Steering, "factor", 3.0):
        yield
    yield


@change
def what_a_hook_was_given_changes(model: Any) -> Iterator[None]:
    settings = {"scale": 1.0}
    more = types.SimpleNamespace(scale=1.0)

    def scaled(settings: Any, _module: Any, _inputs: Any, output: Any, more: Any = more) -> Any:
        return output * settings["scale"] * more.scale

    mlp(model).register_forward_hook(functools.partial(scaled, settings))
    yield
    settings["scale"] = 2.0
    yield
    more.scale = 2.0
    yield


@change
def a_forward_is_replaced(model: Any) -> Iterator[None]:
    module, forward = mlp(model), modeling_llama.LlamaMLP.forward
    yield
    module.forward = lambda states: forward(module, states) * 2
    yield
    del module.forward
    module.forward = lambda states: forward(module, states) * 3
    yield
    del module.forward
    yield


@change
def a_class_is_changed(model: Any) -> Iterator[None]:
    class Silent(modeling_llama.LlamaMLP):
        def forward(self, states: Any) -> Any:
            return states * 0

    yield
    with replaced(modeling_llama.LlamaMLP, "forward", Silent.forward):
        yield
    yield
    mlp(model).__class__ = Silent
    yield


@change
def functions_are_replaced(model: Any) -> Iterator[None]:
    yield
    for module, name in (
        (modeling_llama, "apply_rotary_pos_emb"),
        (modeling_llama, "rotate_half"),
        (nn.functional, "linear"),
    ):
        with replaced(module, name, functools.partial(getattr(module, name))):
            yield
        yield


@change
def an_attention_function_is_replaced(model: Any) -> Iterator[None]:
    registered = transformers.AttentionInterface._global_mapping
    before = registered["sdpa"]
    yield
    registered["sdpa"] = functools.partial(before)
    try:
        yield
    finally:
        registered["sdpa"] = before
    yield
    model.set_attn_implementation("eager")
    yield


@change
def settings_change(model: Any) -> Iterator[None]:
    yield
    model.config.rms_norm_eps = 0.1
    yield
    model.config.rope_parameters["rope_theta"] = 5.0
    yield
    model.model.layers[1].self_attn.scaling *= 2
    yield
    mlp(model).factors = {"default": 1.0}
    yield
    mlp(model).factors["default"] = 2.0
    yield
    mlp(model).train()
    yield


@change
def a_tensor_that_is_no_buffer_changes(model: Any) -> Iterator[None]:
    mlp(model).factor = torch.ones(3)
    mlp(model).more = [nn.Linear(2, 2)]
    yield
    mlp(model).factor += 1
    yield
    mlp(model).more[0].weight.data += 1
    yield


@change
def modules_are_replaced(model: Any) -> Iterator[None]:
    yield
    mlp(model).act_fn = nn.ReLU()
    yield
    mlp(model).extra = nn.Linear(2, 2)
    yield


@change
def a_weight_is_parametrised(model: Any) -> Iterator[None]:
    class Twice(nn.Module):
        def forward(self, weight: Any) -> Any:
            return weight * 2

    yield
    nn.utils.parametrize.register_parametrization(mlp(model).up_proj, "weight", Twice())
    yield


@change
def torch_computes_otherwise(model: Any) -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
    yield
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
    yield
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield
    yield


def opaque_hook(model: Any) -> None:
    factors = iter([1.0] * 10_000)
    mlp(model).register_forward_hook(lambda _module, _inputs, output: output * next(factors))
