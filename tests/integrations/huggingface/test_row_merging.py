"""Models that treat rows by their place, or that run user code: their rows are not merged."""

from __future__ import annotations

import contextlib
import functools
import types
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")


peft = pytest.importorskip("peft")

import accelerate  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402
from transformers.modeling_utils import AttentionInterface  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402

import kvpager  # noqa: E402
from kvpager.integrations.huggingface.model_state.row_independence import row_dependence  # noqa: E402
from tests.support import tiny_models  # noqa: E402
from tests.support.wrapped_models import PATCHES, check_pools, tokens, tuned  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def with_two_adapters() -> Any:
    model = tuned("lora")
    for name in ("one", "two"):
        model.add_adapter(name, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    return model.eval()


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("options", PATCHES.values(), ids=PATCHES)
@pytest.mark.parametrize("beams", [1, 2])
def test_rows_may_have_an_adapter_each(beams: int, options: dict[str, Any]) -> None:
    model = with_two_adapters()
    row = tiny_models.prompts([300])
    inputs = {name: value.repeat(3, 1) for name, value in row.items()}
    per_row = {"adapter_names": ["one", "two", "__base__"], "num_beams": beams}
    expected = tokens(model, inputs, **per_row)
    assert expected[0] != expected[1]
    with kvpager.patch(model, **options) as patch:
        for _ in range(2):
            assert tokens(model, inputs, **per_row) == expected
        check_pools(patch)


STEERED = ["pre-hook", "hook", "accelerate's hook", "replaced forward", "forward of the class"]


@contextlib.contextmanager
def steered(model: PreTrainedModel, how: str) -> Any:
    """Adds to the hidden states of each row what is meant for its place in the batch."""
    layer = model.model.layers[0]

    def steer(hidden: torch.Tensor) -> torch.Tensor:
        assert len(hidden) == 6, "every row is computed, in one pass"
        return hidden + torch.arange(6.0)[:, None, None] * 0.5

    if how == "pre-hook":
        handle = layer.register_forward_pre_hook(lambda _, args: (steer(args[0]), *args[1:]))
    elif how == "hook":
        handle = layer.register_forward_hook(lambda _, args, output: steer(output))
    elif how == "accelerate's hook":

        class Steering(accelerate.hooks.ModelHook):
            def post_forward(self, module: Any, output: torch.Tensor) -> torch.Tensor:
                return steer(output)

        accelerate.hooks.add_hook_to_module(layer, Steering())
        handle = contextlib.nullcontext()
    elif how == "replaced forward":
        forward = layer.forward
        layer.forward = lambda *args, **kwargs: steer(forward(*args, **kwargs))
        handle = contextlib.nullcontext()
    elif how == "forward of the class":
        kind, forward = type(layer), type(layer).forward

        def steered_forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            hidden: torch.Tensor = forward(self, *args, **kwargs)
            return steer(hidden) if self is layer else hidden

        kind.forward = steered_forward
        handle = contextlib.ExitStack()
        handle.callback(setattr, kind, "forward", forward)
    else:
        of_layer = torch.nn.modules.module.register_module_forward_hook
        handle = of_layer(lambda m, args, output: steer(output) if m is layer else None)
    with handle:
        yield


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("options", PATCHES.values(), ids=PATCHES)
@pytest.mark.parametrize("how", [*STEERED, "hook of all modules"])
def test_rows_under_a_hook_are_neither_merged_nor_split(how: str, options: dict[str, Any]) -> None:
    model, inputs = tiny_models.tiny_model("llama"), tiny_models.prompts([300, 9])
    with steered(model, how):
        expected = tokens(model, inputs, num_beams=3)
        with kvpager.patch(model, **options) as patch:
            for _ in range(2):
                assert tokens(model, inputs, num_beams=3) == expected
            assert patch.stats().prefix_hit_tokens == 0


def test_hooks_that_transformers_leaves_on_a_model_keep_rows_merged() -> None:
    model, inputs = tiny_models.tiny_model("llama"), tiny_models.prompts([40])
    model(**inputs, output_hidden_states=True)  # leaves hooks that are idle otherwise
    with kvpager.patch(model, prefix_cache=True, block_size=4) as patch:
        for _ in range(2):
            tokens(model, inputs, num_beams=3)
        assert patch.stats().prefix_hit_tokens == 39


def offloaded(model: PreTrainedModel) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def compiled(model: PreTrainedModel) -> None:
    for module in (model, model.model.layers[0].mlp):
        module.forward = torch.compile(module.forward, backend="eager")


@pytest.mark.parametrize("change", [offloaded, compiled], ids=lambda f: f.__name__)
def test_a_forward_that_a_library_replaces_keeps_rows_merged(change: Any) -> None:
    model = tiny_models.tiny_model("llama")
    change(model)
    assert row_dependence(model) is None


class Placed(torch.nn.Module):
    """Adds to each row what is meant for its place in the batch."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return by_place(self.inner(*args, **kwargs))


def by_place(states: torch.Tensor) -> torch.Tensor:
    return states + torch.ones_like(states[:, :1, :1]).cumsum(0) * 0.5  # which torch.fx can trace


class PlacedStates(torch.nn.Module):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return by_place(states)


class PlacedNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return by_place(super().forward(hidden_states))


def a_layer_is_replaced(model: Any) -> None:
    model.model.layers[1] = Placed(model.model.layers[1])


def a_module_is_added(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.act_fn = torch.nn.Sequential(mlp.act_fn, PlacedStates())


def a_module_has_another_class(model: Any) -> None:
    model.model.norm.__class__ = PlacedNorm


def a_module_is_traced(model: Any) -> None:
    model.model.norm = torch.nn.Sequential(
        model.model.norm, torch.fx.symbolic_trace(PlacedStates())
    )


def a_module_is_scripted(model: Any) -> None:
    placed = torch.jit.trace(PlacedStates(), torch.zeros(6, 1, 1))
    model.model.norm = torch.nn.Sequential(model.model.norm, placed)


def a_forward_is_replaced(model: Any) -> None:
    def forward(self: Any, states: torch.Tensor) -> torch.Tensor:
        return by_place(type(self).forward(self, states))

    mlp = model.model.layers[1].mlp
    mlp.forward = types.MethodType(forward, mlp)


def a_forward_is_wrapped(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    inner = mlp.forward
    wrapped = functools.wraps(inner)(lambda states: by_place(inner(states)))
    mlp.forward = torch.no_grad()(wrapped)  # both look like functions of a library


def a_forward_is_a_partial(model: Any) -> None:
    norm = model.model.norm
    norm.forward = functools.partial(lambda inner, states: by_place(inner(states)), norm.forward)


def a_function_takes_the_place_of_a_module(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    inner = mlp.act_fn
    del mlp.act_fn
    mlp.act_fn = lambda states: by_place(inner(states))


PLACED = [
    a_layer_is_replaced,
    a_module_is_added,
    a_module_has_another_class,
    a_module_is_traced,
    a_module_is_scripted,
    a_forward_is_replaced,
    a_forward_is_wrapped,
    a_forward_is_a_partial,
    a_function_takes_the_place_of_a_module,
]


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("change", PLACED, ids=lambda change: change.__name__)
def test_rows_of_models_with_user_code_are_never_merged(change: Any) -> None:
    model, inputs = tiny_models.tiny_model("llama"), tiny_models.prompts([30, 30])
    inputs = {name: value[:1].repeat(2, 1) for name, value in inputs.items()}
    change(model)
    expected = tokens(model, inputs, num_beams=3)
    assert isinstance(expected, list)
    for options in PATCHES.values():
        with kvpager.patch(model, **options) as patch:
            for _ in range(2):
                assert tokens(model, inputs, num_beams=3) == expected
            assert "equal rows not merged: 2 calls with" in patch.report()
            assert patch.stats().prefix_hit_tokens == 0


def test_the_report_names_code_that_prevents_merging_rows() -> None:
    model = tiny_models.tiny_model("llama")
    a_layer_is_replaced(model)
    with kvpager.patch(model, prefix_cache=True) as patch:
        tokens(model, num_beams=2)
        found = f"with the forward of Placed, defined in {__name__}"
        assert f"equal rows not merged: 1 call {found}" in patch.report()
        assert f"prompts not kept: 1 call {found}" in patch.report()


@pytest.mark.parametrize("where", ["the attention function", "a function of the model's module"])
def test_functions_of_the_callers_keep_rows_from_being_merged(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.tiny_model("llama")
    assert row_dependence(model) is None
    owner, name = modeling_llama, "apply_rotary_pos_emb"
    if where == "the attention function":
        mapping: Any = AttentionInterface._global_mapping
        inner = mapping["sdpa"]
        monkeypatch.setitem(mapping, "sdpa", functools.wraps(inner)(lambda *a, **k: inner(*a, **k)))
    else:
        rotate = getattr(owner, name)
        monkeypatch.setattr(owner, name, functools.wraps(rotate)(lambda *a, **k: rotate(*a, **k)))
    assert row_dependence(model) is not None


def test_the_report_names_hooks_that_prevent_sharing_prompts() -> None:
    model = tiny_models.tiny_model("llama")
    model.model.layers[0].register_forward_hook(HOOKS["returns another output"][0])
    with kvpager.patch(model, prefix_cache=True) as patch:
        tokens(model)
        assert "which may treat rows differently" in patch.report()


NOTES: list[Any] = []
HOOKS: dict[str, tuple[Any, bool]] = {
    "notes": (lambda _module, args, output: NOTES.append(len(args[0])), True),
    "does nothing": (lambda *call: None, True),
    "returns another output": (lambda _module, args, output: output * 2, False),
    "notes, and returns another": (lambda m, a, out: NOTES.append(m) or out * 2, False),
    "writes into the output": (lambda _module, args, output: output.mul_(2), False),
    "calls another function": (lambda *call: steered(*call), False),
}


@pytest.mark.parametrize(("hook", "is_alike"), HOOKS.values(), ids=HOOKS)
def test_a_hook_that_surely_only_takes_notes_keeps_rows_merged(hook: Any, is_alike: bool) -> None:
    model = tiny_models.tiny_model("llama")
    assert row_dependence(model) is None
    model.model.layers[0].register_forward_hook(hook)
    assert (row_dependence(model) is None) == is_alike
