"""vLLM itself, with kvpager's tiers below it: the tokens of vLLM alone, and the bytes it saved."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.valkey_servers import valkey
from tests.support.vllm_runs import ROOT, cached, check, offloaded, run, tokens
from tests.support.vllm_scenarios import ENVIRONMENT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make vllm"),
]
MODELS = ("llama", "gemma")
both = pytest.mark.parametrize("synchronous", [False, True], ids=["offload", "connector"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.vllm_models import save_model

    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        save_model(name, folder)
    return folder


@pytest.fixture(scope="module")
def alone(models: Path) -> dict[str, Any]:
    """Return the answers of vLLM without kvpager."""
    return {name: run(models / name)["answers"] for name in MODELS}


def shared_rows() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("kvpager-")}


@both
def test_host_memory_changes_no_token(
    models: Path, alone: dict[str, Any], synchronous: bool
) -> None:
    found = offloaded(models / "llama", host_memory="128MiB", synchronous=synchronous)
    check(found, alone["llama"])
    assert cached(found["answers"], "cold_warm_reset") == [0, 1024, 1024]
    assert cached(found["answers"], "overflow") == [1024]
    assert cached(found["answers"], "salts") == [0, 0, 576]
    assert found["preempted"] > 0


@both
def test_a_tight_pool_over_a_disk_changes_no_token(
    models: Path, alone: dict[str, Any], tmp_path: Path, synchronous: bool
) -> None:
    found = offloaded(
        models / "llama",
        host_memory="24MiB",
        tiers=[f"disk:{tmp_path / 'kv'}?capacity=1GiB&admit=always"],
        eviction="lifetime",
        blocks_per_chunk=4,
        synchronous=synchronous,
    )
    check(found, alone["llama"])
    assert found["host"][0]["slots"] == 48  # all prompts together have three times as many chunks
    assert cached(found["answers"], "overflow") == [1024]
    assert cached(found["answers"], "salts") == [0, 0, 512]


@both
@pytest.mark.parametrize("per_chunk", [1, 4])
def test_sliding_windows_change_no_token(
    models: Path, alone: dict[str, Any], tmp_path: Path, per_chunk: int, synchronous: bool
) -> None:
    found = offloaded(
        models / "gemma",
        host_memory="24MiB",
        tiers=[f"disk:{tmp_path / 'kv'}?capacity=1GiB"],
        blocks_per_chunk=per_chunk,
        synchronous=synchronous,
    )
    check(found, alone["gemma"])
    assert cached(found["answers"], "cold_warm_reset")[2] == 1024
    assert cached(found["answers"], "salts")[:2] == [0, 0]
    assert cached(found["answers"], "salts")[2] >= 512


@pytest.fixture
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield f"disk:{tmp_path / 'kv'}?capacity=1GiB"
        return
    server = valkey(tmp_path)
    yield server.url
    server.stop()


@pytest.mark.parametrize(
    ("store_url", "synchronous"),
    [("disk", False), ("disk", True), ("valkey", True)],
    indirect=["store_url"],
)
def test_another_process_loads_what_one_saved(
    models: Path, alone: dict[str, Any], tmp_path: Path, store_url: str, synchronous: bool
) -> None:
    """The process that saves has the other connector."""
    digests = ["--digests", str(tmp_path / "digests.json")]
    for seed, scenario, kind in (
        ("1", "cold_warm_reset", not synchronous),
        ("2", "prefix_again", synchronous),
    ):
        found = offloaded(
            models / "llama",
            *digests,
            *("--scenarios", scenario),
            environment={"PYTHONHASHSEED": seed},
            host_memory="128MiB",
            tiers=store_url,
            synchronous=kind,
        )
    assert tokens(found["answers"], "prefix_again") == tokens(alone["llama"], "cold_warm_reset")[2:]
    assert cached(found["answers"], "prefix_again") == [1056]  # all of the prompt that fills blocks
    assert found["compared"] >= 32
    assert found["wrong"] == []


def test_replies_that_are_saved_are_hits(models: Path, alone: dict[str, Any]) -> None:
    found = offloaded(
        models / "llama",
        *("--scenarios", "turns"),
        host_memory="128MiB",
        offload_prompt_only=False,
        synchronous=True,
    )
    assert tokens(found["answers"], "turns") == tokens(alone["llama"], "turns")
    assert cached(found["answers"], "turns") == [
        0,
        192,
        288,
        352,
        416,
    ]  # of 200, 274, 348, 422, 496 tokens


@both
def test_an_engine_in_its_own_process_says_the_same(
    models: Path, alone: dict[str, Any], synchronous: bool
) -> None:
    before = shared_rows()
    found = offloaded(
        models / "llama",
        *("--scenarios", "cold_warm_reset,preemption"),
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        host_memory="128MiB",
        synchronous=synchronous,
    )
    for name in found["answers"]:
        assert tokens(found["answers"], name) == tokens(alone["llama"], name)
    assert cached(found["answers"], "cold_warm_reset") == [0, 1024, 1024]
    assert shared_rows() <= before


def test_kvpagers_block_manager_gives_the_hits_and_tokens_of_vllms(
    models: Path, alone: dict[str, Any]
) -> None:
    scheduler = "tests.support.vllm_scheduler.KvpagerScheduler"
    found = run(models / "llama", "--scheduler", scheduler)
    assert found["answers"] == alone["llama"]
    assert found["preempted"] > 0
    assert found["device"]["free"] == found["device"]["blocks"] - 1


@both
def test_rows_that_are_exchanged_on_purpose_are_noticed(models: Path, synchronous: bool) -> None:
    found = offloaded(
        models / "llama",
        *("--spoil", "--scenarios", "cold_warm_reset"),
        host_memory="128MiB",
        synchronous=synchronous,
    )
    assert len(found["wrong"]) >= 32  # all but those of transfers of one block


def test_the_example_finds_its_prompt_again(models: Path, tmp_path: Path) -> None:
    environment = {**os.environ, **ENVIRONMENT}
    program = [sys.executable, "-W", "ignore", "examples/vllm/offload.py"]
    said = []
    for _ in range(2):  # the second process finds it on disk
        result = subprocess.run(
            [*program, str(models / "llama"), str(tmp_path / "kv")],
            cwd=ROOT,
            env={**environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-4000:]
        said += [line for line in result.stdout.splitlines() if line.startswith(("first", "after"))]
    counts = [int(line.rpartition(" [")[0].split()[-1]) for line in said]
    assert counts == [0, 576, 576, 576]
    assert len({line.rpartition(" [")[2] for line in said}) == 1
