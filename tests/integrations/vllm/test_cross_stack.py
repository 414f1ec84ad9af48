"""vLLM and another stack over one store: names, bytes, the probe, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvpager.storage.keys import KeyContext, content_keys
from kvpager.storage.tiers.agreement import agree, probe_prompt, probe_request
from kvpager.storage.tiers.seals import Digest, namespace_secret
from tests.support.dict_store import DictStore
from tests.support.vllm_cross_stack import PAGE_BYTES, SharingEngine, common, computed
from tests.support.vllm_parts import cross_stack, interface, offloading_config, options
from tests.support.vllm_steps import SHAPE, Group

Make = Callable[..., SharingEngine]
PROMPT = [100 + number % 90 for number in range(200)]
FULL = 192  # the tokens of its full blocks of 32 and of 64


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make engines that are closed, and hold nothing in the end."""
    with ExitStack() as stack:

        def made(*args: Any, probe: bool = True, **settings: Any) -> SharingEngine:
            engine = SharingEngine(tmp_path, *args, **settings)
            stack.callback(engine.close)
            if probe:
                engine.serve(probe_request())
            return engine

        yield made


def store_of(per_chunk: int = 1) -> DictStore:
    return DictStore(PAGE_BYTES * per_chunk)


def keys_of(model: str, per_chunk: int = 1, salt: str | None = None) -> list[bytes]:
    """Return the keys of PROMPT as `Tiering` makes them for transformers."""
    layout = common(per_chunk).layout
    secret = namespace_secret(Digest.master, salt)
    context = KeyContext(layout.text, model, secret, None)
    return content_keys(PROMPT, common(per_chunk).block_size, context)


def join(store: DictStore, per_chunk: int = 1) -> str:
    """Run the self-test of another stack; return the model's name in its keys."""
    blocks = computed(probe_prompt().tolist(), common(per_chunk).block_size)
    return agree([store], common(per_chunk), "m", blocks).model


@pytest.mark.parametrize("per_chunk", [1, 2])
@pytest.mark.parametrize("step_tokens", [1000, 48])
def test_another_stack_finds_what_vllm_computed(
    make: Make, per_chunk: int, step_tokens: int
) -> None:
    store = store_of(per_chunk)
    engine = make(store, per_chunk=per_chunk)
    assert engine.serve(PROMPT, step_tokens=step_tokens) == 0
    engine.settle()
    keys = keys_of(join(store, per_chunk), per_chunk)
    assert store.find(keys) == len(keys)
    found = np.array([np.frombuffer(store.blocks[key], np.uint8) for key in keys])
    assert np.array_equal(found, computed(PROMPT, common(per_chunk).block_size))


@pytest.mark.parametrize("per_chunk", [1, 2])
def test_vllm_loads_what_another_stack_computed(make: Make, per_chunk: int) -> None:
    store = store_of(per_chunk)
    keys = keys_of(join(store, per_chunk), per_chunk)
    blocks = computed(PROMPT, common(per_chunk).block_size)
    store.save(keys, [memoryview(block) for block in blocks], 0)
    engine = make(store, per_chunk=per_chunk)
    assert engine.serve(PROMPT) == FULL
    assert engine.num_compared == FULL // 32  # pages equal those that it computes itself


def test_a_request_that_began_before_the_probe_is_not_shared(make: Make) -> None:
    store = store_of()
    engine = make(store, probe=False)
    early = engine.arrive(PROMPT)
    engine.admit(early, engine.match(early) or 0)
    engine.step((early, 100))
    engine.serve(probe_request())
    engine.step((early, 100))
    engine.settle()
    assert store.find(keys_of(join(store))) == 0


def test_a_salt_is_a_namespace(make: Make) -> None:
    store = store_of()
    model = join(store)
    blocks = [memoryview(block) for block in computed(PROMPT, 32)]
    store.save(keys_of(model, salt="alice"), blocks, 0)
    engine = make(store)
    salts = ("alice", "bob", None, "bob", "")
    assert [engine.serve(PROMPT, cache_salt=salt) for salt in salts] == [FULL, 0, 0, FULL, FULL]
    engine.settle()
    assert store.find(keys_of(model, salt="bob")) == 6


def test_replies_continue_the_chain_of_keys(make: Make) -> None:
    store = store_of()
    engine = make(store, offload_prompt_only=False)
    request = engine.arrive(PROMPT[:40])
    engine.admit(request, engine.match(request) or 0)
    engine.step((request, 40))
    for token in PROMPT[40:]:
        request.tokens.append(token)
        engine._extend(request, 0, request.num_tokens)
        engine.step((request, 1))
    engine.settle()
    assert store.find(keys_of(join(store))) == 6


@pytest.mark.parametrize(
    "settings", [{"mm_features": [object()]}, {"prompt_embeds": object()}], ids=["image", "embeds"]
)
def test_prompts_that_tokens_do_not_name_are_not_shared(make: Make, settings: Any) -> None:
    store = store_of()
    engine = make(store)
    num_blocks = len(store.blocks)
    assert engine.serve(PROMPT, **settings) == engine.serve(PROMPT, **settings) == 0
    engine.settle()
    assert len(store.blocks) == num_blocks


def test_adapters_have_blocks_of_their_own(make: Make) -> None:
    store = store_of()
    engine = make(store)
    engine.serve(PROMPT)
    one, other = ({"lora_request": SimpleNamespace(lora_name=name)} for name in "ab")
    assert [engine.serve(PROMPT, **each) for each in (one, one, other)] == [0, FULL, 0]
    engine.settle()
    assert len(store.blocks) == 16 + 3 * 6


# ---------------------------------------------------------------- the probe


def test_before_the_probe_nothing_is_read_or_saved(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_of()
    keys = keys_of(join(store))
    store.save(keys, [memoryview(block) for block in computed(PROMPT, 32)], 0)
    before = store.num_loads, store.num_saves
    asked = list[Any]()
    store.find = lambda keys: asked.append(keys) or 0  # type: ignore[method-assign]
    engine = make(store, probe=False)
    assert engine.serve(PROMPT) == 0
    engine.settle()
    assert (store.num_loads, store.num_saves, asked) == (*before, [])
    assert "shares no blocks until it has computed the probe" in caplog.text


@pytest.mark.parametrize("step_tokens", [1000, 100])
def test_the_probe_may_take_several_steps(make: Make, step_tokens: int) -> None:
    store = store_of()
    model = join(store)
    store.save(keys_of(model), [memoryview(block) for block in computed(PROMPT, 32)], 0)
    engine = make(store, probe=False)
    engine.serve(probe_request(), step_tokens=step_tokens)
    assert engine.serve(PROMPT) == FULL


def test_a_probe_with_a_salt_is_a_prompt_like_others(make: Make) -> None:
    store = store_of()
    engine = make(store, probe=False)
    engine.serve(probe_request(), cache_salt="alice")
    assert not engine.manager.lower.is_open


def test_a_spoilt_run_shares_nothing(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    store = store_of()
    model = join(store)
    store.save(keys_of(model), [memoryview(block) for block in computed(PROMPT, 32)], 0)
    kept = dict(store.blocks)
    engine = make(store, spoil=lambda numbers: numbers[:, :, ::-1])
    assert engine.serve(PROMPT) == 0
    engine.settle()
    [warning] = [each for each in caplog.records if "is off" in each.getMessage()]
    assert warning.levelno == logging.WARNING
    assert {key: store.blocks[key] for key in kept} == kept
    assert len(store.blocks) == len(kept) + 6  # its own names: hits for itself alone


def test_host_memory_must_have_room_for_the_probe(make: Make) -> None:
    with pytest.raises(ValueError, match="room for 15 of 16 blocks"):
        make(store_of(), num_slots=15)


# ---------------------------------------------------------------- what is refused


FULL_GROUP = Group(32)


def configs(
    group: Group = FULL_GROUP, max_model_len: int = 1024, rope: Any = None, **settings: Any
) -> tuple[Any, Any, Any]:
    name = settings.pop("layer_name", "layers.0")
    part = SimpleNamespace(
        group_id=0, tokens_per_block=group.block_tokens, layer_names=(name, "layers.1")
    )
    dtype = settings.pop("cache_dtype", "float32")
    config = offloading_config(
        groups=(part,),
        **{
            "worker_kv_bytes_per_block": 2 * PAGE_BYTES,
            "cache": SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=1),
            **settings,
        },
    )
    config.model.dtype = dtype
    model = SimpleNamespace(
        max_model_len=max_model_len, hf_text_config=SimpleNamespace(rope_parameters=rope)
    )
    known = SimpleNamespace(kv_cache_spec=group.spec, layer_names=part.layer_names)
    groups = SimpleNamespace(kv_cache_groups=[known] * len(config.groups))
    return config, SimpleNamespace(model_config=model), groups


def test_the_layout_is_that_of_the_models_layers() -> None:
    found = cross_stack.common_layout_of(*configs())
    assert found == (32, ((2, 4, 4),) * 2, "float32")


PARALLEL = SimpleNamespace(world_size=2)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"group": Group(32, 128)}, "layers without full attention"),
        ({"group": Group(96), "worker_kv_bytes_per_block": 6 * PAGE_BYTES}, "96 tokens, expected"),
        ({"parallel": PARALLEL}, "several workers"),
        ({"cache_dtype": "fp8_e4m3"}, "keys and values are fp8_e4m3"),
        ({"worker_kv_bytes_per_block": 2 * PAGE_BYTES + 64}, "more than keys and values"),
        ({"layer_name": "layers.7"}, "not in order"),
        ({"enable_kv_cache_events": True}, "KV events have vLLM's hashes"),
        ({"max_model_len": 512}, "above 512"),
        ({"rope": {"rope_type": "longrope"}}, "depends on the length"),
    ],
)
def test_engines_that_cannot_share_are_refused(settings: Any, why: str) -> None:
    with pytest.raises((NotImplementedError, ValueError), match=f"cross_stack: .*{why}"):
        cross_stack.common_layout_of(*configs(**settings))


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("MLAAttentionSpec", {}),
        ("FullAttentionSpec", {"sliding_window": 128}),  # as vLLM keeps windows without its hybrid
        ("FullAttentionSpec", {"attention_chunk_size": 128}),
    ],
)
def test_other_kinds_of_attention_are_refused(kind: str, part: Any) -> None:
    given = configs()
    spec = object.__new__(getattr(interface, kind))
    spec.__dict__.update({"sliding_window": None, **SHAPE, **part})
    given[2].kv_cache_groups[0].kv_cache_spec = spec
    with pytest.raises(NotImplementedError, match="without full attention"):
        cross_stack.common_layout_of(*given)


DISK = "disk:/kv?capacity=1GiB"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"tiers": DISK, "model_id": "m"}, "expected synchronous=True"),
        ({"tiers": DISK, "synchronous": True}, "Pass model_id="),
        ({"model_id": "m", "synchronous": True}, "no other process reads the tiers"),
        ({"tiers": "host:1GiB", "model_id": "m", "synchronous": True}, "no other process reads"),
    ],
)
def test_settings_that_cannot_share_are_refused(settings: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        options.offload("1GiB", cross_stack=True, **settings)


def test_vllms_own_connector_is_refused() -> None:
    from tests.support.vllm_parts import spec

    extra = {"cross_stack": True, "tiers": [DISK], "model_id": "m"}
    with pytest.raises(ValueError, match='expected kv_connector="KvpagerConnector"'):
        spec.KvpagerOffloadingSpec(offloading_config(extra))
