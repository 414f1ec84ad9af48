"""Under `torch.compile` a cache stays paged: the same tokens, no graph breaks, few graphs."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.support.cache_name import cache_of, passing

transformers = pytest.importorskip("transformers")

from torch._dynamo.utils import counters  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402
from transformers.modeling_utils import AttentionInterface  # noqa: E402

import kvpager  # noqa: E402
from kvpager.integrations.huggingface.attention.functions import attention_forward  # noqa: E402
from kvpager.integrations.huggingface.cache.layers import PagedLayer  # noqa: E402
from tests.support import tiny_models  # noqa: E402

# What torch warns of as it compiles is not ours.
pytestmark = pytest.mark.filterwarnings("default")

# As many rows each, so that one graph serves both.
MODES: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
}
needs_a_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)
BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=needs_a_compiler)]


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_models.tiny_model("llama")


@pytest.fixture
def short_llama(llama: PreTrainedModel) -> PreTrainedModel:
    """One layer only, for what takes long to compile."""
    llama.model.layers = llama.model.layers[:1]
    llama.config.num_hidden_layers = 1
    return llama


def compiled(model: PreTrainedModel, backend: str = "aot_eager") -> PreTrainedModel:
    """`model` with its forward compiled, and all of it in one graph or an error."""
    model = copy.deepcopy(model)
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    return model


def compile_attention(model: PreTrainedModel, backend: str) -> None:
    """Compile what reads and writes the cache, and not all that is around it."""
    for layer in model.model.layers:
        layer.self_attn.forward = torch.compile(layer.self_attn.forward, backend=backend)


def num_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def generate(model: PreTrainedModel, lengths: list[int], **options: Any) -> Any:
    torch.manual_seed(7)
    options = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, **options}
    inputs = tiny_models.prompts(lengths)
    return model.generate(**inputs, return_dict_in_generate=True, **options)


def paged_layers(cache: Any) -> list[PagedLayer]:
    """All of its layers, if they are paged."""
    parts = [cache]
    if not isinstance(cache, kvpager.PagedCache):
        parts = [cache.self_attention_cache, cache.cross_attention_cache]
    layers = [layer for part in parts for layer in part.layers]
    assert all(isinstance(layer, PagedLayer) for layer in layers), layers
    return layers


# ---------------------------------------------------------------- tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("mistral", "aot_eager"),
        ("gemma3", "eager"),
        ("gpt2", "eager"),
        ("deepseek_v3", "eager"),  # it touches keys and values itself
        ("t5", "aot_eager"),
    ],
)
def test_tokens_are_those_of_transformers(name: str, backend: str) -> None:
    plain = tiny_models.tiny_model(name)
    model = compiled(plain, backend)
    lengths = [13, 13] if name == "t5" else [13, 9]
    with kvpager.patch(model) as patch:
        for mode, options in MODES.items():
            found = generate(model, lengths, **options)
            expected = generate(plain, lengths, **options).sequences
            assert torch.equal(found.sequences, expected), mode
            paged_layers(cache_of(found))
        stats = patch.stats()
    assert (stats.in_place_reads > 0) == (name != "deepseek_v3")
    # `eager` runs a graph as it was traced, with its unused reads.
    assert (stats.gathers > 0) == (backend == "eager")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_the_same_tokens(short_llama: PreTrainedModel, backend: str) -> None:
    if backend == "inductor" and torch.__version__.startswith("2.11."):
        pytest.skip("torch 2.11 writes C++ for this model, patched or not, that does not compile")
    expected = generate(short_llama, [13, 9]).sequences
    model = compiled(short_llama, backend)
    with kvpager.patch(model) as patch:
        found = generate(model, [13, 9])
        assert patch.stats().in_place_reads == 5
    assert torch.equal(found.sequences, expected)
    paged_layers(cache_of(found))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_the_attention_kvpager_caps_scores_and_has_sinks(name: str) -> None:
    plain = tiny_models.tiny_model(name, attention="eager")
    expected = generate(plain, [13, 9]).sequences
    model = compiled(plain)
    model.set_attn_implementation("kvpager")
    with kvpager.patch(model) as patch:
        assert torch.equal(generate(model, [13, 9]).sequences, expected)
        assert patch.stats().gathers == 0


@pytest.mark.slow
def test_without_reading_in_place_the_tokens_are_the_same(short_llama: PreTrainedModel) -> None:
    expected = generate(short_llama, [13, 9]).sequences
    model = compiled(short_llama)
    with kvpager.patch(model, in_place=False) as patch:
        assert torch.equal(generate(model, [13, 9]).sequences, expected)
        assert patch.stats().in_place_reads == 0
        assert patch.stats().gathers > 0


@pytest.mark.slow
def test_blocks_behind_a_window_are_given_back() -> None:
    plain = tiny_models.tiny_model("mistral", num_hidden_layers=1)  # a window of 8
    expected = generate(plain, [13], max_new_tokens=30).sequences
    model = compiled(plain)
    with kvpager.patch(model, block_size=4) as patch:
        found = generate(model, [13], max_new_tokens=30)
        assert torch.equal(found.sequences, expected)
        assert patch.stats().num_held_blocks <= 3


@pytest.mark.slow
def test_prompts_are_reused_between_calls(short_llama: PreTrainedModel) -> None:
    expected = generate(short_llama, [40]).sequences
    model = compiled(short_llama, "eager")
    with kvpager.patch(model, prefix_cache=True) as patch:
        for _ in range(2):
            assert torch.equal(generate(model, [40]).sequences, expected)
        assert patch.stats().prefix_hit_tokens >= 32


# ---------------------------------------------------------------- graphs


@pytest.mark.slow
def test_a_graph_serves_every_step_and_every_cache(short_llama: PreTrainedModel) -> None:
    model = compiled(short_llama)
    graphs = []
    with kvpager.patch(model):
        for lengths in ([13, 9], [17, 5], [21, 20], [34, 8]):
            generate(model, lengths, max_new_tokens=30)
            graphs.append(num_graphs())
    # Prompt and step; then prompts of any length. Others take an additional one for the step.
    assert graphs == [2, 3, 3, 3]
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_window_takes_no_more_graphs_than_full_attention() -> None:
    model = compiled(tiny_models.tiny_model("mistral", num_hidden_layers=1), "eager")
    with kvpager.patch(model):
        for lengths in ([13, 9], [17, 5], [21, 20]):
            generate(model, lengths, max_new_tokens=30)
    assert num_graphs() == 3


@pytest.mark.slow
def test_a_fork_is_served_by_the_graph_of_the_original(llama: PreTrainedModel) -> None:
    ids = tiny_models.prompts([13, 13])["input_ids"]
    call = torch.compile(llama, backend="eager", fullgraph=True)
    cache = kvpager.PagedCache(llama.config)
    with torch.no_grad():
        for columns in (ids, ids[:, :1], ids[:, 1:2]):
            call(input_ids=columns, **passing(cache))
        graphs, fork = num_graphs(), copy.deepcopy(cache)
        found = call(input_ids=ids[:, 2:3], **passing(fork)).logits
        call(input_ids=ids[:, 5:6], **passing(cache))
        again = call(input_ids=ids[:, 3:4], **passing(fork)).logits
        whole = llama(input_ids=torch.cat([ids, ids[:, :4]], dim=1)).logits
    assert num_graphs() == graphs
    torch.testing.assert_close(torch.cat([found, again], dim=1), whole[:, -2:], atol=1e-4, rtol=0)


# ---------------------------------------------------------------- whatever else is traced

Model, Cache = PreTrainedModel, kvpager.PagedCache
Program = Callable[[Model, Cache, torch.Tensor], Any]


def two_chunks(model: Model, cache: Cache, ids: torch.Tensor) -> Any:
    chunks = (ids[:, :7], ids[:, 7:])
    return [model(input_ids=chunk, **passing(cache)).logits for chunk in chunks]


def a_cache_that_is_cut(model: Model, cache: Cache, ids: torch.Tensor) -> Any:
    model(input_ids=ids, **passing(cache))
    cache.crop(-4)
    return [model(input_ids=part, **passing(cache)).logits for part in ids.split(6, 1)]


def a_cache_that_begins_anew(model: Model, cache: Cache, ids: torch.Tensor) -> Any:
    model(input_ids=ids, **passing(cache))
    cache.reset()
    return two_chunks(model, cache, ids[:1])


def a_batch_that_is_reordered(model: Model, cache: Cache, ids: torch.Tensor) -> Any:
    model(input_ids=ids, **passing(cache))
    cache.reorder_cache(torch.tensor([1, 1]))
    return model(input_ids=ids[:, :3], **passing(cache)).logits


def keys_that_are_looked_at(model: Model, cache: Cache, ids: torch.Tensor) -> Any:
    model(input_ids=ids, **passing(cache))
    return [tensor * 2 for layer in cache.layers for tensor in (layer.keys, layer.values)]


def a_fork_that_goes_on(model: Model, cache: Cache, ids: torch.Tensor) -> Any:
    model(input_ids=ids, **passing(cache))
    fork = copy.deepcopy(cache)
    model(input_ids=ids[:, :2], **passing(cache))
    return model(input_ids=ids[:, 3:6], **passing(fork)).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        two_chunks,
        a_cache_that_is_cut,
        a_cache_that_begins_anew,
        a_batch_that_is_reordered,
        keys_that_are_looked_at,
        a_fork_that_goes_on,
    ],
)
def test_a_program_gives_what_it_gives_uncompiled(
    short_llama: PreTrainedModel, program: Program
) -> None:
    ids = tiny_models.prompts([12, 12])["input_ids"]
    outputs = []
    for call in (program, torch.compile(program, backend="aot_eager")):
        with torch.no_grad():
            outputs.append(call(short_llama, kvpager.PagedCache(short_llama.config), ids))
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=0)


def test_keys_that_were_stored_before_can_be_looked_at(short_llama: PreTrainedModel) -> None:
    cache = kvpager.PagedCache(short_llama.config)
    with torch.no_grad():
        short_llama(**tiny_models.prompts([13, 13, 13]), **passing(cache))
    cache.batch_select_indices(torch.tensor([2, 0]))
    look = torch.compile(lambda layer: (layer.keys + 1, layer.values + 1), fullgraph=True,
                         backend="aot_eager")  # fmt: skip
    keys, values = look(cache.layers[0])
    assert torch.equal(keys, cache.layers[0].keys + 1)
    assert torch.equal(values, cache.layers[0].values + 1)


@pytest.mark.parametrize("change", ["a cut", "a step"])
def test_keys_show_what_was_there_when_they_were_made(change: str) -> None:
    config = tiny_models.tiny_model("mistral").config  # a window of 8
    states = torch.randn(2, 2, 12, 16, generator=torch.Generator().manual_seed(0))

    def attend_to_older_keys(cache: kvpager.PagedCache) -> torch.Tensor:
        cache.layers[0].activate_past_recording()
        keys, values = cache.update(states, states, 0)
        if change == "a cut":
            cache.crop(-4)
        else:
            cache.layers[0].record_past = False
        cache.update(-states[:, :, :4], states[:, :, :4], 0)
        return attention_forward(torch.nn.Identity(), states, keys, values, None)[0]

    caches = [kvpager.PagedCache(config, block_size=2) for _ in range(2)]
    with torch.no_grad():
        expected = attend_to_older_keys(caches[0])
        found = torch.compile(attend_to_older_keys, backend="aot_eager")(caches[1])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_cache_is_filled_where_nothing_else_is_asked_for(
    short_llama: PreTrainedModel, backend: str
) -> None:
    ids = tiny_models.prompts([13, 13])["input_ids"]

    def fill(cache: kvpager.PagedCache) -> None:
        short_llama.model(input_ids=ids, **passing(cache))

    cache, expected = kvpager.PagedCache(short_llama.config), kvpager.PagedCache(short_llama.config)
    with torch.no_grad():
        torch.compile(fill, backend=backend, fullgraph=True)(cache)
        fill(expected)
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys + 0, other.keys + 0, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.values + 0, other.values + 0, atol=1e-5, rtol=0)


def test_a_torch_that_reports_traces_as_exports_keeps_blocks(
    short_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)  # as in torch 2.11
    ids = tiny_models.prompts([13, 13])["input_ids"]
    cache = kvpager.PagedCache(short_llama.config)
    with torch.no_grad():
        torch.compile(short_llama, backend="eager")(input_ids=ids, **passing(cache))
    assert [layer.num_columns for layer in paged_layers(cache)] == [13]


@pytest.mark.slow
def test_a_graph_break_before_attention_changes_no_token(short_llama: PreTrainedModel) -> None:
    expected = generate(short_llama, [13, 9]).sequences
    with kvpager.patch(short_llama):
        ours = AttentionInterface._global_mapping["sdpa"]

        def breaking(*args: Any, **kwargs: Any) -> Any:
            torch._dynamo.graph_break()
            return ours(*args, **kwargs)

        AttentionInterface.register("sdpa", breaking)
        try:
            compile_attention(short_llama, "eager")
            found = generate(short_llama, [13, 9])
        finally:
            AttentionInterface.register("sdpa", ours)
    assert counters["graph_break"]
    assert torch.equal(found.sequences, expected)
    paged_layers(cache_of(found))


@pytest.mark.slow
def test_a_cache_without_a_configuration_is_paged_as_well(short_llama: PreTrainedModel) -> None:
    ids = tiny_models.prompts([13])["input_ids"]
    call, cache = torch.compile(short_llama, backend="eager"), kvpager.PagedCache()
    with torch.no_grad():
        parts = [call(input_ids=part, **passing(cache)).logits for part in ids.split(7, 1)]
        whole = short_llama(input_ids=ids).logits
    assert len(paged_layers(cache)) == 1
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_cache_made_in_any_grad_mode_works(short_llama: PreTrainedModel) -> None:
    ids = tiny_models.prompts([13])["input_ids"]
    with torch.no_grad():
        whole = short_llama(input_ids=ids).logits
    with torch.inference_mode():
        cache = kvpager.PagedCache(short_llama.config)
    compile_attention(short_llama, "aot_eager")
    with torch.no_grad():
        first = short_llama(input_ids=ids[:, :5], **passing(cache)).logits
    with torch.inference_mode():
        second = short_llama(input_ids=ids[:, 5:], **passing(cache)).logits
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, atol=1e-4, rtol=0)


# ---------------------------------------------------------------- where blocks cannot serve


@pytest.mark.slow
def test_layers_that_need_gradients_leave_their_blocks(short_llama: PreTrainedModel) -> None:
    ids = tiny_models.prompts([13, 13])["input_ids"]

    def gradients(call: Any) -> list[torch.Tensor]:
        cache = kvpager.PagedCache(short_llama.config)
        call(input_ids=ids, **passing(cache)).logits.square().mean().backward()
        assert not cache.paged_layers()
        found = [p.grad for p in short_llama.parameters() if p.grad is not None]
        short_llama.zero_grad()
        return found

    expected = gradients(short_llama)
    compile_attention(short_llama, "aot_eager")
    found = gradients(short_llama)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_cache_that_compiled_code_makes_is_transformers_own(llama: PreTrainedModel) -> None:
    ids = tiny_models.prompts([13])["input_ids"]
    with kvpager.patch(llama), torch.no_grad():
        call = torch.compile(llama, backend="eager", fullgraph=True)
        cache = cache_of(call(input_ids=ids, use_cache=True))
    assert type(cache) is transformers.DynamicCache


@pytest.mark.slow
def test_a_full_pool_leaves_the_cache_unchanged(short_llama: PreTrainedModel) -> None:
    ids = tiny_models.prompts([16, 16])["input_ids"]
    bound = 3 * 16 * 2 * 2 * 16 * 4  # blocks, tokens, keys and values, heads, dims, bytes
    call = torch.compile(short_llama, backend="eager", fullgraph=True)
    cache = kvpager.PagedCache(short_llama.config, memory=bound)
    with torch.no_grad():
        call(input_ids=ids, **passing(cache))
        before = cache.layers[0].keys + 0
        with pytest.raises(kvpager.OutOfBlocks, match="need"):
            call(input_ids=ids[:, :1], **passing(cache))
        assert cache.get_seq_length() == 16
        assert torch.equal(cache.layers[0].keys + 0, before)
        cache.batch_select_indices(torch.tensor([0]))
        found = call(input_ids=ids[:1, :1], **passing(cache)).logits
        whole = short_llama(input_ids=torch.cat([ids[:1], ids[:1, :1]], dim=1)).logits
    torch.testing.assert_close(found[:, 0], whole[:, -1], atol=1e-4, rtol=0)
