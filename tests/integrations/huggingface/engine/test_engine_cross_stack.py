"""`cross_stack=True`: engines and patches share blocks, after a self-test, under common names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvpager
from kvpager import Engine, EngineConfig, KVPagerError
from kvpager.integrations.huggingface.runner.cross_stack import common_layout_of, probe_blocks
from kvpager.integrations.huggingface.runner.model_info import inspect_model
from kvpager.storage.block_storage import BlockStorage
from kvpager.storage.tiers.agreement import PROBE_TOKENS, probe_prompt
from kvpager.storage.tiers.seals import Mac
from tests.support.tiered_engines import (
    DEAR,
    NUM_CACHED,
    ask,
    edited,
    engine_over,
    llama,
    patient_tiering,
    prompt,
    tiering_of,
    without_tiers,
)
from tests.support.tiny_models import tiny_model

SETTINGS: dict[str, Any] = {"model_id": "m", "cross_stack": True}


def disk(folder: Path) -> str:
    return f"disk:{folder / 'kv'}?capacity=64MiB"


def turned() -> Any:
    """A llama with another rotary embedding."""
    rope = {"rope_type": "default", "rope_theta": 1000.0}
    return tiny_model("llama", rope_parameters=rope)


# ---------------------------------------------------------------- sharing


def test_engines_and_patches_share_blocks_under_common_names(tmp_path: Path) -> None:
    tiers = disk(tmp_path)
    want = without_tiers(llama())
    with engine_over(llama(), tiers, **SETTINGS) as engine:
        assert ask(engine).num_cached_tokens == 0
        assert tiering_of(engine).context_of(None, None).model.startswith("m; agrees with ")
    model = llama()
    with (
        patient_tiering(),
        kvpager.patch(model, prefix_cache=True, tiers=tiers, costs=DEAR, **SETTINGS) as patch,
    ):
        ids = torch.tensor([prompt()])
        written = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert written[0, len(ids[0]) :].tolist() == want
        assert patch.tiers is not None
        assert patch.tiers.stats().tiers[0].store.hits >= NUM_CACHED // 16
    with engine_over(llama(), tiers, **SETTINGS) as engine:
        output = ask(engine)
        assert output.token_ids == want
        assert output.cached_tokens_by_tier == {"disk": NUM_CACHED}


@pytest.mark.parametrize("make", [turned, edited])
def test_a_model_that_is_another_one_is_kept_apart(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiers = disk(tmp_path)
    with engine_over(llama(), tiers, **SETTINGS) as engine:
        ask(engine)
    with engine_over(make(), tiers, **SETTINGS) as engine:
        assert ask(engine).num_cached_tokens == 0
    assert "cross_stack is off" in caplog.text
    with engine_over(llama(), tiers, **SETTINGS) as engine:
        assert ask(engine).num_cached_tokens == NUM_CACHED


def test_another_dtype_has_other_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiers = disk(tmp_path)
    with engine_over(llama(), tiers, **SETTINGS) as engine:
        ask(engine)
    with engine_over(llama().to(torch.bfloat16), tiers, **SETTINGS) as engine:
        assert ask(engine).num_cached_tokens == 0
    assert "is off" not in caplog.text


def test_namespaces_stay_apart(tmp_path: Path) -> None:
    tiers = disk(tmp_path)
    with engine_over(llama(), tiers, **SETTINGS) as engine:
        ask(engine, namespace="alice")
    with engine_over(llama(), tiers, **SETTINGS) as engine:
        cached = [ask(engine, namespace=name).num_cached_tokens for name in ("bob", None, "alice")]
    assert cached == [0, 0, NUM_CACHED]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_probe_is_what_an_engine_keeps_in_its_blocks(dtype: str) -> None:
    model = llama().to(getattr(torch, dtype))
    info = inspect_model(model)
    with Engine(model, memory="4MiB") as engine:
        storage = engine._storage
        common = common_layout_of(model, info, storage)
        probe = probe_blocks(model, info, common)
        engine.submit([*probe_prompt().tolist(), 3], max_new_tokens=1).result(60)
        found = engine._core.scheduler.manager.match_prefix(probe_prompt(), blocks=True)
        blocks = storage.tier()[list(found.blocks)].view(torch.uint8).numpy()
    assert len(blocks) == PROBE_TOKENS // 16
    difference = common.difference(probe, blocks)
    assert difference.first < 1e-6
    assert difference.later < (1e-5 if dtype == "float32" else 0.02)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"tiers": ()}, "no other process reads the tiers"),
        ({"tiers": "host:1GiB"}, "no other process reads the tiers"),
        ({"model_id": None}, "Pass model_id="),
        ({"seal": Mac(bytes(16))}, "Leave out seal="),
    ],
)
def test_settings_that_cannot_share_are_refused(settings: Any, why: str) -> None:
    given = {**SETTINGS, "tiers": "disk:/kv?capacity=1GiB", **settings}
    if not given["tiers"]:
        given["model_id"] = None
    with pytest.raises(ValueError, match=f"cross_stack: .*{why}"):
        EngineConfig(**given)


def test_cross_stack_is_a_bool() -> None:
    with pytest.raises(TypeError, match="cross_stack='no'"):
        EngineConfig(cross_stack="no")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "changes", "storage", "why"),
    [
        ("mistral", {"sliding_window": 64}, {}, "sliding windows"),
        ("llama", {"max_position_embeddings": 256}, {}, "it takes 256 tokens"),
        ("llama", {}, {"kv_cache_dtype": "int8"}, "rounds in kvpager's own way"),
        ("llama", {}, {"mode": "reserved"}, "orders blocks by token"),
        ("llama", {}, {"block_size": 1024}, "block_size=1024"),
        ("qwen3_next", {}, {}, "not kept in blocks"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            {},
            "depends on the length",
        ),
    ],
)
def test_models_that_cannot_share_are_refused(
    name: str, changes: Any, storage: Any, why: str
) -> None:
    model = tiny_model(name, **changes)
    info = inspect_model(model)
    shapes = [layer.shape for layer in info.layers]
    made = BlockStorage(2, layers=shapes, dtype=info.dtype, **{"block_size": 16, **storage})
    with pytest.raises(KVPagerError, match=f"cross_stack: .*{why}"):
        common_layout_of(model, info, made)


def test_a_refused_engine_closes_its_stores(tmp_path: Path) -> None:
    with pytest.raises(KVPagerError, match="it takes 256 tokens"):
        Engine(
            tiny_model("llama", max_position_embeddings=256),
            memory="4MiB",
            tiers=disk(tmp_path),
            costs=DEAR,
            **SETTINGS,
        )
    with engine_over(llama(), disk(tmp_path), **SETTINGS) as engine:  # the directory is free
        assert ask(engine).num_cached_tokens == 0
