"""`kvpager bench throughput` and its benchmark: what they print, and how they say no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from tests.support import tiny_models
from tests.support.programs import run_program
from tests.support.throughput_cases import FIELDS

ROOT = Path(__file__).resolve().parents[2]


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.tiny_model("llama").save_pretrained(folder)
    return str(folder)


def call(*arguments: str) -> Any:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from kvpager.cli.app import app

    return CliRunner().invoke(
        app, ["bench", "throughput", *arguments], prog_name="kvpager", env={"COLUMNS": "120"}
    )


QUICK = ("--requests", "4", "--prompt-tokens", "5-20", "--new-tokens", "4", "--threads", "1")


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_lines_and_a_plot(
    saved_model: str, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    lines, plot = tmp_path / "figures.jsonl", tmp_path / "run.svg"
    result = call(
        *QUICK, "--model", saved_model, "--batch", "3", "--generate-batch-requests", "2",
        "--systems", "kvpager,generate,generate-rows,generate_batch", "--repeats", "2",
        "--json", str(lines), "--plot", str(plot),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for word in ("tokens/s", "first token, s, p99", "slots of it in use", "preempted, by swap"):
        assert word in result.output
    assert "* generate_batch: the first 2 of 4 requests alone" in result.output
    assert max(map(len, result.output.splitlines())) <= 100
    machine, *records = map(json.loads, lines.read_text().splitlines())
    assert machine["options"]["repeats"] == 2
    assert machine["workload"]["requests"] == 4
    assert all(set(each) == FIELDS for each in records)
    text = plot.read_text()
    for word in ("blocks held", "slots with a token", "running", "waiting", "preempted"):
        assert word in text


def test_json_on_stdout_is_json_alone(saved_model: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival,prompt_length,output_length\n0,9,3\n0.01,5,2\n")
    result = call("--trace", str(trace), "--model", saved_model, "--systems", "kvpager",
                  "--json", "-")  # fmt: skip
    assert result.exit_code == 0, result.output
    machine, found = map(json.loads, result.stdout.splitlines())
    assert machine["workload"]["name"] == "trace.csv, 2 requests"
    assert machine["workload"]["last_arrival_s"] == 0.01
    assert found["generated_tokens"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-tokens", "x"], "prompt tokens 'x': expected LOW-HIGH"),
        (["--systems", "foo"], "system 'foo'"),
        (["--requests", "0"], "requests 0"),
        (["--repeats", "0"], "repeats 0"),
        (["--generate-batch-requests", "0"], "generate_batch requests 0"),
        (["--trace", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["--model", "nowhere"], "model nowhere: there is no such folder"),
        (["--plot", "a.txt"], "--plot a.txt"),
        (["--systems", "generate", "--plot", "a.svg"], "have kvpager among the --systems"),
        (["--json", "nowhere/a"], "--json nowhere/a"),
        (["--device", "cuda:99"], "device 'cuda:99'"),
        (["--rate", "-1"], "rate -1.0"),
        (["--new-tokens", "99999"], "positions; leave such requests out"),
        (["--memory", "1"], "one block of 16 tokens takes"),
    ],
)
def test_the_command_refuses_nonsense_in_one_line(
    arguments: list[str], message: str, saved_model: str
) -> None:
    pytest.importorskip("matplotlib")
    if "--model" not in arguments:
        arguments = ["--model", saved_model, *arguments]
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_help_lists_every_option_of_the_command() -> None:
    pytest.importorskip("typer")
    from typer.main import get_command

    from kvpager.cli.app import app

    result = call("--help")
    assert result.exit_code == 0
    command: Any = get_command(app)
    for option in command.commands["bench"].commands["throughput"].params:
        assert option.help
        assert option.opts[0][:24] in result.output, option.opts


# --- the benchmark --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_has_a_figure_for_each_of_its_parts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "rows.svg"
    result = run_program(
        ROOT / "benchmarks" / "throughput.py", "--quick", "--no-compile", "--repeats", "1",
        "--threads", "1", "--plot", str(plot), cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    machine, *lines = map(json.loads, result.stdout.splitlines())
    assert machine["machine"]["threads"] == 1
    assert all(line["value"] > 0 and line["unit"] for line in lines)
    found = {line["name"]: line for line in lines}
    for system in ("kvpager", "generate", "generate_batch"):
        assert found[f"throughput_{system}"]["generated_tokens"] == 64
    assert 0.5 < found["kv_live_share_at_peak"]["value"] <= 1
    assert found["third_recompute"]["preempted_by_recompute"] > 0
    assert found["third_recompute"]["preempted_by_swap"] == 0
    assert found["third_swap"]["preempted_by_swap"] > 0
    assert found["third_swap"]["preempted_by_recompute"] == 0
    for name in ("third_capped", "third_roomy"):
        assert found[name]["preempted_by_recompute"] + found[name]["preempted_by_swap"] == 0
    assert found["shared_prompt_cached"]["prefix_hit_tokens"] >= 7 * 64
    assert found["samples_one_request_ms"]["blocks"] < found["samples_separate_ms"]["blocks"]
    assert {f"concurrency_{rows}_kvpager" for rows in (1, 2, 4)} <= set(found)
    assert found["step_8_rows_scheduler_share"]["value"] < 1
    assert "requests at once" in plot.read_text()
