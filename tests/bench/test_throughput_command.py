"""`kvpager bench throughput` and its benchmark: what they print, and how they say no."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from kvpager.bench.throughput.results import Figures, Moment, Run
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
        app, ["bench", "throughput", *arguments], prog_name="kvpager", env={"COLUMNS": "80"}
    )


QUICK = ("--num-prompts", "4", "--input-len", "5-20", "--output-len", "4", "--threads", "1")
QUICK += ("--device", "cpu")


@pytest.mark.slow
def test_the_command_writes_a_table_lines_and_a_plot(saved_model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines, plot = tmp_path / "figures.jsonl", tmp_path / "run.svg"
    result = call(
        *QUICK, "--model", saved_model, "--batch-size", "3", "--generate-batch-limit", "2",
        "--systems", "kvpager,generate,generate-rows,generate_batch", "--repeats", "2",
        "--json", str(lines), "--plot", str(plot),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for word in (
        "tokens/s",
        "TTFT p99, s",
        "ITL median, ms",
        "KV utilisation",
        "preempted by swap",
    ):
        assert word in result.output
    assert "* generate_batch: the first 2 of 4 requests alone" in result.output
    printed, _, files = result.output.partition("figures: ")
    assert max(map(len, printed.splitlines())) <= 80
    assert files
    machine, *records = map(json.loads, lines.read_text().splitlines())
    assert machine["options"]["repeats"] == 2
    assert machine["workload"]["requests"] == 4
    assert all(set(each) == FIELDS for each in records)
    text = plot.read_text()
    for word in (
        "blocks held",
        "tokens stored",
        "running",
        "waiting",
        "preempted",
        "LlamaForCausalLM",
    ):
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


def test_a_missing_extra_of_stores_is_named(
    saved_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    (tmp_path / "secret").write_bytes(b"s" * 32)
    result = call("--model", saved_model, "--tiers", "host:1MiB",
                  "--secret-file", str(tmp_path / "secret"))  # fmt: skip
    assert result.exit_code == 2
    assert result.stderr == (
        "kvpager: cryptography is not installed. Run: pip install 'kvpager[sealed]'\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input-len", "x"], "--input-len='x': expected LOW-HIGH"),
        (["--systems", "foo"], "--systems=foo: expected names from"),
        (["--num-prompts", "0"], "--num-prompts=0: expected at least 1"),
        (["--repeats", "0"], "--repeats=0: expected at least 1"),
        (["--generate-batch-limit", "0"], "--generate-batch-limit=0: expected at least 1"),
        (["--trace", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["--model", "nowhere"], "--model=nowhere: no such folder"),
        (["--plot", "a.txt"], "--plot=a.txt: expected a .png or .svg file"),
        (
            ["--systems", "generate", "--plot", "a.svg"],
            "--plot=a.svg: shows kvpager's steps. Add kvpager to --systems",
        ),
        (["--json", "nowhere/a"], "--json=nowhere/a: expected a file in a folder"),
        (["--device", "cuda:99"], "--device=cuda:99: not found by torch"),
        (["--request-rate", "-1"], "--request-rate=-1.0: expected a positive number"),
        (["--output-len", "99999"], "positions. Shorten or leave out such requests"),
        (["--memory", "1"], "one block of 16 tokens takes"),
        (["--tiers", "floppy:a"], "--tiers='floppy:a': no store is called 'floppy'"),
        (["--tiers", "host:lots"], "capacity='lots': expected a size"),
        (["--tiers", "host:1MiB", "--secret-file", "nowhere"], "nowhere: No such file"),
        (["--secret-file", "nowhere"], "--secret-file=nowhere: of use with tiers only"),
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


def test_a_plot_ends_with_its_last_request_without_colour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    from kvpager.bench.throughput import report

    moments = [Moment(float(n), 1, 1, 5, 10, 0.9, 2, 1, 0) for n in range(4)]
    idle = [Moment(float(n), 0, 0, 0, 10, 0.0, 0, 0, 0) for n in range(4, 90)]
    run = Run(4.0, [], moments=moments + idle)
    machine = {
        "model": {"class": "Llama", "parameters": 28e6, "dtype": "bfloat16", "device": "cpu"},
        "machine": {"threads": 2, "processor": "EPYC", "platform": "Linux"},
    }
    drawn: list[Any] = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    report.draw(tmp_path / "a.svg", Figures("kvpager", 1, [run]), "title", machine)
    above, below = drawn[0].axes
    assert above.get_xlim() == (0.0, 4.0)
    assert above.get_title() == "Llama, 28 million parameters, bfloat16\ncpu: EPYC, 2 threads"
    looks = [(line.get_linestyle(), line.get_marker()) for line in below.get_lines()]
    assert len(set(looks)) == len(looks) == 3


def test_seven_systems_fit_80_columns_uncut() -> None:
    pytest.importorskip("rich")
    from rich.console import Console

    from kvpager.bench import tables

    columns = [tables.Column(f"system-{n}", ["12,345,678", "0.123"]) for n in range(7)]
    console = Console(width=80, record=True, file=io.StringIO())
    tables.show(console, "", ["tokens/s", "KV utilisation"], columns)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("12,345,678") == 7
    assert text.count("KV utilisation") == 2


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
