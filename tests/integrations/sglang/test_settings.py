"""What a user sets, what kvpager refuses, and what tells models and layouts apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.sglang_parts import (
    HostPool,
    config_of,
    hicache,
    hicache_of,
    identity,
    interface,
    model_of,
    options,
    pages,
    releases,
    tokens_of,
)

ROOT = Path(__file__).resolve().parents[3]
DISK = "disk:/kv?capacity=1GiB"


# ---------------------------------------------------------------- settings


def test_offload_makes_the_arguments_of_an_engine() -> None:
    made = options.offload(DISK, model_id="b@1", hicache_size=8, prefetch_threshold=64)
    extra = json.loads(made.pop("hicache_storage_backend_extra_config"))
    assert made == {
        "enable_hierarchical_cache": True,
        "hicache_storage_backend": "dynamic",
        "hicache_size": 8,
    }
    assert extra == {
        "backend_name": "kvpager",
        "module_path": "kvpager.integrations.sglang.hicache",
        "class_name": "KvpagerHiCache",
        "interface_v1": 1,
        "tiers": [DISK],
        "model_id": "b@1",
        "prefetch_threshold": 64,
    }
    assert options.Options.of(extra) == options.Options((DISK,), "b@1")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tiers": []}, ValueError, "tiers: expected at least one store"),
        ({"tiers": ["floppy:/a"]}, ValueError, "no store is called 'floppy'"),
        ({"tiers": [3]}, TypeError, "tiers: expected URLs"),
        ({"model_id": ""}, ValueError, "model_id"),
        ({"page_size": 64}, ValueError, "page_size: expected a setting of HiCache"),
        ({"hicache_storage_backend": "file"}, ValueError, "hicache_storage_backend: expected"),
    ],
)
def test_a_bad_setting_is_named(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        options.offload(**{"tiers": DISK, **settings})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"bytes": 5}, "bytes: kvpager has no such setting for SGLang. Use model_id, "),
        ({"interface_v1": 0}, "interface_v1: expected 1"),
    ],
)
def test_bad_json_is_named(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hicache.KvpagerHiCache(config_of(extra=extra))


@pytest.mark.parametrize("version", ["0.5.22", "0.5.24", "0.6.0", "1.0", "0.0.0.dev0", "dev"])
def test_another_release_of_sglang_is_refused(version: str) -> None:
    with pytest.raises(ImportError, match=rf"sglang {version}: .*'sglang>=0.5.23,<0.5.24'"):
        releases.check_release(version)


@pytest.mark.parametrize("version", ["0.5.23", "0.5.23.post1", "0.5.23+cpu"])
def test_a_supported_release_of_sglang_passes(version: str) -> None:
    releases.check_release(version)


def test_missing_sglang_is_named_with_the_way_out() -> None:
    code = (
        "import sys\n"
        "sys.modules['sglang'] = None  # as if it were not installed\n"
        "import kvpager.integrations.sglang\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "pip install 'kvpager[sglang]'" in result.stderr
    assert "torch" not in result.stderr


# ---------------------------------------------------------------- what is refused


def test_other_pools_than_full_attention_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = hicache_of(monkeypatch, pool := HostPool("page_first"))
    made.register_mem_host_pool_v2(pool, interface.PoolName.KV)
    with pytest.raises(NotImplementedError, match="cannot keep SGLang's pool 'swa'"):
        made.register_mem_host_pool_v2(pool, interface.PoolName.SWA)
    made.close()


def test_a_layout_that_cannot_be_described_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int, flat: bool) -> torch.Tensor:
        raise ValueError("Unsupported layout: page_first_kv_split")

    pool = HostPool("page_first")
    pool.layout, pool.get_data_page = "page_first_kv_split", refuse  # type: ignore[method-assign]
    with pytest.raises(NotImplementedError, match=r"page_first_kv_split.*hicache_mem_layout"):
        hicache_of(monkeypatch, pool)


def test_layers_of_a_draft_model_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = HostPool("page_first")
    pool.target_layer_num = pool.layer_num - 1
    with pytest.raises(NotImplementedError, match="1 layers of a draft model"):
        hicache_of(monkeypatch, pool)


def test_heads_split_for_other_ranks_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="tp_lcm_size"):
        hicache.KvpagerHiCache(config_of(should_split_heads=True))


def test_a_shared_store_needs_the_weights_or_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(f"disk:{tmp_path / 'kv'}?capacity=1MiB")
    with pytest.raises(ValueError, match=r"model='a/b': .*model_id="):
        hicache_of(monkeypatch, HostPool("page_first"), config)


# ---------------------------------------------------------------- ranks


def test_each_rank_has_a_directory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = f"disk:{tmp_path / 'kv'}?capacity=1MiB"
    pool, made = HostPool("page_first"), []
    for rank in (0, 1):
        config = config_of(tier, tp_rank=rank, tp_size=2, extra={"model_id": "b@1"})
        made.append(hicache_of(monkeypatch, pool, config))
        assert made[-1].batch_set_v1([f"{rank}"], tokens_of(pool, rank)) == [True]
    assert [each.batch_exists(["1"]) for each in made] == [0, 1]
    for each in made:
        each.close()
    names = sorted(path.name for path in (tmp_path / "kv").iterdir())
    assert names == ["tp0of2-pp0of1-cp0of1", "tp1of2-pp0of1-cp0of1"]


def test_ranks_of_one_server_do_not_get_the_shards_of_others() -> None:
    configs = [config_of("valkey://a", tp_rank=rank, tp_size=2) for rank in (0, 1)]
    assert [hicache.rank_tiers(("valkey://a",), each) for each in configs] == [["valkey://a"]] * 2
    one, other = (fingerprint(config=each) for each in configs)
    assert one != other


@pytest.mark.parametrize("tier", [DISK, "host:1MiB"])
def test_ranks_that_read_what_rank_0_saves_need_a_server(tier: str) -> None:
    config = config_of(tier, tp_rank=1, tp_size=2, is_mla_model=True)
    with pytest.raises(ValueError, match="only rank 0 saves"):
        hicache.rank_tiers((tier,), config)
    shared = config_of("valkey://a", tp_rank=1, tp_size=2, is_mla_model=True)
    first = config_of("valkey://a", tp_rank=0, tp_size=2, is_mla_model=True)
    assert fingerprint(config=shared) == fingerprint(config=first)


# ---------------------------------------------------------------- identity


def fingerprint(
    model_id: str | None = "b@1", *, pool: Any = None, model: Any = None, config: Any = None
) -> bytes:
    looked_at = pages.HostPages(pool or HostPool("page_first"))
    layout = identity.page_layout(config or config_of(), model or model_of(), looked_at, model_id)
    return bytes(layout.fingerprint)


def test_whatever_changes_the_bytes_changes_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = HostPool("page_first")
    moved.start_layer, moved.end_layer = 3, 6
    tagged = HostPool("page_first")
    tagged.storage_format_tag = "packed"  # type: ignore[assignment]
    prints = [
        fingerprint(),
        fingerprint("b@2"),
        fingerprint(model=model_of(quantization="fp8")),
        fingerprint(model=model_of(json_model_override_args='{"rope_theta": 5}')),
        fingerprint(model=model_of(kv_cache_dtype="fp8_e4m3")),
        fingerprint(pool=HostPool("page_first_direct")),
        fingerprint(pool=HostPool("layer_first")),
        fingerprint(pool=HostPool("page_first", page_size=8)),
        fingerprint(pool=HostPool("page_first", dtype=torch.float16)),
        fingerprint(pool=moved),
        fingerprint(pool=tagged),
        fingerprint(config=config_of(tp_size=2)),
        fingerprint(config=config_of(pp_rank=1, pp_size=2)),
    ]
    monkeypatch.setattr(identity, "RELEASE", "0.5.24")
    prints.append(fingerprint())
    assert len(set(prints)) == len(prints)


def test_equal_models_in_other_folders_share(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    models = [model_of(model_path=str(tmp_path / name)) for name in ("one", "two")]
    first, second = (fingerprint(None, model=each) for each in models)
    assert first == second
    (tmp_path / "two" / "model.safetensors").write_bytes(b"WEIGHTS")
    assert fingerprint(None, model=models[1]) != first


def test_served_names_do_not_matter() -> None:
    assert fingerprint(config=config_of(model_name="x")) == fingerprint()
