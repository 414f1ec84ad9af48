"""Whether a model is still the one that computed cached keys and values."""

from __future__ import annotations

import contextlib
import functools
import gc
import signal
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

import kvpager  # noqa: E402
from kvpager.integrations.huggingface.model_state import fingerprint  # noqa: E402
from kvpager.integrations.huggingface.model_state.fingerprint import ModelWatch  # noqa: E402
from tests.support import tiny_models  # noqa: E402

IDS = torch.arange(3, 60)[None]
PROMPT = IDS[0].tolist()
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def llama(seed: int = 0) -> Any:
    return tiny_models.tiny_model("llama", seed=seed)


def tokens(model: Any) -> list[int]:
    reply: list[int] = model.generate(IDS, **GREEDY)[0, IDS.shape[1] :].tolist()
    return reply


# ---------------------------------------------------------------- changes
# Each is a generator: what it does between two `yield`s makes another model.

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
        yield
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


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_makes_another_model(change: Change) -> None:
    model = llama()
    watch, seen = ModelWatch(model, has_parts=True), []
    with contextlib.closing(change(model)) as steps:
        for _ in steps:
            state = watch.look()
            assert state.doubt is None
            assert watch.look() == watch.look(samples=False) == watch.glance() == state
            seen.append(state.version)
    assert len(set(seen)) == len(seen) > 1


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed_part_by_part(change: Change) -> None:
    model = llama()
    watch = ModelWatch(model, has_parts=True)
    with contextlib.closing(change(model)) as steps:
        next(steps)
        before = watch.look()
        next(steps)
        assert any(watch.glance() != before for _ in range(max(fingerprint._PARTS)))


def test_what_only_notes_makes_no_other_model() -> None:
    model, shapes = llama(), []
    model.model.register_forward_hook(lambda _module, _inputs, output: shapes.append(output[0]))
    computed = tiny_models.Computed(model)
    watch = ModelWatch(model)
    before = watch.look()
    for use in (
        lambda: model(IDS),
        lambda: tokens(model),
        lambda: model.eval(),
        lambda: model.requires_grad_(False),
        lambda: model.state_dict(),
        lambda: setattr(model.config, "rms_norm_eps", float(str(model.config.rms_norm_eps))),
        lambda: setattr(mlp(model).act_fn, "note", object()),
    ):
        use()
        assert watch.look() == before
    assert shapes
    assert computed.columns


def test_an_unchanged_model_is_recognised_without_being_noted_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama()
    watch = ModelWatch(model)
    before = watch.look()
    monkeypatch.setattr(fingerprint, "_Snapshot", None)
    assert watch.look() == before
    assert watch.look(samples=False) == before


def refer_to_itself(model: Any) -> None:
    model.register_forward_hook(lambda *_: model.config)
    mlp(model).forward = functools.partial(type(mlp(model)).forward, mlp(model))


@pytest.mark.parametrize("hooked", [False, True])
def test_a_watch_keeps_neither_the_model_nor_old_weights_alive(hooked: bool) -> None:
    model = llama()
    if hooked:
        refer_to_itself(model)
    watch = ModelWatch(model)
    watch.look()
    old = weakref.ref(mlp(model).up_proj.weight.untyped_storage())
    module = weakref.ref(mlp(model).down_proj)
    mlp(model).up_proj.weight.data = torch.zeros(1)
    mlp(model).down_proj = nn.Identity()
    gc.collect()
    assert (old(), module()) == (None, None)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_two_models_are_never_the_same() -> None:
    one, other = llama(), llama()
    states = [ModelWatch(model).look() for model in (one, other, one)]
    assert len({state.version for state in states}) == 3


# ---------------------------------------------------------------- what cannot be told


def of_inference(model: Any) -> None:
    with torch.inference_mode():
        mlp(model).up_proj.weight = nn.Parameter(torch.randn(96, 64) / 8, requires_grad=False)


def sparse(model: Any) -> None:
    mlp(model).register_buffer("extra", torch.eye(4).to_sparse())


def nested(model: Any) -> None:
    mlp(model).register_buffer("extra", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))


def lazy(model: Any) -> None:
    mlp(model).extra = nn.LazyLinear(3)


def opaque_hook(model: Any) -> None:
    factors = iter([1.0] * 10_000)
    mlp(model).register_forward_hook(lambda _module, _inputs, output: output * next(factors))


def random_hook(model: Any) -> None:
    generator = torch.Generator()
    mlp(model).register_forward_hook(
        lambda _module, _inputs, output: output + 0 * torch.rand(1, generator=generator)
    )


def dropout(model: Any) -> None:
    model.model.layers[0].self_attn.train()


UNTOLD = [
    (of_inference, "does not count writes to inference tensors"),
    (sparse, "it is a sparse_coo tensor"),
    (nested, "it is a nested tensor"),
    (lazy, "it has no values in memory"),
    (opaque_hook, "a list_iterator may change undetected"),
    (random_hook, "a Generator may change undetected"),
    (dropout, "a LlamaAttention is in training mode"),
]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Lazy modules")
@pytest.mark.parametrize(("make", "reason"), UNTOLD, ids=lambda each: getattr(each, "__name__", ""))
def test_a_model_that_may_change_undetected_shares_nothing(make: Any, reason: str) -> None:
    model = llama()
    make(model)
    plain = tokens(model)
    with kvpager.patch(model, prefix_cache=True) as patch:
        assert tokens(model) == tokens(model) == plain
        assert patch.stats().prefix_hit_tokens == 0
        assert patch.stats().prefix_unserved_calls == 2
        assert "prompts not kept: 2 calls with a model that may change undetected" in patch.report()
        assert "of other kinds" not in patch.report()
        assert reason in patch.report()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Lazy modules")
@pytest.mark.parametrize(("make", "reason"), UNTOLD, ids=lambda each: getattr(each, "__name__", ""))
def test_an_engine_whose_model_may_change_undetected_shares_nothing(make: Any, reason: str) -> None:
    model = llama()
    with kvpager.Engine(model, memory="8MiB") as engine:
        make(model)
        for _ in range(2):
            engine.generate([PROMPT], **GREEDY)
        assert engine.stats().scheduler.total_reused_tokens == 0
        assert reason in str(engine.stats().unshared)


class Mode(torch.overrides.TorchFunctionMode):
    """Computes as torch does, for now."""

    factor = 1.0

    def __torch_function__(
        self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


def test_calls_under_other_torch_function_modes_share_nothing() -> None:
    model, hits = llama(), []
    with kvpager.patch(model, prefix_cache=True) as patch:

        def call() -> int:
            before = patch.stats().prefix_hit_tokens
            tokens(model)
            return patch.stats().prefix_hit_tokens - before

        assert call() == 0
        with Mode() as mode:
            hits += [call(), call()]
            mode.factor = 2.0
            hits += [call(), call()]
        hits.append(call())
        with torch.device("cpu"):
            hits.append(call())
    assert [count > 0 for count in hits] == [False, True, False, True, False, True]


# ---------------------------------------------------------------- tensor subclasses


class Wrapped(torch.Tensor):
    """A weight that holds its numbers in another tensor, as quantised ones do."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def bare(each: Any) -> Any:
            return each.inner if isinstance(each, Wrapped) else each

        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        return function(*map(bare, args), **{k: bare(v) for k, v in (kwargs or {}).items()})


class Flat(Wrapped):
    """One that tells what it holds."""

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, _context: Any, _size: Any, _stride: Any) -> Any:
        return Flat(inner["inner"])


def wrap_weights(model: Any, kind: type) -> None:
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            weight = kind(module.weight.detach())
            module.weight = nn.Parameter(weight, requires_grad=False)


def test_weights_inside_wrappers_are_looked_at() -> None:
    model = llama()
    plain = tokens(model)
    wrap_weights(model, Flat)
    with kvpager.patch(model, prefix_cache=True) as patch:
        assert tokens(model) == tokens(model) == plain
        hits = patch.stats().prefix_hit_tokens
        assert hits > 0
        inner = model.model.layers[0].self_attn.k_proj.weight.inner
        for write in (lambda: inner.mul_(1.5), lambda: inner.data.mul_(1.5)):
            write()
            tokens(model)
            assert patch.stats().prefix_hit_tokens == hits
    assert tokens(model) != plain


def test_a_wrapper_that_hides_its_values_shares_nothing() -> None:
    model = llama()
    plain = tokens(model)
    wrap_weights(model, Wrapped)
    with kvpager.patch(model, prefix_cache=True) as patch:
        assert tokens(model) == tokens(model) == plain
        assert patch.stats().prefix_hit_tokens == 0
        assert "Wrapped does not show its values" in patch.report()


# ---------------------------------------------------------------- engines

SEEN = [
    a_weight_is_written,
    a_weight_is_written_through_data,
    weights_are_loaded,
    global_hooks_come_and_go,
    a_hooks_variable_changes,
    a_forward_is_replaced,
    functions_are_replaced,
    settings_change,
    a_tensor_that_is_no_buffer_changes,
]


@pytest.mark.parametrize("change", SEEN, ids=lambda change: change.__name__)
def test_an_engine_reuses_nothing_after_its_model_changes(change: Change) -> None:
    model = llama()
    with contextlib.closing(change(model)) as steps:
        next(steps)
        with kvpager.Engine(model, memory="8MiB") as engine:
            for _ in range(2):
                engine.generate([PROMPT], **GREEDY)
            reused = engine.stats().scheduler.total_reused_tokens
            assert reused > 0
            next(steps)
            (output,) = engine.generate([PROMPT], **GREEDY)
            stats = engine.stats()
        assert stats.scheduler.total_reused_tokens == reused
        assert (stats.model_changes, stats.unshared) == (1, None)
        assert output.token_ids == tokens(model)


def test_an_engine_begins_again_to_share_after_a_change() -> None:
    model = llama()
    with kvpager.Engine(model, memory="8MiB") as engine:
        for _ in range(2):
            with torch.no_grad():
                model.lm_head.weight.mul_(1.05)
            before = engine.stats().scheduler.total_reused_tokens
            for _ in range(2):
                engine.generate([PROMPT], **GREEDY)
            assert engine.stats().scheduler.total_reused_tokens > before


class BetweenSteps:
    """Does something once, after a step of a request."""

    def __init__(self, do: Callable[[], object]) -> None:
        self._do = do
        self.done = threading.Event()

    def __call__(self, record: Any) -> None:
        if not self.done.is_set() and record.stats.scheduler.num_running:
            self._do()
            self.done.set()


class AtSteps(transformers.LogitsProcessor, transformers.StoppingCriteria):
    """A processor, criterion and streamer of the caller's that does something at two steps."""

    def __init__(self, do: Callable[[bool], object], length: int) -> None:
        self._do, self._length = do, length

    def __call__(self, ids: torch.Tensor, scores: Any) -> Any:
        step = ids.shape[1] - self._length
        if step in (3, 4):
            self._do(step == 3)
        return scores if isinstance(scores, torch.Tensor) else torch.zeros(len(ids)).bool()


class StreamsAt(transformers.generation.streamers.BaseStreamer):
    def __init__(self, do: Callable[[bool], object]) -> None:
        self._do, self._steps = do, 0

    def put(self, value: torch.Tensor) -> None:
        self._steps += 1
        if self._steps in (4, 5):
            self._do(self._steps == 4)

    def end(self) -> None:
        pass


def scaled(model: Any, on: bool) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 4 if on else 0.25


def written(model: Any, on: bool) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(4 if on else 0.25)


def adapted(model: Any, on: bool) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.set_adapter("one" if on else "two")


def with_adapters() -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(llama(), config, adapter_name="one")
    tuned.add_adapter("two", config)
    tuned.set_adapter("two")
    return tuned.eval().get_base_model()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT's
@pytest.mark.parametrize("by", ["processor", "criterion", "streamer"])
@pytest.mark.parametrize("switch", [scaled, written, adapted], ids=lambda f: f.__name__)
def test_a_reply_during_which_the_model_changed_is_not_kept(switch: Any, by: str) -> None:
    model = with_adapters() if switch is adapted else llama()
    do = functools.partial(switch, model)
    at_steps = AtSteps(do, IDS.shape[1])
    hooked: dict[str, Any] = {
        "processor": {"logits_processor": transformers.LogitsProcessorList([at_steps])},
        "criterion": {"stopping_criteria": transformers.StoppingCriteriaList([at_steps])},
        "streamer": {"streamer": StreamsAt(do)},
    }[by]
    options = {**GREEDY, "max_new_tokens": 12}
    with kvpager.patch(model, prefix_cache=True, block_size=1) as patch:
        reply = model.generate(IDS, **options, **hooked)
        again = model.generate(reply, **options)
        assert patch.stats().prefix_hit_tokens <= IDS.shape[1]
    assert torch.equal(again, model.generate(reply, **options))


def test_a_switch_that_transformers_makes_for_decoding_keeps_replies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama()

    @contextlib.contextmanager
    def optimised(self: Any) -> Iterator[None]:
        with replaced(self.config, "hidden_act", "as on a GPU"):
            yield

    name = "_optimize_model_for_decode"  # which chooses how experts are computed
    monkeypatch.setattr(transformers.GenerationMixin, name, optimised, raising=False)
    with kvpager.patch(model, prefix_cache=True, block_size=1) as patch:
        reply = model.generate(IDS, **GREEDY)
        for turn in (1, 2):
            model.generate(reply, **GREEDY)
            assert patch.stats().prefix_hit_tokens == turn * (reply.shape[1] - 1)


def test_blocks_of_a_request_are_private_after_a_change() -> None:
    model = llama()

    def write() -> None:
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)

    do = BetweenSteps(write)
    with kvpager.Engine(model, memory="8MiB", on_step=do) as engine:
        (output,) = engine.generate([PROMPT], **{**GREEDY, "max_new_tokens": 40})
        assert do.done.is_set()
        assert len(output.token_ids) == 40  # it goes on
        prompt = PROMPT + output.token_ids
        (after,) = engine.generate([prompt], **GREEDY)
        assert engine.stats().scheduler.total_reused_tokens == 0
        assert engine.stats().model_changes == 1
    expected = model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :]
    assert after.token_ids == expected.tolist()


def test_an_undone_change_is_noticed_during_a_request() -> None:
    model = llama()
    steps: list[int] = []

    def toggle(record: Any) -> None:
        steps.append(record.tokens)
        if len(steps) in (3, 30):  # there, and back again
            for layer in model.model.layers:
                layer.self_attn.scaling *= 2 if len(steps) == 3 else 0.5

    with kvpager.Engine(model, memory="8MiB", on_step=toggle) as engine:
        (output,) = engine.generate([PROMPT], **{**GREEDY, "max_new_tokens": 60})
        prompt = PROMPT + output.token_ids
        (after,) = engine.generate([prompt], **GREEDY)
        assert engine.stats().scheduler.total_reused_tokens == 0
    expected = model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :]
    assert after.token_ids == expected.tolist()


def test_a_session_of_generate_batch_notices_a_change() -> None:
    model = llama()
    with kvpager.patch(model, prefix_cache=True) as patch:
        manager = model.init_continuous_batching(
            generation_config=transformers.GenerationConfig(**GREEDY)
        )
        manager.start()
        try:
            replies = []
            for seed in (None, 5):
                if seed is not None:
                    model.load_state_dict(llama(seed=seed).state_dict())
                name = manager.add_request(PROMPT)
                replies.append(manager.get_result(name, timeout=60).generated_tokens)
            opaque_hook(model)
            manager.get_result(manager.add_request(PROMPT), timeout=60)
            reason = "prompts not shared, the model may change undetected (a list_iterator may"
            assert reason in patch.report()
        finally:
            manager.stop(block=True)
        del manager
        assert reason in patch.report()
    assert replies == [tokens(llama()), tokens(llama(seed=5))]


def test_an_engine_notices_an_uncounted_write_while_requests_wait() -> None:
    model, other = llama(), llama(seed=1)

    def write() -> None:
        for weight, new in zip(model.parameters(), other.parameters(), strict=True):
            weight.data.copy_(new)  # which torch does not count

    do = BetweenSteps(write)
    with kvpager.Engine(model, memory="8MiB", max_num_seqs=1, on_step=do) as engine:
        streams = [
            engine.submit(PROMPT, **GREEDY),  # computed before the write, in part
            engine.submit(PROMPT, **GREEDY),
        ]
        _, after = (stream.result().token_ids for stream in streams)
        assert do.done.is_set()
    expected = model.generate(torch.tensor([PROMPT]), **GREEDY)[0, len(PROMPT) :]
    assert after == expected.tolist()


def test_errors_of_signal_handlers_are_not_blamed_on_models() -> None:
    class Late(TimeoutError):
        pass

    def late(*_: object) -> None:
        raise Late

    watch, genuine = ModelWatch(model := llama()), fingerprint._Snapshot.same
    state = watch.look()

    def same(noted: Any, samples: bool) -> bool:
        signal.raise_signal(signal.SIGALRM)
        return genuine(noted, samples)

    before = signal.signal(signal.SIGALRM, late)
    try:
        with replaced(fingerprint._Snapshot, "same", same), pytest.raises(Late):
            watch.look()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert watch.look() == state
    del model
