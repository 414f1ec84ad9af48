"""`patch` puts itself into transformers and takes itself out without a trace."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.cache_name import cache_of, passing

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedModel,
    cache_utils,
)
from transformers.cache_utils import DynamicCache, EncoderDecoderCache  # noqa: E402
from transformers.generation import configuration_utils, utils  # noqa: E402
from transformers.generation.continuous_batching import ContinuousMixin  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface  # noqa: E402

import kvpager  # noqa: E402
from kvpager import PagedCache  # noqa: E402, F401 - from here on the attention kvpager is known
from tests.support import tiny_models  # noqa: E402

PLACES = [
    AttentionInterface,
    AttentionInterface._global_mapping,
    ContinuousMixin,
    ALL_ATTENTION_FUNCTIONS.__dict__,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    cache_utils,
    cache_utils.Cache,
    cache_utils.DynamicLayer,
    cache_utils.DynamicSlidingWindowLayer,
    configuration_utils,
    configuration_utils.GenerationConfig,
    utils,
]


def snapshot() -> list[dict[str, Any]]:
    """Every attribute of every place a patch could have touched, in order."""
    places = [place if isinstance(place, dict) else vars(place) for place in PLACES]
    # `copy` and torch.compile leave notes of their own on what they meet.
    theirs = ("__slotnames__", "__builtins_dict__", "__import_", "__resume_at_")
    return [{k: v for k, v in place.items() if not k.startswith(theirs)} for place in places]


def assert_unchanged(before: list[dict[str, Any]]) -> None:
    for place, old, new in zip(PLACES, before, snapshot(), strict=True):
        assert list(old) == list(new), place
        for name, value in old.items():
            assert new[name] is value, (place, name)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_models.tiny_model("llama")


@pytest.fixture(autouse=True)
def _transformers_is_left_as_found() -> Iterator[None]:
    before = snapshot()
    yield
    assert_unchanged(before)


def generate(model: PreTrainedModel, **options: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": 8, **options}
    return model.generate(**tiny_models.prompts([13, 9]), return_dict_in_generate=True, **options)


def pages(model: PreTrainedModel) -> bool:
    cache = cache_of(generate(model))
    assert isinstance(cache, DynamicCache)
    return isinstance(cache, kvpager.PagedCache)


# ---------------------------------------------------------------- undoing


def test_undo_restores_every_attribute(llama: PreTrainedModel) -> None:
    before = snapshot()
    patch = kvpager.patch(llama)
    generate(llama)
    patch.undo()
    assert_unchanged(before)


def test_a_patch_changes_only_what_is_documented(llama: PreTrainedModel) -> None:
    before = snapshot()
    with kvpager.patch(llama):
        changed = {
            name
            for old, new in zip(before, snapshot(), strict=True)
            for name in old.keys() | new.keys()
            if old.get(name) is not new.get(name)
        }
    assert changed == {
        "ALL_CACHE_IMPLEMENTATIONS",
        "__init__",
        "_prefill",
        "_prepare_cache_for_generation",
        "_sample",
        "generate",
        "generate_batch",
        "init_continuous_batching",
        "sdpa",
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
    }


def test_wrappers_keep_their_names_and_signatures() -> None:
    functions = [
        (DynamicCache, "__init__"),
        (GenerationMixin, "_prefill"),
        (GenerationMixin, "_sample"),
        (GenerationMixin, "generate"),
        (GenerationMixin, "_prepare_cache_for_generation"),
    ]
    before = [inspect.signature(getattr(owner, name)) for owner, name in functions]
    with kvpager.patch():
        after = [inspect.signature(getattr(owner, name)) for owner, name in functions]
    assert before == after


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_nested_patches_may_be_undone_in_any_order(
    llama: PreTrainedModel, order: tuple[int, ...]
) -> None:
    patches = [kvpager.patch(llama), kvpager.patch(block_size=4)]
    for number in order:
        assert pages(llama)
        patches[number].undo()
    assert not pages(llama)


def test_the_last_patch_serves_the_model(llama: PreTrainedModel) -> None:
    with kvpager.patch() as outer, kvpager.patch(llama, block_size=4) as inner:
        cache = cache_of(generate(llama))
        assert (outer.stats().num_held_blocks, inner.stats().num_held_blocks > 0) == (0, True)
        assert cache.memory.budget.block_size == 4


@pytest.mark.parametrize("of_all", [False, True])
def test_a_second_patch_of_a_model_is_refused(llama: PreTrainedModel, of_all: bool) -> None:
    models, call = ([], "") if of_all else ([llama], "model")
    with kvpager.patch(*models, memory="1MiB") as patch:
        with pytest.raises(
            kvpager.KVPagerError,
            match=rf"patched already, by <Patch of .*>\. Call kvpager\.unpatch\({call}\) first\.",
        ):
            kvpager.patch(*models, memory="2MiB")
        assert cache_of(generate(llama)).memory is patch.memory
    kvpager.patch(*models)
    kvpager.unpatch(*models)
    assert not pages(llama)


def test_an_exception_inside_with_undoes_the_patch(llama: PreTrainedModel) -> None:
    before = snapshot()
    with pytest.raises(ZeroDivisionError), kvpager.patch(llama):
        raise ZeroDivisionError
    assert_unchanged(before)


def test_an_exception_in_the_model_leaves_nothing_behind(llama: PreTrainedModel) -> None:
    before = snapshot()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with kvpager.patch(llama) as patch:
        hook = llama.model.layers[1].register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            generate(llama)
        hook.remove()
        assert pages(llama)
        assert patch.stats().num_held_blocks == 0
    assert_unchanged(before)


def test_a_second_undo_does_nothing(llama: PreTrainedModel) -> None:
    patch = kvpager.patch(llama)
    patch.undo()
    with kvpager.patch(llama):
        patch.undo()
        assert pages(llama)
    patch.undo()
    assert not pages(llama)


def test_a_patch_whose_handle_is_lost_can_be_undone(llama: PreTrainedModel) -> None:
    before = snapshot()
    kvpager.patch(llama)
    assert pages(llama)
    kvpager.unpatch(llama)
    assert not pages(llama)
    assert_unchanged(before)
    kvpager.unpatch(llama)  # nothing is left to undo


def test_a_process_wide_patch_is_undone_without_a_model(llama: PreTrainedModel) -> None:
    kvpager.patch()
    with kvpager.patch(llama, block_size=4) as own:
        kvpager.unpatch()
        assert pages(llama)
        assert cache_of(generate(llama)).memory is own.memory
        assert not pages(tiny_models.tiny_model("gpt2"))


def test_undoing_a_model_leaves_the_patches_of_others(llama: PreTrainedModel) -> None:
    other = tiny_models.tiny_model("gpt2")
    with kvpager.patch(other):
        kvpager.patch(llama)
        kvpager.unpatch(llama)
        assert (pages(llama), pages(other)) == (False, True)


def test_an_inner_or_outer_model_names_its_patch(llama: PreTrainedModel) -> None:
    around = torch.nn.ModuleDict({"model": llama})
    kvpager.patch(around)
    kvpager.unpatch(llama)
    assert not pages(llama)
    kvpager.patch(llama)
    kvpager.unpatch(around)
    assert not pages(llama)


def test_one_model_cannot_leave_a_process_wide_patch(llama: PreTrainedModel) -> None:
    with kvpager.patch():
        with pytest.raises(kvpager.KVPagerError, match=r"Call kvpager.unpatch\(\) without a model"):
            kvpager.unpatch(llama)
        assert pages(llama)
    with pytest.raises(TypeError, match="model: expected the model that was patched, got str"):
        kvpager.unpatch("llama")  # type: ignore[arg-type]


def test_a_patch_shows_what_it_serves_and_its_options(llama: PreTrainedModel) -> None:
    with kvpager.patch(llama, memory="4GiB", host_memory="8GiB", prefix_cache=True) as patch:
        assert repr(patch) == (
            "<Patch of LlamaForCausalLM: active, memory=4.0 GiB, block_size=16, "
            "host_memory=8.0 GiB, prefix_cache=True>"
        )
    assert "undone" in repr(patch)
    with kvpager.patch(kv_cache_dtype="int8") as patch:
        assert repr(patch) == "<Patch of every model: active, block_size=16, kv_cache_dtype=int8>"


def test_undo_inside_with_is_fine(llama: PreTrainedModel) -> None:
    with kvpager.patch(llama) as patch:
        patch.undo()


def test_what_another_library_registers_meanwhile_survives_undo(llama: PreTrainedModel) -> None:
    def theirs(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    original = AttentionInterface._global_mapping["sdpa"]
    try:
        with kvpager.patch(llama):
            original = AttentionInterface._global_mapping["sdpa"]
            AttentionInterface.register("sdpa", theirs)
            generate(llama)
        assert AttentionInterface._global_mapping["sdpa"] is theirs
        generate(llama)
    finally:
        AttentionInterface.register("sdpa", inspect.unwrap(original))


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_caches_made_before_undo_still_work_after_it(
    llama: PreTrainedModel, mode: dict[str, Any]
) -> None:
    inputs = tiny_models.prompts([13, 13])
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 8, **mode}

    def continued(first: Any) -> torch.Tensor:
        mask = torch.ones_like(first.sequences)
        cache = copy.deepcopy(cache_of(first))
        return llama.generate(
            first.sequences,
            attention_mask=mask,
            **passing(cache),
            **{**options, "num_beams": 1},
        )

    plain = llama.generate(**inputs, **options, return_dict_in_generate=True)
    with kvpager.patch(llama):
        paged = llama.generate(**inputs, **options, return_dict_in_generate=True)
    if not mode:  # the rows of a beam search's cache are beams, not the sequences returned
        assert torch.equal(continued(paged), continued(plain))
    cache = cache_of(paged)
    cache.reorder_cache(torch.tensor([1, 0, *range(2, len(cache.layers[0].keys))]))
    cache.crop(-3)
    for found, expected in zip(cache, cache_of(plain), strict=True):
        keys = expected[0][:, :, :-3]
        keys = torch.cat([keys[[1, 0]], keys[2:]])
        torch.testing.assert_close(torch.clone(found[0]), keys, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- whom it serves


def test_patching_a_model_does_not_page_another(llama: PreTrainedModel) -> None:
    other = tiny_models.tiny_model("qwen3")
    with kvpager.patch(llama):
        assert pages(llama)
        assert not pages(other)


def test_a_patch_leaves_other_models_of_its_configuration_unpaged(
    llama: PreTrainedModel,
) -> None:
    other = type(llama)(llama.config).eval()
    with kvpager.patch(llama):
        assert not pages(other)


def test_patching_without_a_model_pages_all(llama: PreTrainedModel) -> None:
    other = tiny_models.tiny_model("qwen3")
    with kvpager.patch():
        assert pages(llama)
        assert pages(other)


def test_a_forward_pass_makes_its_cache_paged(llama: PreTrainedModel) -> None:
    inputs = tiny_models.prompts([13, 9])
    with torch.no_grad():
        plain = llama(**inputs, use_cache=True)
        with kvpager.patch(llama):
            paged = llama(**inputs, use_cache=True)
    assert isinstance(cache_of(paged), kvpager.PagedCache)
    torch.testing.assert_close(paged.logits, plain.logits, atol=1e-5, rtol=1e-5)
    for found, expected in zip(cache_of(paged), cache_of(plain), strict=True):
        torch.testing.assert_close(torch.clone(found[0]), expected[0])


def test_subclasses_of_dynamic_cache_are_left_alone() -> None:
    class Theirs(DynamicCache):
        pass

    with kvpager.patch():
        assert type(Theirs()) is Theirs


def test_offloading_caches_are_left_alone() -> None:
    if not torch.cuda.is_available():
        pytest.skip("transformers makes offloading caches only where torch finds a GPU")
    with kvpager.patch():
        assert type(DynamicCache(offloading=True)) is DynamicCache


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
def test_training_gives_the_same_loss_and_gradients(name: str) -> None:
    model = tiny_models.tiny_model(name).train()
    inputs = tiny_models.prompts([13, 9])

    def step() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        torch.manual_seed(5)
        loss = model(**inputs, labels=inputs["input_ids"], use_cache=True).loss
        loss.backward()
        return loss.detach(), [
            copy.deepcopy(p.grad) for p in model.parameters() if p.grad is not None
        ]

    loss, gradients = step()
    with kvpager.patch(model):
        paged_loss, paged_gradients = step()
    assert torch.equal(loss, paged_loss)
    assert len(gradients) == len(paged_gradients) > 0
    assert all(map(torch.equal, gradients, paged_gradients))


def test_gradients_reach_through_the_cache(llama: PreTrainedModel) -> None:
    ids = tiny_models.prompts([12])["input_ids"]

    def gradient() -> torch.Tensor:
        llama.zero_grad()
        first = llama(ids[:, :6], use_cache=True)
        second = llama(ids[:, 6:], **passing(cache_of(first)))
        second.logits.square().sum().backward()
        grad: torch.Tensor = llama.model.layers[0].self_attn.k_proj.weight.grad
        return grad.clone()

    plain = gradient()
    with kvpager.patch(llama):
        assert torch.equal(gradient(), plain)


def test_training_goes_on_from_a_prompt_computed_without_gradients(llama: PreTrainedModel) -> None:
    ids = tiny_models.prompts([12])["input_ids"]

    def gradient() -> torch.Tensor:
        llama.zero_grad()
        with torch.no_grad():
            first = llama(ids[:, :6], use_cache=True)
        second = llama(ids[:, 6:], **passing(cache_of(first)))
        second.logits.square().sum().backward()
        grad: torch.Tensor = llama.model.layers[0].self_attn.q_proj.weight.grad
        return grad.clone()

    plain = gradient()
    with kvpager.patch(llama):
        _assert_near(gradient(), plain)


def _assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_only_the_queries_need_gradients(llama: PreTrainedModel) -> None:
    """Prompt tuning of the query projection: keys and values carry no gradient, queries do."""
    model = copy.deepcopy(llama)
    model.requires_grad_(False)
    query = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    ids = tiny_models.prompts([12])["input_ids"]

    def gradient() -> torch.Tensor:
        query.grad = None
        model(ids, use_cache=True).logits.square().sum().backward()
        assert query.grad is not None
        return query.grad.clone()

    plain = gradient()
    with kvpager.patch(model):
        _assert_near(gradient(), plain)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_compiled_forward_gives_the_same_tokens() -> None:
    model = tiny_models.tiny_model("llama")
    inputs = tiny_models.prompts([13, 13])
    options = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    plain = model.generate(**inputs, **options)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    with kvpager.patch(model):
        assert torch.equal(model.generate(**inputs, **options), plain)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_compiled_model_makes_and_uses_its_own_cache() -> None:
    model = tiny_models.tiny_model("llama")
    ids = tiny_models.prompts([13])["input_ids"]

    def steps(call: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            first = call(input_ids=ids, use_cache=True)
            second = call(input_ids=ids[:, :1], **passing(cache_of(first)))
            third = call(input_ids=ids[:, 1:2], **passing(cache_of(second)))
        return [first.logits, second.logits, third.logits]

    plain = steps(model)
    torch._dynamo.reset()
    with kvpager.patch(model):
        compiled = steps(torch.compile(model, backend="eager"))
    torch._dynamo.reset()
    for found, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 42}, TypeError, "got int"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "got Linear"),
        (
            {"model": "gpt2"},
            TypeError,
            r"Load it: AutoModelForCausalLM\.from_pretrained\('gpt2'\)\.",
        ),
        ({"model": Path("a/b")}, TypeError, r"AutoModelForCausalLM\.from_pretrained\('a/b'\)\."),
        (
            {"model": LlamaForCausalLM},
            TypeError,
            r"Load a model: LlamaForCausalLM\.from_pretrained",
        ),
        ({"model": SimpleNamespace(model=torch.nn.Linear(2, 2))}, TypeError, r"Pass its \.model\."),
        ({"memory": "4 bananas"}, ValueError, "4 bananas"),
        ({"memory": 0}, ValueError, "memory=0"),
        ({"memory": "0 GiB"}, ValueError, "memory"),
        ({"memory": -5}, ValueError, "memory=-5"),
        ({"memory": "-5"}, ValueError, "-5"),
        ({"memory": ""}, ValueError, "memory=''"),
        ({"memory": 1.5}, TypeError, "1.5"),
        ({"memory": True}, TypeError, "True"),
        ({"block_size": 0}, ValueError, "block_size=0"),
        ({"block_size": 3}, ValueError, "power of two"),
        ({"block_size": "16"}, TypeError, "'16'"),
        ({"block_size": 16.0}, TypeError, "16.0"),
        ({"dtype": torch.float64}, ValueError, "float32"),
        ({"dtype": "bfloat16"}, ValueError, "float32"),
        ({"dtype": torch.int8}, ValueError, "int8"),
        ({"dtype": "float33"}, ValueError, "float33"),
        ({"namespace": 5}, TypeError, "namespace=5"),
        ({"in_place": "no"}, TypeError, "in_place='no': expected True or False"),
        ({"in_place": None}, TypeError, "in_place=None"),
        ({"prefix_cache": 1}, TypeError, "prefix_cache=1"),
        ({"prefix_cache": "off"}, TypeError, "prefix_cache='off'"),
        ({"blocksize": 16}, TypeError, "blocksize"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_and_change_nothing(
    llama: PreTrainedModel, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = snapshot()
    with pytest.raises(error, match=message):
        kvpager.patch(**{"model": llama, **arguments})
    assert_unchanged(before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"memory": "4 bananas"}, ValueError, "4 bananas"),
        ({"block_size": 3}, ValueError, "power of two"),
        ({"offloading": "no"}, TypeError, "offloading='no': expected True or False"),
    ],
    ids=str,
)
def test_a_paged_cache_refuses_bad_arguments(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kvpager.PagedCache(**arguments)


@pytest.mark.parametrize("text", ["1gib", "1 GiB", "1024 MiB", "1073741824", 1073741824, "1.0Gib"])
def test_memory_is_read_in_the_usual_spellings(llama: PreTrainedModel, text: int | str) -> None:
    with kvpager.patch(llama, memory=text) as patch:
        assert patch.memory.budget.bound == 1024**3


def test_kvpager_by_name_without_a_patch_is_an_error(
    llama: PreTrainedModel,
) -> None:
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(llama, cache_implementation="kvpager")
