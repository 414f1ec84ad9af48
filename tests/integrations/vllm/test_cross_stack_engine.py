"""transformers and vLLM itself over one store: each finds what the other computed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpager.storage.tiers.agreement import TOLERANCES, CommonLayout
from tests.support.valkey_servers import valkey
from tests.support.vllm_runs import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make vllm"),
]
PROMPT = (5, 1000, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.vllm_models import save_model

    made = tmp_path_factory.mktemp("models")
    for name in ("llama", "gemma"):
        save_model(name, made)
    return made


def disk(folder: Path) -> list[str]:
    return [f"disk:{folder / 'kv'}?capacity=1GiB&admit=always"]


def start(model: Path, stack: str, tiers: list[str], **given: Any) -> Any:
    environment = {**os.environ, **given.pop("environment", {})}
    asked = {"stack": stack, "tiers": tiers, "prompts": [PROMPT], **given}
    program = [sys.executable, "-W", "ignore", "-m", "tests.support.vllm_sharing", str(model)]
    return subprocess.run(
        [*program, json.dumps(asked)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def run(model: Path, stack: str, tiers: list[str], **given: Any) -> dict[str, Any]:
    result = start(model, stack, tiers, **given)
    assert result.returncode == 0, result.stderr[-4000:]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def cached(found: dict[str, Any]) -> list[int]:
    return [answer["cached"] for answer in found["answers"]]


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return vLLM's own answer, and the blocks that it computed."""
    own = tmp_path_factory.mktemp("alone")
    found = run(folder / "llama", "vllm", disk(own), dump=str(own / "blocks.npz"))
    return {**found, "saved": np.load(own / "blocks.npz")["saved"][-31:]}


@pytest.mark.parametrize("stack", ["patch", "engine"])
def test_vllm_finds_what_transformers_computed(
    folder: Path, alone: dict[str, Any], tmp_path: Path, stack: str
) -> None:
    first = run(folder / "llama", stack, disk(tmp_path))
    assert cached(first) == [0]
    dump = tmp_path / "blocks.npz"
    found = run(folder / "llama", "vllm", disk(tmp_path), dump=str(dump))
    assert cached(found) == [992]
    assert [each["tokens"] for each in found["answers"]] == [alone["answers"][0]["tokens"]]
    common = CommonLayout.of(32, [(2, 64, 64)] * 4, "float32")
    size, loaded = common.layout.block_bytes, np.load(dump)["loaded"]
    assert loaded.shape == alone["saved"].shape == (31, size)
    difference = common.difference(loaded, alone["saved"])
    assert difference.is_within(TOLERANCES["float32"])
    assert not common.difference(loaded[::-1], alone["saved"]).is_within(TOLERANCES["float32"])


@pytest.mark.parametrize("stack", ["patch", "engine"])
def test_transformers_finds_what_vllm_computed(folder: Path, tmp_path: Path, stack: str) -> None:
    own = tmp_path / "own"
    own.mkdir()
    alone = run(folder / "llama", stack, disk(own))
    first = run(folder / "llama", "vllm", disk(tmp_path), per_chunk=2, block_size=64)
    assert cached(first) == [0]
    found = run(folder / "llama", stack, disk(tmp_path), block_size=64)
    assert cached(found) == [960]
    assert found["answers"][0]["tokens"] == alone["answers"][0]["tokens"]


@pytest.mark.parametrize(("stack", "other"), [("engine", "vllm"), ("vllm", "engine")])
def test_salts_are_namespaces_over_a_server(
    folder: Path, tmp_path: Path, stack: str, other: str
) -> None:
    alice, bob, nobody = ((7, 600, salt) for salt in ("alice", "bob", None))
    server = valkey(tmp_path)
    try:
        assert cached(run(folder / "llama", stack, [server.url], prompts=[alice])) == [0]
        found = run(folder / "llama", other, [server.url], prompts=[nobody, bob, alice])
    finally:
        server.stop()
    assert cached(found) == [0, 0, 576]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_shared_within_its_tolerance(
    folder: Path, tmp_path: Path, dtype: str
) -> None:
    run(folder / "llama", "engine", disk(tmp_path), dtype=dtype, block_size=128)
    settings = {"dtype": dtype, "block_size": 128, "per_chunk": 4}
    found = run(folder / "llama", "vllm", disk(tmp_path), **settings)
    assert cached(found) == [896]
    assert "are shared with other stacks" in found["said"][0]


def test_kvpagers_attention_in_vllm_has_another_page_and_the_same_blocks(
    folder: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    run(folder / "llama", "engine", disk(tmp_path))
    own = {"KVPAGER_VLLM_ATTENTION": "always"}
    found = run(folder / "llama", "vllm", disk(tmp_path), environment=own)
    assert cached(found) == [992]
    assert found["answers"][0]["tokens"] == alone["answers"][0]["tokens"]


@pytest.mark.parametrize("fault", ["spoilt pages", "rotary embedding", "model id"])
def test_what_differs_is_no_hit(folder: Path, tmp_path: Path, fault: str) -> None:
    run(folder / "llama", "engine", disk(tmp_path))
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    given: dict[str, Any] = {
        "spoilt pages": {"spoil": True},
        "rotary embedding": {"hf_overrides": {"rope_parameters": rope}},
        "model id": {"model_id": "another"},
    }[fault]
    found = run(folder / "llama", "vllm", disk(tmp_path), **given)
    assert cached(found) == [0]
    assert ("cross_stack is off" in " ".join(found["said"])) == (fault != "model id")
    assert cached(run(folder / "llama", "engine", disk(tmp_path))) == [992]


def test_windows_are_refused_at_start(folder: Path, tmp_path: Path) -> None:
    result = start(folder / "gemma", "vllm", disk(tmp_path))
    assert result.returncode
    assert re.search("NotImplementedError: cross_stack: this engine cannot share", result.stderr)
