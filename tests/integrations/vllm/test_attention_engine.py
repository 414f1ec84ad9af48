"""vLLM itself with kvpager's attention: the tokens of vLLM's own, on the same pages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.vllm_attention_runs import plugin_path
from tests.support.vllm_attention_steps import DIM, HEADS, KV_HEADS, SIZE, Step, config
from tests.support.vllm_parts import attention

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make vllm"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.vllm_models import save_model

    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "gemma"):
        save_model(name, folder)
    return folder


def run(folder: Path, model: str, *arguments: str, **environment: str) -> tuple[Any, str]:
    """Return what an engine answered, and all that it printed."""
    own = {"PYTHONPATH": plugin_path(folder / "plugin"), "KVPAGER_VLLM_ATTENTION": "always"}
    program = [sys.executable, "-W", "ignore", "-m", "tests.support.vllm_attention_runs"]
    result = subprocess.run(
        [*program, str(folder / model), *arguments],
        cwd=ROOT,
        env={**os.environ, **own, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    return found, result.stdout + result.stderr


@pytest.fixture(scope="module")
def llama(folder: Path) -> Any:
    return run(folder, "llama", "--block-size", "128")[0]


def check(found: Any) -> None:
    assert found["layers"] == [["KvpagerAttentionImpl", None]] * 4
    assert found["mixed"] > 20  # steps with a prompt's chunk and decodes
    assert found["kvpager"] == found["vllm"]


def test_a_llama_generates_the_tokens_of_vllm(llama: Any) -> None:
    check(llama)


def test_sliding_windows_generate_the_tokens_of_vllm_and_wrong_ones_do_not(folder: Path) -> None:
    errors = ("--window-errors", "1", "-1")
    found, _ = run(folder, "gemma", "--block-size", "32", *errors)
    check(found)
    for name in ("window +1", "window -1"):
        assert found[name]["ragged"] != found["vllm"]["ragged"], name


def test_an_engine_in_its_own_process_finds_the_plugin_by_its_entry_point(
    folder: Path, llama: Any
) -> None:
    found, printed = run(
        folder,
        "llama",
        *("--block-size", "128"),
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_LOGGING_LEVEL="INFO",
    )
    assert found["kvpager"] == llama["vllm"]
    [line] = [line for line in printed.splitlines() if "kvpager's kernels serve" in line]
    assert "the attention of 4 layers" in line


def test_without_the_variable_vllm_is_untouched(folder: Path) -> None:
    code = (
        "from vllm.plugins import load_general_plugins\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum\n"
        "load_general_plugins()\n"
        "print(AttentionBackendEnum.CPU_ATTN.get_path())\n"
    )
    paths = []
    for choice in ("0", "1"):
        own = {"PYTHONPATH": plugin_path(folder / "plugin"), "KVPAGER_VLLM_ATTENTION": choice}
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**os.environ, **own, "VLLM_LOGGING_LEVEL": "ERROR"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-4000:]
        paths.append(result.stdout.split()[-1])
    assert paths == [
        "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend",
        "kvpager.integrations.vllm.attention.KvpagerAttentionBackend",
    ]


# Between the two, each rounded to the dtype once or, with bfloat16 weights, twice.
BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 6e-3}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("window", [None, 33])
def test_outputs_are_those_of_vllms_operator(
    dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm._custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    monkeypatch.setenv("KVPAGER_VLLM_ATTENTION", "always")
    for module in (attention, sys.modules[attention.CPUAttentionBackendImpl.__module__]):
        monkeypatch.setattr(module, "get_current_vllm_config", lambda: config(dtype))
    step = Step(stale=0)  # vLLM's operator multiplies them by weights of 0
    for name in ("query", "key", "value"):
        setattr(step, name, getattr(step, name).to(dtype))
    settings = (HEADS, DIM, 0.3, KV_HEADS, None, window, "auto")
    ours, theirs = (
        attention.KvpagerAttentionImpl(*settings),
        attention.KvpagerAttentionImpl(*settings),
    )
    theirs.reason = "the test"
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=3, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, seq_lens=step.lengths,
        dtype=dtype, query_start_loc=step.starts, causal=True, sliding_window_size=window or -1,
        isa="vec", enable_kv_split=True, dynamic_causal=None, kv_cache_dtype="auto",
    )  # fmt: skip
    assert SIZE % 32 == 0  # of "vec"
    output, expected = (step.run(impl, scheduler_metadata=schedule) for impl in (ours, theirs))
    difference = (output.double() - expected.double()).norm() / expected.double().norm()
    assert difference < BOUNDS[dtype]
