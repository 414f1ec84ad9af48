"""What a user sets, what kvpager refuses, and what tells models and layouts apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.vllm_parts import (
    HostRows,
    caches_of,
    connector,
    identity,
    interface,
    model_config,
    offloading_config,
    options,
    releases,
    spec,
    synchronous,
)

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def rows_of_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the host memory of specs in the folder of the test."""
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(spec, "HostRows", partial(HostRows, folder=str(folder)))


def spec_of(extra: dict[str, Any] | None = None, **settings: Any) -> Any:
    with interface.set_current_vllm_config(SimpleNamespace(model_config=model_config())):
        return spec.KvpagerOffloadingSpec(offloading_config(extra, **settings))


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("synchronous", [False, True])
def test_offload_names_a_connector_of_the_package(synchronous: bool) -> None:
    made = options.offload(
        "8GiB", tiers="disk:/kv?capacity=1GiB", blocks_per_chunk=4, synchronous=synchronous
    )
    assert made.kv_connector_module_path == "kvpager.integrations.vllm"
    names = {False: "KvpagerOffloadingConnector", True: "KvpagerConnector"}
    assert made.kv_connector == names[synchronous]
    assert hasattr(sys.modules[made.kv_connector_module_path], made.kv_connector)
    assert made.kv_role == "kv_both"
    extra = json.loads(json.dumps(made.kv_connector_extra_config))  # for `vllm serve`
    assert (extra["host_memory"], extra["blocks_per_chunk"]) == ("8GiB", 4)
    assert extra["tiers"] == ["disk:/kv?capacity=1GiB"]
    assert ("spec_name" in extra) is not synchronous


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"host_memory": "8 bananas"}, ValueError, "host_memory"),
        ({"host_memory": None}, TypeError, "host_memory: expected bytes"),
        ({"tiers": ["floppy:/a"]}, ValueError, "no store is called 'floppy'"),
        ({"tiers": [3]}, TypeError, "tiers: expected URLs"),
        ({"eviction": "random"}, ValueError, "eviction='random'"),
        ({"model_id": ""}, ValueError, "model_id"),
        ({"cpu_bytes_to_use": 5}, ValueError, "cpu_bytes_to_use: kvpager has no such setting"),
        ({"synchronous": "no"}, TypeError, "synchronous='no': expected True or False"),
        ({"canonical_layout": True}, ValueError, "canonical_layout: kvpager has no such setting"),
    ],
)
def test_a_bad_setting_is_named(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        options.offload(**{"host_memory": "1MiB", **settings})


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0", "dev"])
def test_another_release_of_vllm_is_refused(version: str) -> None:
    with pytest.raises(ImportError, match=rf"vllm {version}: .*Install 'vllm>=0.32,<0.34'"):
        releases.check_release(version)


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1+cpu", "0.32.1.dev3"])
def test_a_supported_release_of_vllm_passes(version: str) -> None:
    releases.check_release(version)


def test_missing_vllm_is_named_with_the_way_out() -> None:
    code = (
        "import sys\n"
        "sys.modules['vllm'] = None  # as if it were not installed\n"
        "import kvpager.integrations.vllm\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "pip install 'kvpager[vllm]'" in result.stderr
    assert "torch" not in result.stderr


def test_a_wrong_release_is_one_error_at_the_import() -> None:
    code = (
        "from tests.support.vllm_stand_ins import installed\n"
        "with installed():\n"
        "    import vllm\n"
        "    vllm.__version__ = '0.34.1'\n"
        "    import kvpager.integrations.vllm\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stderr.splitlines()[-1] == (
        "ImportError: vllm 0.34.1: kvpager needs another release. Install 'vllm>=0.32,<0.34'."
    )


# ---------------------------------------------------------------- the connector


def groups(*specs: Any) -> Any:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=each) for each in specs])


def engine(*, enable_prefix_caching: bool = True) -> Any:
    """Return the configuration of an engine."""
    cache = SimpleNamespace(enable_prefix_caching=enable_prefix_caching)
    return SimpleNamespace(kv_transfer_config=SimpleNamespace(), cache_config=cache)


class MambaSpec: ...


def made(kind: Callable[..., Any]) -> Any:
    return object.__new__(kind)


def test_a_kind_of_layer_that_cannot_be_kept_is_refused() -> None:
    full = made(interface.FullAttentionSpec)
    nested = made(interface.UniformTypeKVCacheSpecs)
    nested.__dict__["kv_cache_specs"] = {"a": full, "b": MambaSpec()}
    for bad in (MambaSpec(), nested):
        for kind in (connector.KvpagerOffloadingConnector, synchronous.KvpagerConnector):
            with pytest.raises(NotImplementedError, match="layers of vLLM's kind MambaSpec"):
                kind(engine(), None, groups(full, bad))


def test_a_kind_of_layer_that_only_extends_a_known_one_is_refused() -> None:
    class RSWASpec(interface.FullAttentionSpec): ...  # type: ignore[misc, name-defined]

    with pytest.raises(NotImplementedError, match="kind RSWASpec"):
        connector.check_engine(engine(), groups(made(RSWASpec)))
    connector.check_engine(engine(), groups(made(interface.MLAAttentionSpec)))


def test_an_engine_without_a_prefix_cache_is_refused() -> None:
    full = made(interface.FullAttentionSpec)
    for kind in (connector.KvpagerOffloadingConnector, synchronous.KvpagerConnector):
        with pytest.raises(NotImplementedError, match="enable_prefix_caching=False"):
            kind(engine(enable_prefix_caching=False), None, groups(full))


def test_a_spec_without_the_connector_is_refused() -> None:
    with pytest.raises(ValueError, match='expected "KvpagerOffloadingConnector"'):
        spec.KvpagerOffloadingSpec(offloading_config())


# ---------------------------------------------------------------- the spec


def test_a_chunk_takes_whole_pages_of_host_memory() -> None:
    manager = spec_of({"host_memory": "64KiB"}).get_manager()
    assert manager._tier.num_slots == 8
    assert manager._rows.rows.shape == (8, 8192)


@pytest.mark.parametrize("worker_first", [True, False])
def test_manager_and_worker_of_one_engine_share_rows(worker_first: bool) -> None:
    each = spec_of()
    if worker_first:  # as vLLM does
        worker = each.get_worker(caches_of([[0]], 4, 3000))
        manager = each.get_manager()
    else:
        manager = each.get_manager()
        worker = each.get_worker(caches_of([[0]], 4, 3000))
    assert manager._rows.is_complete
    worker._rows[:] = 3
    assert manager._rows.rows[:, :6000].all()


def test_host_memory_without_room_for_a_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match=r"host_memory=4.0 KiB: .* at least 8.0 KiB"):
        spec_of({"host_memory": "4KiB"})


def test_stores_of_others_need_a_model_with_a_name(tmp_path: Path) -> None:
    shared = {"tiers": [f"disk:{tmp_path / 'kv'}?capacity=1MiB"]}
    with pytest.raises(ValueError, match=r'offload\(..., model_id="NAME@REVISION"\)'):
        spec_of(shared).get_manager()
    manager = spec_of({**shared, "model_id": "b@1"}).get_manager()
    manager.shutdown()


def test_a_private_store_needs_no_name() -> None:
    manager = spec_of({"tiers": ["host:1MiB"]}).get_manager()
    manager.shutdown()


def test_hashes_of_shared_stores_begin_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    spec_of({"tiers": ["host:1MiB"]}).get_manager().shutdown()
    assert os.environ["PYTHONHASHSEED"] == "7"
    tiers = [f"disk:{tmp_path / 'kv'}?capacity=1MiB"]
    spec_of({"tiers": tiers, "model_id": "b@1"}).get_manager().shutdown()
    assert "PYTHONHASHSEED" not in os.environ


# ---------------------------------------------------------------- identity


def fingerprint(
    model_id: str | None = "b@1", settings: Any = None, rows: str = "kvpager", **changes: Any
) -> bytes:
    layout = identity.chunk_layout(
        offloading_config(**changes), settings or model_config(theta=1e4), model_id, 4096, rows
    )
    return layout.fingerprint


def test_whatever_changes_the_bytes_changes_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    one = SimpleNamespace(tokens_per_block=32, layer_names=("layers.0",))
    other_layer = SimpleNamespace(tokens_per_block=16, layer_names=("layers.1",))
    parallel = SimpleNamespace(tp_size=2, pp_size=1, pcp_size=1, dcp_size=1, world_size=2)
    prints = [
        fingerprint(),
        fingerprint("b@2"),
        fingerprint(settings=model_config(theta=1e6)),
        fingerprint(kv_cache_layout="BLHNC"),
        fingerprint(model="a/b", cache=SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=1)),
        fingerprint(groups=(one,)),
        fingerprint(groups=(other_layer,)),
        fingerprint(parallel=parallel),
        fingerprint(rows="vllm"),
    ]
    monkeypatch.setattr(identity, "_device", lambda: "cpu x86_64 AVX2 amx True")
    prints.append(fingerprint())
    assert len(set(prints)) == len(prints)


def test_equal_models_in_other_folders_share(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    first, second = (fingerprint(None, model=str(tmp_path / name)) for name in ("one", "two"))
    assert first == second
    (tmp_path / "two" / "model.safetensors").write_bytes(b"WEIGHTS")
    assert fingerprint(None, model=str(tmp_path / "two")) != first


def test_keys_in_stores_differ_by_layout_and_key() -> None:
    made = (offloading_config(), model_config())
    layouts = [identity.chunk_layout(*made, name, 4096, "kvpager") for name in "ab"]
    keys = {identity.store_keys(layout)(key) for layout in layouts for key in (b"k", b"l")}
    assert len(keys) == 4
    assert {len(key) for key in keys} == {32}
