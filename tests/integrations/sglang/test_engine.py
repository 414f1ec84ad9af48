"""SGLang itself, with kvpager's stores below it: the tokens of SGLang alone, the bytes it saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.valkey_servers import valkey

ROOT = Path(__file__).resolve().parents[3]
PREFIX, PAGE = 512, 16
WHOLE = PREFIX + 32  # of a prompt that was asked for before, but for an incomplete page
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("sglang") is None, reason="SGLang is not installed: make sglang"),
]


def run(model: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    result = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "tests.support.sglang_scenarios"),
            *(str(model), *arguments),
        ],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    answers: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answers


def offloaded(
    model: Path, seen: Path, *arguments: str, environment: Any = None, **settings: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the answers of SGLang with kvpager, and what became of the bytes of its pages."""
    told = ("--offload", json.dumps(settings), "--bytes", str(seen), *arguments)
    answers = run(model, *told, **(environment or {}))
    return answers, json.loads(seen.read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.vllm_models import save_model

    return save_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, Any]:
    """Return the answers of SGLang without kvpager."""
    return run(model)


def tokens(answers: dict[str, Any], name: str) -> list[Any]:
    return [each["answers"] for each in answers[name]]


def cached(answers: dict[str, Any], name: str) -> list[Any]:
    """Return the cached tokens of the first prompt of each call: device, host memory, stores."""
    return [each["cached"][0] for each in answers[name]]


def check(answers: dict[str, Any], alone: dict[str, Any], seen: dict[str, Any]) -> None:
    """The tokens are those of SGLang alone, and loaded pages have the bytes that were saved."""
    for name in answers:
        assert tokens(answers, name) == tokens(alone, name), name
    assert seen["compared"] >= PREFIX // PAGE
    assert seen["wrong"] == []


def check_hits(answers: dict[str, Any]) -> None:
    assert cached(answers, "reset") == [[0, 0, 0], [PREFIX, 0, 0], [0, 0, PREFIX]]
    assert cached(answers, "salts") == [[0, 0, 0], [0, 0, 0], [0, 0, PREFIX]]
    assert cached(answers, "aborts") == [[0, 0, 0], [0, 0, WHOLE]]
    new, pushed_out = cached(answers, "overflow")
    assert new == [0, 0, 0]
    assert pushed_out[2] > 0
    assert any(each[2] for each in answers["together"][1]["cached"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


def disk(folder: Path) -> dict[str, Any]:
    """Return settings with which pages lie together, and move without a copy."""
    return {
        "tiers": f"disk:{folder / 'kv'}?capacity=1GiB",
        "hicache_mem_layout": "page_first_direct",
    }


def test_tokens_and_bytes_with_a_disk(model: Path, alone: dict[str, Any], folder: Path) -> None:
    answers, seen = offloaded(model, folder / "seen", **disk(folder))
    check(answers, alone, seen)
    check_hits(answers)


def test_sliding_windows_change_no_token(model: Path, tmp_path: Path) -> None:
    """SGLang keeps all layers of a gemma 3 in one pool, whatever they see."""
    from tests.support.vllm_models import save_model

    gemma, only = save_model("gemma", model.parent), ("--only", "reset")
    answers, seen = offloaded(gemma, tmp_path / "seen", *only, **disk(tmp_path))
    check(answers, run(gemma, *only), seen)
    assert cached(answers, "reset") == [[0, 0, 0], [PREFIX, 0, 0], [0, 0, PREFIX]]


def test_a_prompt_is_found_on_disk_after_a_restart(
    model: Path, alone: dict[str, Any], folder: Path
) -> None:
    answers, seen = offloaded(model, folder / "seen", "--only", "reset", **disk(folder))
    check(answers, alone, seen)
    assert cached(answers, "reset")[0] == [0, 0, WHOLE]


def test_exchanged_pages_are_noticed(model: Path, folder: Path) -> None:
    _, seen = offloaded(model, folder / "seen", "--only", "reset", "--spoil", **disk(folder))
    assert len(seen["wrong"]) == seen["compared"] >= PREFIX // PAGE


def test_two_processes_share_a_server(model: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    server = valkey(tmp_path)
    try:
        settings = {"tiers": ["host:8MiB", server.url], "hicache_mem_layout": "layer_first"}
        first = {"PYTHONHASHSEED": "1"}
        answers, seen = offloaded(model, tmp_path / "seen", environment=first, **settings)
        check(answers, alone, seen)
        check_hits(answers)
        told, second = ("--only", "reset"), {"PYTHONHASHSEED": "2"}
        answers, seen = offloaded(model, tmp_path / "seen", *told, environment=second, **settings)
        check(answers, alone, seen)
        assert cached(answers, "reset")[0] == [0, 0, WHOLE]
    finally:
        server.stop()


def test_another_release_is_refused() -> None:
    code = (
        "import sglang\n"
        "sglang.__version__ = '0.5.24'\n"
        "import kvpager.integrations.sglang\n"
    )  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "sglang 0.5.24: kvpager needs another release." in result.stderr.splitlines()[-1]


def test_the_example_finds_its_prompt_again(model: Path, tmp_path: Path) -> None:
    program = ROOT / "examples" / "sglang" / "offload.py"
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(program),
        str(model),
        str(tmp_path / "kv"),
        "cpu",
    ]
    found = []
    for _ in range(2):
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-4000:]
        found += [line.split()[0] for line in result.stdout.splitlines() if "stores" in line]
    assert found == ["0", "592"]
