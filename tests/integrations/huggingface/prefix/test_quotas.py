"""Quotas of a patch: how much the calls and the kept prompts of a namespace may take."""

from __future__ import annotations

import copy
import functools
import gc
import re
import threading
from typing import Any

import pytest
import torch

from kvpager.errors import OutOfQuota

transformers = pytest.importorskip("transformers")

import kvpager  # noqa: E402
from tests.support import tiny_models  # noqa: E402
from tests.support.cache_name import cache_of, passing  # noqa: E402

LENGTH = 100
CALL = 7  # blocks of 16 for a prompt and the tokens that follow
KNOWN = 96  # tokens in whole blocks


@functools.cache
def llama() -> Any:
    return tiny_models.tiny_model("llama")


def generate(seed: int, model: Any = None, rows: int = 1, **options: Any) -> Any:
    prompts = tiny_models.prompts([LENGTH] * rows, seed=seed)
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, **options}
    return (model or llama()).generate(**prompts, **options)


@functools.cache
def mistral() -> Any:
    return tiny_models.tiny_model("mistral", sliding_window=64)


def forward(model: Any) -> Any:
    with torch.no_grad():
        return model(**tiny_models.prompts([LENGTH]), use_cache=True)


def of_embeddings(model: Any) -> Any:
    inputs = tiny_models.prompts([LENGTH])
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    return model.generate(inputs_embeds=embeds, **inputs, max_new_tokens=8, do_sample=False)


def padded(model: Any) -> Any:
    inputs = tiny_models.prompts([LENGTH, 20])
    return model.generate(**inputs, max_new_tokens=8, do_sample=False)


UNKEPT: dict[str, tuple[Any, Any]] = {
    "prompt lookup": (llama, lambda model: generate(1, model, prompt_lookup_num_tokens=3)),
    "embeddings": (llama, of_embeddings),
    "bare forward pass": (llama, forward),
    "window": (mistral, lambda model: generate(1, model)),
    "window, beams": (mistral, lambda model: generate(1, model, num_beams=3)),
    "window, samples": (
        mistral,
        lambda model: generate(1, model, do_sample=True, num_return_sequences=2),
    ),
    "window, padded batch": (mistral, padded),
}


def used(patch: Any, namespace: str) -> int:
    """Blocks that a namespace has in the pools of a patch, at the most."""
    return max(pool.manager.quotas.used(namespace) for pool in patch.memory.pools())


def hits(patch: Any, seed: int) -> int:
    """Tokens of a prompt that are known."""
    before = patch.stats().prefix_hit_tokens
    generate(seed)
    return int(patch.stats().prefix_hit_tokens - before)


def test_a_namespace_at_its_quota_evicts_its_own_prompts() -> None:
    with kvpager.patch(llama(), prefix_cache=True, memory="1MiB") as patch:
        patch.quotas["acme"] = 2 * CALL
        with patch.namespace("umbrella"):
            for seed in range(4):
                generate(seed)
        with patch.namespace("acme"):
            for seed in range(6):
                assert torch.equal(generate(seed), generate(seed))
                assert used(patch, "acme") <= 2 * CALL
            assert hits(patch, 5) == KNOWN
            assert hits(patch, 0) == 0
        with patch.namespace("umbrella"):
            assert [hits(patch, seed) for seed in range(4)] == [KNOWN] * 4
        for pool in patch.memory.pools():
            pool.manager.check()


def test_a_call_beyond_its_quota_raises_and_leaves_others_alone() -> None:
    with kvpager.patch(llama(), prefix_cache=True) as patch:
        patch.quotas["acme"] = CALL - 1
        with patch.namespace("umbrella"):
            expected = generate(1)
        with (
            patch.namespace("acme"),
            pytest.raises(OutOfQuota, match=r"namespace 'acme' out of quota: .* allows 6 blocks"),
        ):
            generate(1)
        assert patch.stats().num_held_blocks == 0
        assert patch.stats().num_cached_blocks == CALL - 1
        with patch.namespace("umbrella"):
            assert hits(patch, 1) == KNOWN
        patch.quotas["acme"] = CALL
        with patch.namespace("acme"):
            assert torch.equal(generate(1), expected)


@pytest.mark.parametrize(("quota", "unit"), [(3, ""), ("24KiB", "KiB")])
def test_the_quota_named_in_an_error_suffices_and_is_tight(quota: int | str, unit: str) -> None:
    options: dict[str, Any] = {"num_beams": 3}  # 6 shared blocks, and one of each beam
    expected = generate(1, **options)
    with kvpager.patch(llama(), prefix_cache=True) as patch, patch.namespace("acme"):
        patch.quotas["acme"] = quota
        with pytest.raises(OutOfQuota, match=r"or set host_memory= to offload\.$") as raised:
            generate(1, **options)
        asked = re.search(r"Raise quotas\['acme'\] to '?([\d.]+) ?(\w*)'? or", str(raised.value))
        assert asked is not None
        assert asked[2] == unit
        patch.quotas["acme"] = f"{asked[1]} {unit}" if unit else int(asked[1])
        assert torch.equal(generate(1, **options), expected)
        blocks = patch.memory.pools()[0].manager.quotas.ceiling("acme")
        patch.quotas["acme"] = blocks - 1
        with pytest.raises(OutOfQuota):
            generate(1, **options)


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("call", UNKEPT)
def test_a_quota_bounds_calls_whose_prompts_are_not_kept(call: str) -> None:
    make, run = UNKEPT[call]
    with kvpager.patch(make(), prefix_cache=True) as patch:
        patch.quotas["acme"] = 2
        with patch.namespace("acme"), pytest.raises(OutOfQuota, match="quota 2 allows 2 blocks"):
            run(make())
        assert patch.stats().num_held_blocks == 0
        with patch.namespace("umbrella"):
            run(make())
        patch.quotas["acme"] = 6 * CALL
        with patch.namespace("acme"):
            run(make())


def test_a_quota_bounds_a_compiled_call() -> None:
    model = tiny_models.tiny_model("mistral", sliding_window=64)
    with kvpager.patch(model, prefix_cache=True) as patch, torch.no_grad():
        patch.quotas["acme"] = 2
        compiled = torch.compile(model.forward, backend="eager")
        inputs = tiny_models.prompts([LENGTH])
        with patch.namespace("acme"), pytest.raises(OutOfQuota, match="quota 2 allows 2 blocks"):
            compiled(**inputs, **passing(transformers.DynamicCache(config=model.config)))


def test_a_quota_of_the_namespace_that_patch_was_given_holds() -> None:
    with kvpager.patch(mistral(), prefix_cache=True, namespace="acme") as patch:
        patch.quotas["acme"] = 2
        with pytest.raises(OutOfQuota, match="quota 2 allows 2 blocks"):
            generate(1, mistral())


def test_counting_in_a_quota_does_not_keep_a_prompt() -> None:
    with kvpager.patch(llama(), prefix_cache=True) as patch, patch.namespace("acme"):
        patch.quotas["acme"] = 2 * CALL
        generate(1, prompt_lookup_num_tokens=3)
        assert patch.stats().num_cached_blocks == 0
        assert hits(patch, 1) == 0


@pytest.mark.parametrize("make", [llama, mistral])
def test_a_cache_and_its_copies_count_where_it_began(make: Any) -> None:
    with kvpager.patch(make(), prefix_cache=True) as patch:
        patch.quotas["acme"] = 6 * CALL
        with patch.namespace("acme"):
            first = generate(1, make(), return_dict_in_generate=True)
        patch.quotas["umbrella"] = 1
        before = used(patch, "acme")
        with patch.namespace("umbrella"):
            cache = copy.deepcopy(cache_of(first))
            cache.batch_repeat_interleave(2)
            cache.reorder_cache(torch.tensor([1, 0]))
            make().generate(
                first.sequences.repeat(2, 1), max_new_tokens=20, eos_token_id=None,
                do_sample=False, **passing(cache),
            )  # fmt: skip
        assert used(patch, "acme") > before
        assert used(patch, "umbrella") == 0
        for pool in patch.memory.pools():
            pool.manager.check()


def test_a_quota_may_be_a_size() -> None:
    with kvpager.patch(llama(), prefix_cache=True) as patch:
        patch.quotas["acme"] = "64KiB"  # before there is a pool
        with patch.namespace("acme"):
            for seed in range(3):
                generate(seed)
        (pool,) = patch.memory.pools()
        assert pool.manager.quotas.ceiling("acme") == 2**16 // pool.block_bytes
        patch.quotas["umbrella"] = "128KiB"
        assert pool.manager.quotas.ceiling("umbrella") == 2**17 // pool.block_bytes


def test_a_quota_holds_in_the_pool_of_each_model() -> None:
    gpt2 = tiny_models.tiny_model("gpt2")
    with kvpager.patch(prefix_cache=True) as patch, patch.namespace("acme"):
        generate(1)
        patch.quotas["acme"] = CALL
        for seed in range(3):
            generate(seed)
            generate(seed, gpt2)
            assert used(patch, "acme") == CALL


def test_a_lower_quota_evicts_at_once() -> None:
    with kvpager.patch(llama(), prefix_cache=True) as patch:
        with patch.namespace("acme"):
            for seed in range(3):
                generate(seed)
        patch.quotas["acme"] = CALL
        assert used(patch, "acme") <= CALL
        del patch.quotas["acme"]
        with patch.namespace("acme"):
            for seed in range(3):
                generate(seed)
            assert [hits(patch, seed) for seed in range(3)] == [KNOWN] * 3


def test_a_quota_below_what_is_held_is_refused() -> None:
    with kvpager.patch(llama(), prefix_cache=True) as patch:
        patch.quotas["acme"] = 2 * CALL
        with patch.namespace("acme"):
            held = generate(1, return_dict_in_generate=True)
            with pytest.raises(
                ValueError, match=r"quota of 2 blocks \(16.0 KiB\) for namespace 'acme'"
            ):
                patch.quotas["acme"] = 2
        assert dict(patch.quotas) == {"acme": 2 * CALL}
        assert used(patch, "acme") == CALL
        del held


def test_a_dropped_cache_does_not_count_against_a_quota() -> None:
    with kvpager.patch(llama(), prefix_cache=True) as patch:
        with patch.namespace("acme"):
            output = generate(1, return_dict_in_generate=True)
        with pytest.raises(ValueError, match="its calls, caches and retained prompts hold more"):
            patch.quotas["acme"] = 2
        del output
        gc.collect()
        patch.quotas["acme"] = 2
        assert used(patch, "acme") <= 2


@pytest.mark.parametrize("quota", ["8192TiB", "1000000TiB"])
def test_a_quota_beyond_all_counts_bounds_nothing(quota: str) -> None:
    with kvpager.patch(llama(), prefix_cache=True) as patch, patch.namespace("acme"):
        patch.quotas["acme"] = quota
        generate(1)
        patch.quotas["acme"] = quota
        assert hits(patch, 1) == KNOWN


def generate_lazily() -> Any:
    cache = transformers.DynamicCache()  # without a configuration: layers come one by one
    return generate(1, return_dict_in_generate=True, **passing(cache))


def test_a_size_bounds_a_cache_with_lazy_layers() -> None:
    with kvpager.patch(llama(), prefix_cache=True) as patch:
        patch.quotas["acme"] = "48KiB"  # all blocks of one layer, or 6 blocks of both
        with (
            patch.namespace("acme"),
            pytest.raises(OutOfQuota, match=r"quota='48KiB': .* raise the"),
        ):
            generate_lazily()
        assert patch.stats().num_held_blocks == 0
        patch.quotas["acme"] = "56KiB"
        with patch.namespace("acme"):
            output = generate_lazily()
        assert used(patch, "acme") == CALL
        assert torch.equal(output.sequences, generate(1))


def test_rows_that_outgrow_a_quota_live_in_host_memory() -> None:
    expected = generate(1)
    with kvpager.patch(llama(), prefix_cache=True, host_memory="4MiB") as patch:
        patch.quotas["acme"] = "48KiB"
        with patch.namespace("acme"):
            output = generate_lazily()
        assert torch.equal(output.sequences, expected)
        assert patch.stats().host_held_bytes > 0
        assert used(patch, "acme") <= 6


def test_calls_raise_at_a_quota_below_the_first_block() -> None:
    with kvpager.patch(llama(), prefix_cache=True) as patch, patch.namespace("acme"):
        patch.quotas["acme"] = "100B"
        with pytest.raises(ValueError, match=r"quota='100B': one block takes 8.0 KiB"):
            generate(1)
        patch.quotas["acme"] = CALL
        generate(1)


def test_windowed_rows_beyond_a_quota_live_in_host_memory() -> None:
    expected = generate(1, mistral(), rows=4)
    with kvpager.patch(mistral(), prefix_cache=True, host_memory="4MiB") as patch:
        patch.quotas["acme"] = 2 * CALL
        with patch.namespace("acme"):
            output = generate(1, mistral(), rows=4, return_dict_in_generate=True)
        assert torch.equal(output.sequences, expected)
        assert patch.stats().host_held_bytes > 0
        assert 0 < used(patch, "acme") <= 2 * CALL


def test_rows_beyond_a_quota_live_in_host_memory() -> None:
    expected = generate(1, rows=4)
    with kvpager.patch(llama(), prefix_cache=True, host_memory="4MiB") as patch:
        patch.quotas["acme"] = 2 * CALL + 1
        with patch.namespace("acme"):
            output = generate(1, rows=4, return_dict_in_generate=True)
        assert torch.equal(output.sequences, expected)
        assert patch.stats().host_held_bytes > 0
        assert 0 < used(patch, "acme") <= 2 * CALL + 1


def test_threads_of_two_namespaces_keep_to_their_quotas() -> None:
    plain = [generate(seed) for seed in range(4)]
    failures: list[BaseException] = []

    def calls(patch: Any, namespace: str) -> None:
        try:
            with patch.namespace(namespace):
                for seed in range(4):
                    assert torch.equal(generate(seed), plain[seed])
                    assert used(patch, namespace) <= patch.quotas[namespace]
        except BaseException as error:
            failures.append(error)

    with kvpager.patch(llama(), prefix_cache=True) as patch:
        generate(9)
        patch.quotas.update({"acme": CALL, "umbrella": 3 * CALL})
        threads = [threading.Thread(target=calls, args=(patch, name)) for name in patch.quotas]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        with patch.namespace("acme"):
            assert hits(patch, 0) == 0
        with patch.namespace("umbrella"):
            assert hits(patch, 3) == KNOWN


def test_continuous_batching_has_the_quotas_of_the_patch() -> None:
    config = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1)
    prompt = tiny_models.prompts([LENGTH], seed=1)["input_ids"][0].tolist()
    with kvpager.patch(llama(), prefix_cache=True, memory="1MiB") as patch:
        patch.quotas["acme"] = CALL - 1
        outputs = []
        for namespace in ("acme", "umbrella"):
            with patch.namespace(namespace):
                (output,) = llama().generate_batch([prompt], generation_config=config).values()
                outputs.append(output)
    assert "the quota of its namespace is 6" in outputs[0].error
    assert outputs[1].error is None
    assert len(outputs[1].generated_tokens) == 8


@pytest.mark.parametrize(
    ("namespace", "quota", "error", "message"),
    [
        (None, 3, TypeError, "namespace=None: expected the name"),
        ("", 3, ValueError, 'namespace="": expected at least one character'),
        ("acme", 0, ValueError, "quota=0: expected at least 1"),
        ("acme", 2.5, TypeError, "quota=2.5: expected an int"),
        ("acme", "many", ValueError, "quota='many': expected a size"),
        ("acme", "1KiB", ValueError, "quota='1KiB': one block takes 8.0 KiB"),
    ],
)
def test_a_quota_that_makes_no_sense_is_refused(
    namespace: Any, quota: Any, error: type[Exception], message: str
) -> None:
    with kvpager.patch(llama(), prefix_cache=True) as patch:
        generate(1)
        with pytest.raises(error, match=message):
            patch.quotas[namespace] = quota
        assert len(patch.quotas) == 0


def test_quotas_need_prompts_that_are_kept() -> None:
    with (
        kvpager.patch(llama()) as patch,
        pytest.raises(kvpager.KVPagerError, match="quotas: no pr"),
    ):
        patch.quotas["acme"] = 3
