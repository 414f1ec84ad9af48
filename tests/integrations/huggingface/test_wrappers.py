"""Models in wrappers, and models that write columns of their own: the same tokens as unpatched."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import accelerate  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: E402
from transformers.cache_utils import DynamicCache  # noqa: E402
from transformers.modeling_utils import AttentionInterface  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402

import kvpager  # noqa: E402
from kvpager.integrations.huggingface import Patch  # noqa: E402
from kvpager.integrations.huggingface.model_state.row_independence import row_dependence  # noqa: E402
from kvpager.integrations.huggingface.prefix import prefill, prompt_cache  # noqa: E402
from kvpager.integrations.huggingface.releases import cache_in, cache_of, with_cache  # noqa: E402
from kvpager.testing import tiny_llama_path  # noqa: E402
from tests.support import tiny_models  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

PATCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gathered": {"in_place": False, "block_size": 4},
    "prefix cache": {"prefix_cache": True, "block_size": 4},
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 5},
}
PADDED = tiny_models.prompts([9, 23])


def tokens(model: Any, inputs: dict[str, Any] = PADDED, **options: Any) -> Any:
    """The text of a model, or the error's type where transformers raises one."""
    torch.manual_seed(3)
    lengths = {"max_new_tokens": 10, "min_new_tokens": 10}
    try:
        return model.generate(**inputs, **lengths, pad_token_id=tiny_models.PAD, **options).tolist()
    except (ValueError, RuntimeError, IndexError) as error:
        return type(error)


def check_pools(patch: Patch) -> None:
    for pool in patch.memory.pools():
        pool.settle()
        pool.manager.check()
        assert pool.manager.num_held_blocks == 0


# ---------------------------------------------------------------- columns in front of the prompt

VIRTUAL: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
PEFT_CONFIGS: dict[str, Callable[[], Any]] = {
    "prompt tuning": lambda: peft.PromptTuningConfig(**VIRTUAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(**VIRTUAL, encoder_hidden_size=32),
    "prefix tuning": lambda: peft.PrefixTuningConfig(**VIRTUAL),
    "cpt": lambda: peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=[4, 5, 6],
        cpt_mask=[1, 1, 1],
        cpt_tokens_type_mask=[1, 2, 3],
    ),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1
    ),
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False),
}


def tuned(kind: str) -> Any:
    model = peft.get_peft_model(tiny_models.tiny_model("llama"), PEFT_CONFIGS[kind]()).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.7, generator=generator)
    return model


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("options", PATCHES.values(), ids=PATCHES)
@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_a_tuned_model_writes_its_own_tokens(kind: str, options: dict[str, Any]) -> None:
    model = tuned(kind)
    expected = {mode: tokens(model, **of_mode) for mode, of_mode in MODES.items()}
    with kvpager.patch(model, **options) as patch:
        for mode, of_mode in MODES.items():
            tokens(model.get_base_model(), **of_mode)  # the same weights, without virtual tokens
            for _ in range(2):
                assert tokens(model, **of_mode) == expected[mode], mode
        check_pools(patch)


def test_a_soft_prompt_before_padded_prompts_on_the_bundled_model() -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_path()).eval()
    model = peft.get_peft_model(model, PEFT_CONFIGS["prompt tuning"]()).eval()
    expected = tokens(model)
    with kvpager.patch(model):
        assert tokens(model) == expected


class SoftPrompt:
    """Virtual tokens that a class puts before every prompt, unseen from outside."""

    unaware = False  # of what a cache holds already

    def forward(self: Any, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("position_ids", None)
        cache = cache_in(kwargs)
        count = int(os.environ.get("VIRTUAL_TOKENS", "5"))
        embeds = self.get_input_embeddings()(input_ids)
        rows = len(input_ids)
        if cache.get_seq_length() == 0 or (self.unaware and input_ids.shape[1] > 1):
            generator = torch.Generator().manual_seed(7)
            soft = torch.randn(1, count, embeds.shape[2], generator=generator)
            embeds = torch.cat([soft.expand(rows, -1, -1), embeds], dim=1)
        if attention_mask is not None:
            soft = torch.ones(rows, count, dtype=attention_mask.dtype)
            attention_mask = torch.cat([soft, attention_mask], dim=1)
        kwargs |= {"inputs_embeds": embeds, "attention_mask": attention_mask}
        return super().forward(**kwargs)  # type: ignore[misc]


def softly_prompted(name: str) -> PreTrainedModel:
    model = tiny_models.tiny_model(name)
    model.__class__ = type("Soft", (SoftPrompt, type(model)), {})
    return model


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("options", PATCHES.values(), ids=PATCHES)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_class_with_virtual_tokens_writes_its_own_tokens(
    name: str, options: dict[str, Any]
) -> None:
    model = softly_prompted(name)
    expected = {mode: tokens(model, **of_mode) for mode, of_mode in MODES.items()}
    with kvpager.patch(model, **options) as patch:
        for mode, of_mode in MODES.items():
            for _ in range(2):
                assert tokens(model, **of_mode) == expected[mode], mode
        check_pools(patch)


def test_later_virtual_tokens_do_not_follow_a_cached_prefix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = softly_prompted("llama")
    kind: Any = type(model)
    prompt, other = (tiny_models.prompts([300], seed=seed)["input_ids"] for seed in (1, 2))
    turns = {"input_ids": torch.cat([prompt[:, :200], other[:, :100]], dim=1)}
    kind.unaware = True
    # As if a known library had put the virtual tokens there.
    monkeypatch.setattr(prefill, "row_dependence", lambda model: None)
    monkeypatch.setattr(prompt_cache, "row_dependence", lambda model: None)
    with kvpager.patch(model, prefix_cache=True) as patch:
        monkeypatch.setenv("VIRTUAL_TOKENS", "0")  # which leaves no trace in the model
        tokens(model, {"input_ids": prompt})
        monkeypatch.delenv("VIRTUAL_TOKENS")
        paged = tokens(model, turns)
        assert patch.stats().prefix_hit_tokens == 200
        check_pools(patch)
    assert paged == tokens(model, turns)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_wrapper_may_use_another_cache(beams: int) -> None:
    model = tiny_models.tiny_model("llama")
    plain_class = type(model)

    class Elsewhere(plain_class):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if cache_in(kwargs).get_seq_length() == 0:
                kwargs = with_cache(kwargs, DynamicCache(config=self.config))
            return super().forward(*args, **kwargs)

    model.__class__ = Elsewhere
    expected = tokens(model, num_beams=beams)
    with kvpager.patch(model, prefix_cache=True):
        for _ in range(2):
            assert tokens(model, num_beams=beams) == expected


MASKS: dict[str, Any] = {
    "none": lambda mask: None,
    "padding shown": torch.ones_like,
    "padding shown in part": lambda mask: mask.index_fill(1, torch.tensor([3, 4]), 1),
    "more hidden": lambda mask: mask.index_fill(1, torch.tensor([20]), 0),
    "another length": lambda mask: torch.cat([torch.ones(len(mask), 5).long(), mask], dim=1),
}


@pytest.mark.mostly_slow(quick=3)
@pytest.mark.parametrize("options", PATCHES.values(), ids=PATCHES)
@pytest.mark.parametrize("change", MASKS.values(), ids=MASKS)
def test_a_wrapper_may_hide_other_columns(change: Any, options: dict[str, Any]) -> None:
    model = tiny_models.tiny_model("llama")

    class Masked(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, attention_mask=change(attention_mask), **kwargs)

    model.__class__ = Masked
    for mode in ({}, {"num_beams": 3}):
        expected = tokens(model, **mode)
        with kvpager.patch(model, **options) as patch:
            for _ in range(2):
                assert tokens(model, **mode) == expected
            check_pools(patch)


def test_drafts_of_an_assistant_with_virtual_tokens_are_unchanged() -> None:
    model, assistant = softly_prompted("llama"), tiny_models.tiny_model("llama", seed=1)
    prompt = tiny_models.prompts([17])
    expected = tokens(model, prompt, assistant_model=assistant)
    with kvpager.patch():
        assert tokens(model, prompt, assistant_model=assistant) == expected


# ---------------------------------------------------------------- rows that are treated each


def with_two_adapters() -> Any:
    model = tuned("lora")
    for name in ("one", "two"):
        model.add_adapter(name, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    return model.eval()


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


@pytest.mark.mostly_slow(quick=5)
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


# ---------------------------------------------------------------- layers with columns of their own


def seen(lengths: list[int]) -> dict[str, torch.Tensor]:
    adapt = tiny_models.ARCHITECTURES["mllama, an image"].adapt
    assert adapt is not None
    return adapt(tiny_models.prompts(lengths))


IMAGE_COLUMNS = 10  # that the tiny model's image has, in two tiles
LENGTHS = {"padded": [9, 23], "as long as an image": [10, 4], "even": [9, 9]}


def seeing(cross: list[int]) -> PreTrainedModel:
    config = tiny_models.tiny_model("mllama, an image").config.text_config
    config = type(config)(**config.to_dict() | {"cross_attention_layers": cross})
    return tiny_models.tiny_model("mllama, an image", text_config=config)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("cross", [[1], [0, 2], [1, 2]], ids=str)
def test_layers_that_attend_to_an_image_have_its_columns(
    cross: list[int], lengths: list[int]
) -> None:
    model = seeing(cross)
    for inputs in (seen(lengths), tiny_models.prompts(lengths)):
        for mode in ({}, {"num_beams": 3}):
            expected = tokens(model, inputs, **mode)
            for options in PATCHES.values():
                with kvpager.patch(model, **options) as patch:
                    for _ in range(2):
                        assert tokens(model, inputs, **mode) == expected
                    check_pools(patch)


def test_a_cache_with_an_empty_first_layer_continues_as_unpatched() -> None:
    model, inputs = seeing([0]), tiny_models.prompts([9, 9])

    def turns() -> Any:
        options = {"max_new_tokens": 4, "return_dict_in_generate": True}
        first = model.generate(**inputs, **options)
        return tokens(model, with_cache({"input_ids": first.sequences}, cache_of(first)))

    expected = turns()
    assert isinstance(expected, list)
    with kvpager.patch(model):
        assert turns() == expected


def states(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, columns, 16, generator=generator)


Passes = list[dict[int, tuple[int, int]]]  # what each pass writes: layer -> rows and columns
PASSES: dict[str, Passes] = {
    "another length": [{0: (2, 6), 1: (2, 9), 2: (2, 6), 3: (2, 9)}, {0: (2, 1), 2: (2, 1)}],
    "a shorter one": [{0: (2, 9), 1: (2, 6), 2: (2, 9), 3: (2, 6)}, {0: (2, 1), 2: (2, 1)}],
    "other rows": [{0: (2, 6), 1: (3, 6), 2: (2, 6), 3: (3, 6)}, {0: (2, 1), 2: (2, 1)}],
    "the first layer": [{0: (2, 3), 1: (2, 6), 2: (2, 6)}, {1: (2, 1), 2: (2, 1)}],
    "a layer that comes later": [{0: (2, 6), 2: (2, 6)}, {0: (2, 1), 1: (2, 1), 2: (2, 1)}],
    "layers that are skipped": [
        {0: (2, 6), 1: (2, 6), 2: (2, 6), 3: (2, 6)},
        {0: (2, 2), 3: (2, 2)},
        {0: (2, 1), 1: (2, 1), 2: (2, 1), 3: (2, 1)},
        {0: (2, 5), 1: (2, 5), 2: (2, 5), 3: (2, 5)},
    ],
}


@pytest.mark.mostly_slow(quick=25)
@pytest.mark.parametrize("change", ["nothing", "reordered", "copied", "cropped"])
@pytest.mark.parametrize("kind", ["lazy", "full", "window"])
@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
def test_layers_may_write_columns_of_their_own(passes: Passes, kind: str, change: str) -> None:
    config = {
        "lazy": None,
        "full": tiny_models.tiny_model("llama", num_hidden_layers=4).config,
        "window": tiny_models.tiny_model("mistral", num_hidden_layers=4, sliding_window=4).config,
    }[kind]
    paged, plain = kvpager.PagedCache(config, block_size=4), DynamicCache(config=config)
    kept = []
    for number, writes in enumerate(passes):
        for layer, (rows, columns) in writes.items():
            state = states(rows, columns, seed=10 * number + layer)
            for mine, theirs in zip(
                paged.update(state, -state, layer), plain.update(state, -state, layer), strict=True
            ):
                assert torch.equal(mine + 0, theirs)
        if change == "copied":
            kept.append((copy.deepcopy(paged), copy.deepcopy(plain)))
        elif change == "reordered":
            for cache in (paged, plain):
                cache.reorder_cache(torch.tensor([1, 0]))
        elif change == "cropped" and kind != "window":
            paged.crop(-1)
            for layer in plain.layers:
                if layer.is_initialized:  # the others fail in the oldest releases
                    layer.crop(-1)
    for mine, theirs in [*kept, (paged, plain)]:
        assert_the_same(mine, theirs)


def assert_the_same(paged: kvpager.PagedCache, plain: DynamicCache) -> None:
    for mine, theirs in zip(paged.layers, plain.layers, strict=True):
        assert mine.get_seq_length() == theirs.get_seq_length()
        if theirs.get_seq_length():
            assert torch.equal(mine.keys + 0, theirs.keys)
            assert torch.equal(mine.values + 0, theirs.values)
    for pool in {id(group.pool): group.pool for group in paged.groups if group.pool}.values():
        pool.settle()
        pool.manager.check()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_step_without_room_leaves_diverged_layers_unchanged(failing: int) -> None:
    block_bytes = 4 * 2 * 2 * 16 * 4  # of a layer
    cache, plain = kvpager.PagedCache(memory=18 * block_bytes, block_size=4), DynamicCache()
    for each in (cache, plain):
        each.update(states(2, 6), states(2, 6), 0)
        each.update(states(2, 9), states(2, 9), 1)
    for layer in range(failing):
        cache.update(states(2, 2), states(2, 2), layer)
    with pytest.raises(kvpager.OutOfBlocks):
        cache.update(states(2, 99), states(2, 99), failing)
    assert [group.num_columns for group in cache.groups] == [6, 9]
    assert_the_same(cache, plain)


def test_drafts_of_a_models_first_layers_are_unchanged() -> None:
    model = tiny_models.tiny_model("llama", num_hidden_layers=4)
    prompt = tiny_models.prompts([17])
    expected = tokens(model, prompt, assistant_early_exit=2)
    assert isinstance(expected, list)
    with kvpager.patch(model):
        assert tokens(model, prompt, assistant_early_exit=2) == expected
