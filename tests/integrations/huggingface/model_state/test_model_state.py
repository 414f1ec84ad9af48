"""Whether a model is still the one that computed cached keys and values."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402

import kvpager  # noqa: E402
from kvpager.integrations.huggingface.model_state import fingerprint  # noqa: E402
from kvpager.integrations.huggingface.model_state.fingerprint import ModelWatch  # noqa: E402
from tests.support import tiny_models  # noqa: E402
from tests.support.model_changes import (  # noqa: E402
    CHANGES,
    GREEDY,
    IDS,
    PROMPT,
    Change,
    llama,
    mlp,
    opaque_hook,
    tokens,
)

# ---------------------------------------------------------------- changes


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


@pytest.mark.mostly_slow(quick=2)
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


@pytest.mark.mostly_slow(quick=2)
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
