"""An engine saves prompts in tiers, and another engine finds them there, or computes them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("xxhash")

from kvpager import Engine, EngineConfig  # noqa: E402
from kvpager.errors import EngineClosed, KVPagerError, RequestCancelled  # noqa: E402
from kvpager.storage.tiers.seals import Encrypted, Mac  # noqa: E402
from tests.support.engines import alone, assert_nothing_is_held  # noqa: E402
from tests.support.tiered_engines import (  # noqa: E402
    NUM_CACHED,
    OTHERS,
    adapted,
    ask,
    engine_over,
    evict_found_blocks,
    flip_bits,
    in_a_process,
    llama,
    prompt,
    store_stats,
    without_tiers,
)
from tests.support.tiny_models import tiny_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings(  # of PEFT's
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)
SECRET, OTHER = b"s" * 32, b"t" * 32


@pytest.fixture(scope="module")
def tokens(model: Any) -> list[int]:
    return without_tiers(model)


def saved_by(model: Any, tiers: Any, **options: Any) -> None:
    labels = {"namespace": options.pop("namespace", None)}
    with engine_over(model, tiers, **options) as engine:
        assert ask(engine, **labels).num_cached_tokens == 0


# -------------------------------------------------------------------------------------- hits


def test_a_new_engine_finds_a_prompt_on_disk(model: Any, tokens: list[int], disk: str) -> None:
    saved_by(model, disk)
    with engine_over(llama(), disk) as engine:
        output = ask(engine)
        assert output.token_ids == tokens
        assert output.num_cached_tokens == NUM_CACHED
        assert output.cached_tokens_by_tier == {"disk": NUM_CACHED}
        assert ask(engine).cached_tokens_by_tier == {}  # it is on the device now


def test_an_evicted_prompt_is_found_in_the_host_tier(model: Any, tokens: list[int]) -> None:
    with engine_over(model, ["host:16MiB"], memory="80KiB") as engine:  # room for 10 blocks
        ask(engine)
        for _ in range(20):  # a block that leaves before it could be saved is dropped
            ask(engine, 1)
            ask(engine, 2)
            output = ask(engine)
            assert output.token_ids == tokens
            if output.cached_tokens_by_tier:
                break
    assert output.cached_tokens_by_tier["host"] == output.num_cached_tokens > 0


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize(
    "options", [{}, {"kv_cache_dtype": "int8"}, {"kv_cache_dtype": "fp8_e4m3"}]
)
def test_blocks_are_stored_as_the_pool_holds_them(
    model: Any, disk: str, options: dict[str, Any]
) -> None:
    saved_by(model, disk, **options)
    with engine_over(model, disk, **options) as engine:
        output = ask(engine)
    assert output.num_cached_tokens == NUM_CACHED
    assert output.token_ids == without_tiers(model, **options)


@pytest.mark.parametrize("kv_cache_dtype", [None, "int8", "fp8_e4m3"])
def test_latent_attention_is_found_again(disk: str, kv_cache_dtype: Any) -> None:
    model, options = tiny_model("deepseek_v3"), {"kv_cache_dtype": kv_cache_dtype}
    prompt = [3 + place % 60 for place in range(40)]
    with Engine(model, memory="4MiB", **options) as engine:
        [expected] = engine.generate([prompt], max_new_tokens=6, do_sample=False)
    for num_cached in (0, 32):
        with engine_over(model, disk, **options) as engine:
            [output] = engine.generate([prompt], max_new_tokens=6, do_sample=False)
        assert (output.token_ids, output.num_cached_tokens) == (
            expected.token_ids, num_cached
        )  # fmt: skip


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("kv_cache_dtype", [None, "int8", "fp8_e4m3"])
@pytest.mark.parametrize("name", ["deepseek_v3", "llama"])
def test_blocks_of_any_format_come_back_from_the_host(name: str, kv_cache_dtype: Any) -> None:
    model, options = tiny_model(name), {"kv_cache_dtype": kv_cache_dtype}
    prompts = [[3 + (place * step) % 59 for place in range(100)] for step in range(1, 6)]
    sampling: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with Engine(model, memory="4MiB", prefix_cache=False, **options) as engine:
        expected = [engine.submit(each, **sampling).result(120).token_ids for each in prompts]
        memory = 16 * engine.block_bytes  # two prompts
    with engine_over(model, "host:16MiB", memory=memory, **options) as engine:
        for _ in range(2):
            outputs = [engine.submit(each, **sampling).result(120) for each in prompts]
            assert [output.token_ids for output in outputs] == expected
    assert sum(output.cached_tokens_by_tier.get("host", 0) for output in outputs) > 0


@pytest.mark.parametrize("kind", [Mac, Encrypted])
def test_a_seal_reads_what_an_equal_one_wrote(
    model: Any, tokens: list[int], disk: str, kind: type[Any]
) -> None:
    pytest.importorskip("blake3")
    pytest.importorskip("cryptography")
    saved_by(model, disk, seal=kind(SECRET))
    with pytest.raises(ValueError, match="written with another secret"):
        Engine(model, memory="4MiB", tiers=disk, seal=kind(OTHER))
    with engine_over(model, disk, seal=kind(SECRET)) as engine:
        output = ask(engine)
    assert (output.token_ids, output.num_cached_tokens) == (tokens, NUM_CACHED)


def test_a_named_model_is_found_by_its_name(model: Any, disk: str) -> None:
    saved_by(model, disk, model_id="tiny@1")
    for name, num_cached in (("tiny@2", 0), ("tiny@1", NUM_CACHED)):
        with engine_over(model, disk, model_id=name) as engine:
            assert ask(engine).num_cached_tokens == num_cached


# ------------------------------------------------------------------------------------ misses


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("other", OTHERS)
def test_another_model_or_layout_finds_nothing(model: Any, disk: str, other: str) -> None:
    saved_by(model, disk)
    make, options = OTHERS[other]
    changed = make()
    with engine_over(changed, disk, **options) as engine:
        output = ask(engine)
    assert output.num_cached_tokens == 0
    assert output.token_ids == without_tiers(changed, **options)


def test_an_adapter_finds_its_own_prompts_only(disk: str) -> None:
    saved_by(adapted(1), disk)
    for seed, num_cached in ((2, 0), (1, NUM_CACHED)):
        model = adapted(seed)
        with engine_over(model, disk) as engine:
            output = ask(engine)
        assert output.num_cached_tokens == num_cached
        assert output.token_ids == without_tiers(model)


def test_a_tenant_finds_its_own_prompts_only(model: Any, tokens: list[int], disk: str) -> None:
    saved_by(model, disk, namespace="acme")
    with engine_over(model, disk) as engine:
        for namespace, num_cached in (("other", 0), (None, 0), ("acme", NUM_CACHED)):
            output = ask(engine, namespace=namespace)
            assert (output.token_ids, output.num_cached_tokens) == (tokens, num_cached)


def test_a_flipped_bit_is_not_served(
    model: Any, tokens: list[int], tmp_path: Path, disk: str
) -> None:
    saved_by(model, disk)
    flip_bits(tmp_path / "kv")
    with engine_over(model, disk) as engine:
        output = ask(engine)
        assert store_stats(engine).bad > 0
    assert (output.token_ids, output.num_cached_tokens) == (tokens, 0)


def test_a_block_that_leaves_after_it_was_found_is_computed(
    model: Any, tokens: list[int], disk: str
) -> None:
    saved_by(model, disk)
    with engine_over(model, disk) as engine:
        evict_found_blocks(engine, first=3)
        output = ask(engine)
    assert (output.token_ids, output.num_cached_tokens) == (tokens, 3 * 16)


def test_a_model_that_changes_uses_no_tier_any_more(disk: str) -> None:
    model = llama()
    saved_by(model, disk)
    with engine_over(model, disk) as engine:
        assert ask(engine).num_cached_tokens == NUM_CACHED
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
        outputs = [ask(engine, number) for number in (0, 1)]
        assert store_stats(engine).saved == 0
    assert [output.cached_tokens_by_tier for output in outputs] == [{}, {}]
    assert outputs[0].token_ids == without_tiers(model)


def test_a_forgotten_namespace_is_found_nowhere(model: Any, disk: str) -> None:
    saved_by(model, disk, namespace="acme")
    with engine_over(model, disk) as engine:
        assert ask(engine, namespace="acme").num_cached_tokens == NUM_CACHED
        assert engine.tiers.forget("acme") == NUM_CACHED // 16
        assert ask(engine, namespace="acme").num_cached_tokens == 0
    with pytest.raises(EngineClosed):
        engine.tiers.forget("acme")


def test_a_namespace_keeps_no_more_than_its_limit(model: Any, disk: str) -> None:
    with engine_over(model, disk) as engine:
        engine.tiers.limit("acme", capacity=2 * engine.block_bytes)
        ask(engine, namespace="acme")
    with engine_over(model, disk) as engine:
        assert store_stats(engine).num_blocks <= 2  # before it saves blocks of its own
        assert ask(engine, namespace="acme").num_cached_tokens <= 32


def test_a_warmed_prompt_is_on_the_device(model: Any, tokens: list[int], disk: str) -> None:
    saved_by(model, disk)
    with engine_over(model, disk) as engine:
        assert engine.tiers.warm([prompt()]) == NUM_CACHED
        output = ask(engine)
    assert (output.token_ids, output.num_cached_tokens) == (tokens, NUM_CACHED)
    assert output.cached_tokens_by_tier == {}


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen3_next", "recurrent layers"),
        ("t5", "the encoder's input"),
    ],
)
def test_models_without_tiers_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    message = rf"tiers: .* cannot use them: .*{reason}.*Leave tiers out"
    with pytest.raises(KVPagerError, match=message):
        Engine(tiny_model(name), memory="4MiB", tiers=f"disk:{tmp_path}/kv?capacity=32MiB")
    assert not (tmp_path / "kv").exists()


def test_a_model_with_a_hook_needs_a_name(tmp_path: Path) -> None:
    model, url = llama(), f"disk:{tmp_path}/kv?capacity=32MiB"
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(KVPagerError, match="Pass model_id='name@revision'"):
        Engine(model, memory="4MiB", tiers=url)
    assert not (tmp_path / "kv").exists()
    with Engine(model, memory="4MiB", tiers=url, model_id="mine@1"):
        pass


def test_a_model_whose_changes_go_unnoticed_is_refused(disk: str) -> None:
    model = llama()
    factors = iter([1.0] * 1000)
    model.model.layers[0].mlp.register_forward_hook(lambda *call: call[2] * next(factors))
    with pytest.raises(KVPagerError, match="tiers: LlamaForCausalLM shares no prefixes: "):
        Engine(model, memory="4MiB", tiers=disk, model_id="mine@1")


def test_a_model_that_changes_while_its_engine_is_made_is_refused(
    disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()

    def name_and_change(named: Any) -> str:
        with torch.no_grad():
            named.lm_head.weight.mul_(1.5)
        return "a name"

    monkeypatch.setattr("kvpager.integrations.huggingface.runner.tiers.model_id", name_and_change)
    with pytest.raises(KVPagerError, match="the model changed while its engine was made"):
        Engine(model, memory="4MiB", tiers=disk)
    monkeypatch.undo()
    with Engine(model, memory="4MiB", tiers=disk):  # the directory is in use no more
        pass


def test_an_engine_without_tiers_says_so(model: Any) -> None:
    with Engine(model, memory="4MiB") as engine, pytest.raises(KVPagerError, match="no tiers"):
        engine.tiers.forget("acme")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"seal": object(), "tiers": "host:1MiB"}, TypeError, "seal=.*expected a Seal"),
        ({"model_id": "a@1"}, ValueError, "model_id: of use with tiers only"),
        ({"model_id": "", "tiers": "host:1MiB"}, ValueError, "model_id"),
        ({"tiers": ["host:1MiB", "floppy:a"]}, ValueError, "no store is called 'floppy'"),
        ({"tiers": 5}, TypeError, "tiers=5: expected URLs or stores"),
        ({"tiers": ["host:1MiB"] * 8}, ValueError, "tiers: expected at most 7, got 8"),
        ({"tiers": "host:1MiB", "prefix_cache": False}, ValueError, "Leave out prefix_cache=False"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        EngineConfig(**settings)


def test_a_tier_that_cannot_be_opened_leaves_none_open(model: Any, disk: str) -> None:
    with pytest.raises(ValueError, match="capacity"):
        Engine(model, memory="4MiB", tiers=[disk, "host:lots"])
    with Engine(model, memory="4MiB", tiers=[disk]):
        pass


# --------------------------------------------------------------------------------- processes


def save_in_a_process(disk: str) -> list[int]:
    return ask(Engine(llama(), memory="4MiB", tiers=disk)).token_ids  # closed at exit


def read_in_a_process(disk: str) -> dict[str, Any]:
    with engine_over(llama(), disk) as engine:
        output = ask(engine)
        foreign = ask(engine, namespace="other")
    return {
        "tokens": [output.token_ids, foreign.token_ids],
        "cached": [output.num_cached_tokens, foreign.num_cached_tokens],
    }


@pytest.mark.slow
def test_another_process_finds_a_prompt_on_disk(tokens: list[int], disk: str) -> None:
    assert in_a_process(f"{__name__}:save_in_a_process", disk) == tokens
    read = in_a_process(f"{__name__}:read_in_a_process", disk)
    assert read == {"tokens": [tokens, tokens], "cached": [NUM_CACHED, 0]}


# ----------------------------------------------------------------------------------- traffic


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_traffic_at_random_gives_the_same_tokens(name: str, seed: int, tmp_path: Path) -> None:
    model, chance = tiny_model(name), random.Random(seed)
    fronts = [[chance.randrange(3, 60) for _ in range(90)] for _ in range(4)]
    num_fetched = 0
    for _ in range(6):
        options: dict[str, Any] = {
            "memory": chance.choice(["64KiB", "128KiB", "1MiB"]),
            "host_memory": chance.choice([None, "1MiB"]),
            "max_batch_tokens": chance.choice([16, 64]),
        }
        disk = f"disk:{tmp_path}/kv?capacity=4MiB&admit=always"
        tiers = chance.choice([["host:512KiB", disk], [disk]])
        with engine_over(model, tiers, **options) as engine:
            prompts = [
                [*chance.choice(fronts)[: chance.randrange(20, 91)], chance.randrange(3, 60)]
                for _ in range(16)
            ]
            streams = [engine.submit(each, max_new_tokens=6, do_sample=False) for each in prompts]
            for stream in chance.sample(streams, 3):
                stream.cancel()
            for prompt, stream in zip(prompts, streams, strict=True):
                try:
                    output = stream.result(120)
                except RequestCancelled:
                    continue
                assert output.token_ids == alone(model, prompt, max_new_tokens=6)
                num_fetched += sum(output.cached_tokens_by_tier.values())
            assert_nothing_is_held(engine)
    assert num_fetched > 0
