"""The command `kvpager`: what it prints, what it measures, and how it says no."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("transformers")

from typer.testing import CliRunner

import kvpager
from kvpager.bench import environment
from kvpager.bench.environment import is_inside
from kvpager.blocks.stats import BlockStatus
from kvpager.cli.app import app
from kvpager.demo import measurement, report, runs
from kvpager.demo.measurement import HeldRow
from kvpager.errors import KVPagerError
from kvpager.testing import tiny_llama_path
from tests.support.programs import run_program

ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS = 12
QUICK = ["demo", "--device", "cpu", "--max-new-tokens", str(NEW_TOKENS)]
SCENARIOS = ["a", "b", "c", "d"]

needs_model = pytest.mark.skipif(
    not (tiny_llama_path() / "model.safetensors").is_file(), reason="the bundled model is absent"
)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), prog_name="kvpager")


def run(*arguments: str, at: Path = ROOT, **environment: str) -> Any:
    return run_program("kvpager", *arguments, cwd=at, **environment)


def run_process(*arguments: str, code: str | None = None, at: Path = ROOT, **variables: str) -> Any:
    start = ["-c", code] if code else ["-m", "kvpager"]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=at,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


@pytest.fixture(scope="module")
def json_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("figures") / "demo.json"


@pytest.fixture(scope="module")
def demo(json_file: Path) -> Any:
    """One real run, as from a pipe, 80 columns wide."""
    options = ["--json", json_file.name, "--report", "demo.html"]
    return run(*QUICK, *options, at=json_file.parent, COLUMNS="80")


@pytest.fixture(scope="module")
def figures(demo: Any, json_file: Path) -> dict[str, Any]:
    assert demo.returncode == 0, demo.stdout + demo.stderr
    found: dict[str, Any] = json.loads(json_file.read_text(encoding="utf-8"))
    return found


def scenario(figures: dict[str, Any], key: str) -> dict[str, Any]:
    return next(found for found in figures["scenarios"] if found["key"] == key)


# --- the demo -------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_model
def test_demo_finds_all_outputs_identical(demo: Any) -> None:
    assert demo.returncode == 0, demo.stdout + demo.stderr
    verdict, page, file = demo.stdout.splitlines()[-3:]
    assert (verdict, file) == ("all outputs identical", "figures: demo.json")
    assert page == "48 requests at once, as a page: demo.html"
    assert demo.stderr == ""
    for key in SCENARIOS:
        assert f"({key}) " in demo.stdout


@pytest.mark.slow
@needs_model
def test_demo_writes_the_report_of_its_own_requests(demo: Any, json_file: Path) -> None:
    assert demo.returncode == 0
    page = json_file.with_name("demo.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert len(page) < 500_000


@pytest.mark.slow
@needs_model
def test_demo_compares_the_modes(figures: dict[str, Any]) -> None:
    modes = {each["mode"]: each for each in figures["modes"]}
    assert modes["reserved"]["requests_at_once"] == 4
    assert modes["paged"]["requests_at_once"] == 12
    assert modes["reserved"]["live_share"] < 0.3 < 0.7 < modes["paged"]["live_share"]


@pytest.mark.slow
@needs_model
def test_demo_fits_the_width_and_needs_no_colour(demo: Any) -> None:
    assert max(map(len, demo.stdout.splitlines())) <= 80
    assert "\x1b" not in demo.stdout
    assert "S shared by several sequences" in demo.stdout


@pytest.mark.slow
@needs_model
def test_demo_as_ascii_and_prompts_of_ones_own() -> None:
    prompts = ["--prompt", "Gr\u00fc\u00dfe [bold]x[/]", "--prompt", "The"]
    options = ["--block-size", "8", *prompts]
    result = run_process(*QUICK, *options, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.returncode == 0, result.stderr
    assert "block size 8" in result.stdout
    assert "[bold]x[/]" in result.stdout
    assert "Batch of 2 prompts" in result.stdout


@pytest.fixture
def one_other_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the fifth token of the second row of scenario (a), as kvpager tells it."""
    genuine = runs.generate_paged

    def other(engine: Any, scenario: Any) -> Any:
        calls, paged = genuine(engine, scenario)
        if scenario.key == "a":
            rows = [list(row) for row in calls[0].rows]
            rows[1][4] += 1
            calls[0] = dataclasses.replace(calls[0], rows=rows)
        return calls, paged

    monkeypatch.setattr(runs, "generate_paged", other)


@pytest.mark.slow
@needs_model
@pytest.mark.usefixtures("one_other_token")
def test_differing_token_is_exit_code_1_and_says_where() -> None:
    result = call(*QUICK, "--json", "-")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["identical"]
    (difference,) = scenario(found, "a")["differences"]
    assert (difference["row"], difference["position"]) == (2, 5)
    assert difference["got"] == difference["expected"] + 1
    assert difference["margin"] > difference["tolerance"] > 0
    assert found["wrong"]
    assert not difference["near_tie"]
    assert [scenario(found, key)["identical"] for key in "bcd"] == [True] * 3


@pytest.mark.slow
@needs_model
@pytest.mark.usefixtures("one_other_token")
def test_a_near_tie_is_named_and_is_exit_code_0(monkeypatch: pytest.MonkeyPatch) -> None:
    def level(engine: Any, ids: list[int], num_last: int) -> torch.Tensor:
        return torch.ones(num_last, engine.model.config.vocab_size)

    monkeypatch.setattr(runs.Engine, "logits", level)
    result = call(*QUICK)
    assert result.exit_code == 0
    assert "1 of 4 rows took the other side of a near-tie: row 2, new token 5" in result.output
    assert "equal within the rounding of float32" in " ".join(result.output.split())
    assert "all outputs identical\n" not in result.output


@pytest.mark.slow
@needs_model
def test_wrong_attention_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvpager.integrations.huggingface.cache import paged_view

    genuine = paged_view.attend_in_place
    monkeypatch.setattr(
        paged_view, "attend_in_place", lambda *args, **options: genuine(*args, **options) * 1.5
    )
    result = call(*QUICK)
    assert result.exit_code == 1
    assert "outputs differ in scenario (a): row 1, new token " in result.output
    assert "all outputs identical" not in result.output


# --- the figures ----------------------------------------------------------------------------------


@needs_model
def test_figures_add_up(figures: dict[str, Any]) -> None:
    assert figures["identical"] is True
    assert [found["key"] for found in figures["scenarios"]] == SCENARIOS
    for found in figures["scenarios"]:
        plain, paged = found["dynamic_cache"], found["kvpager"]
        assert plain["used_bytes"] + plain["wasted_bytes"] == plain["reserved_bytes"]
        assert 0 < plain["used_bytes"] <= paged["used_bytes"] <= paged["held_bytes"]
        assert paged["held_bytes"] == paged["num_held_blocks"] * paged["block_bytes"]
        assert paged["held_bytes"] + paged["cached_bytes"] <= paged["reserved_bytes"]
        states = paged["blocks_by_state"]
        assert sum(states.values()) == paged["num_blocks"]
        assert states["held"] + states["shared"] == paged["num_held_blocks"]
        assert states["shared"] == paged["num_shared_blocks"]
        assert states["cached"] == paged["num_cached_blocks"]
        assert len(found["texts"]) * NEW_TOKENS == found["compared_tokens"]


@needs_model
@pytest.mark.parametrize("key", SCENARIOS)
def test_paged_waste_is_an_open_tail_block_per_row(figures: dict[str, Any], key: str) -> None:
    found = scenario(figures, key)
    paged = found["kvpager"]
    assert paged["held_bytes"] - paged["used_bytes"] < found["rows"] * paged["block_bytes"]


@needs_model
def test_padding_takes_no_blocks(figures: dict[str, Any]) -> None:
    found = scenario(figures, "a")
    block_size = figures["block_size"]
    lengths = [text["prompt_tokens"] + NEW_TOKENS - 1 for text in found["texts"]]
    assert found["kvpager"]["num_held_blocks"] == sum(-(-n // block_size) for n in lengths)
    share = max(lengths) * len(lengths) / sum(lengths)
    padded = found["dynamic_cache"]["reserved_bytes"]
    assert padded / found["kvpager"]["used_bytes"] == pytest.approx(share)


@needs_model
def test_later_questions_find_the_system_prompt(figures: dict[str, Any]) -> None:
    first, *later = scenario(figures, "b")["kvpager"]["calls"]
    assert first["prefix_hit_tokens"] == 0
    for each in later:
        assert each["prefix_hit_tokens"] >= 500
        assert each["new_blocks"] < first["new_blocks"] / 4


@needs_model
def test_beams_take_little_more_than_one_sequence(figures: dict[str, Any]) -> None:
    found = scenario(figures, "c")
    length = found["texts"][0]["prompt_tokens"] + NEW_TOKENS - 1
    one_sequence = -(-length // figures["block_size"])
    assert found["rows"] == 4
    assert found["kvpager"]["num_held_blocks"] < 1.2 * one_sequence


@needs_model
def test_second_call_allocates_blocks_for_its_new_tokens_only(figures: dict[str, Any]) -> None:
    _, second = scenario(figures, "d")["kvpager"]["calls"]
    length = second["prompt_tokens"] + NEW_TOKENS - 1
    block_size = figures["block_size"]
    assert second["prefix_hit_tokens"] >= 1000
    assert second["new_blocks"] == -(-length // block_size) - 1000 // block_size


def test_shared_tokens_count_once() -> None:
    rows = measurement.rows_by_ids([[1, 2, 3], [1, 2, 4, 5], [1, 2, 4]])
    assert rows == [HeldRow(3, 0), HeldRow(4, 2), HeldRow(3, 3)]
    layers = [measurement.LayerBytes(10, 4), measurement.LayerBytes(10, 1)]
    assert measurement.needed_bytes(layers, rows) == 10 * (3 + 2 + 0) + 10 * (1 + 1 + 0)


def test_block_map_is_bounded() -> None:
    import numpy as np

    states = np.array([BlockStatus.SHARED] * 60 + [BlockStatus.FREE] * 41, np.uint8)
    cells, blocks_per_cell = report.summarise(states, 20)
    assert blocks_per_cell == 6
    assert cells.tolist() == [BlockStatus.SHARED] * 10 + [BlockStatus.FREE] * 7


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float13"], "--dtype=float13: expected one of float32, bfloat16"),
        (["--block-size", "12"], "--block-size=12: expected a power of two"),
        (["--memory", "4 bananas"], "--memory='4 bananas': expected a size"),
        (["--max-new-tokens", "0"], "--max-new-tokens=0: expected at least 1"),
        (["--prompt", " "], "--prompt='': expected some text"),
        (["--device", "abacus"], "--device=abacus: expected a name"),
        (["--device", "meta"], "--device=meta: computes nothing"),
        (["--device", "cuda:99"], "--device=cuda:99: not found by torch"),
        (["--model", "./no/such/model"], "--model=./no/such/model: no such folder"),
        (["--model", str(ROOT / "tests")], ": cannot be loaded: "),
        (["--json", "no/such/folder/x.json"], "expected a file in a folder that exists"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = call("demo", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("kvpager: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.slow
@needs_model
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "96KiB"], "kvpager: scenario (a): KV cache out of memory: "),
        (["--memory", "96KiB"], " needed, --memory='96KiB' allows "),
        (["--memory", "96KiB"], ". Raise --memory to "),
        (["--memory", "1KiB"], "kvpager: --memory='1KiB': one block of 16 tokens takes "),
        (["--max-new-tokens", "4000"], "the model has 4096 positions"),
        (["--prompt", "x" * 4096], "tokens, the model has room for"),
    ],
)
def test_too_much_for_the_model_or_memory(arguments: list[str], message: str) -> None:
    result = run("demo", "--device", "cpu", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "host_memory" not in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-command"], "No such command 'no-such-command'. See `kvpager --help`."),
        (["dmeo"], "No such command 'dmeo'. Did you mean 'demo'? See `kvpager --help`."),
        (["demo", "--no-such-option"], "--no-such-option: no such option. See `kvpager demo --"),
        (["demo", "--modle", "x"], "--modle: no such option (meant: --model?)"),
        (["demo", "--block-size", "x"], "--block-size"),
        (["check", "--seed", "-3"], "--seed"),
        (["check", "--operations", "x"], "--operations=x: not a number. See `kvpager check --h"),
        (["run"], "Missing argument 'COMMAND ...'. See `kvpager run --help`."),
        (["mutants", "--only", "?"], "--only=?: no mutant has this in its name or module."),
        (["simulate", "nowhere.jsonl"], "nowhere.jsonl: No such file or directory."),
        (["simulate", "--policy", "x"], "--policy=x: expected one of lru, "),
        (["simulate", "--capacity", "0"], "--capacity=0: expected at least 1"),
        (["simulate", "--generate", "0"], "--generate=0: expected at least 1"),
        (["simulate", "--capacity", "9,"], "--capacity=: expected blocks, such as 1000,5000."),
        (["simulate", "x", "--kind", "chat"], "--kind=chat: conflicts with TRACE."),
        (["env", "--json", "no/folder/x"], "--json=no/folder/x: expected a file in a folder"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments: list[str], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"kvpager: {message}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KVPagerError("the engine\nstopped"), "the engine stopped"),
        (OSError(28, "No space left on device", "x.json"), "x.json: No space left on device."),
    ],
)
def test_failed_work_is_one_line_and_status_1(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> None:
        raise error

    monkeypatch.setattr(environment, "collect", failing)
    result = call("env")
    assert result.exit_code == 1
    assert result.stderr == f"kvpager: {message}\n"


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "collect", lambda: 1 / 0)
    assert isinstance(call("env").exception, ZeroDivisionError)


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_missing_extra_is_named(missing: str) -> None:
    code = f"import sys; sys.modules['{missing}'] = None; import kvpager.cli; kvpager.cli.main()"
    result = run_process(code=code)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "pip install 'kvpager[cli]'" in result.stderr


# --- help, version, env ---------------------------------------------------------------------------


def test_help_lists_every_command() -> None:
    result = run("--help")
    assert result.returncode == 0
    for word in ("demo", "env", "--version", "--help"):
        assert word in result.stdout


COMMANDS = ["demo", "env", "simulate", "report", "check", "mutants", "run", "bench throughput"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_all_of_every_option_in_80_columns(command: str) -> None:
    from typer.main import get_command

    words = command.split()
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in result.stdout
    found: Any = get_command(app)
    for word in words:
        found = found.commands[word]
    for option in found.params:
        assert option.help
        assert option.opts[0] in result.stdout or option.param_type_name == "argument"
        for word in option.help.split():
            assert word in result.stdout, option.opts


@pytest.mark.parametrize("command", ["", "bench", *COMMANDS])
def test_help_shows_flags_without_a_value(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "80"})
    assert "--help" in result.stdout
    assert "bool" not in result.stdout.lower()


@pytest.mark.parametrize("command", ["demo", "simulate", "run", "bench throughput"])
def test_help_groups_the_options(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "80"})
    panels = [
        line
        for line in result.stdout.splitlines()
        if line.startswith("\N{BOX DRAWINGS LIGHT ARC DOWN AND RIGHT}")
    ]
    assert len(panels) >= 3
    assert "Output" in panels[-1]


def test_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"kvpager {kvpager.__version__}\n")


def test_env_shows_versions_devices_and_kernels() -> None:
    result = call("env")
    assert result.exit_code == 0
    for word in ("python", "torch", "transformers", "triton", "numpy", "CPUs", "GPUs"):
        assert word in result.output
    for operation in ("append_kv", "copy_blocks", "gather_kv", "paged_attention"):
        assert operation in result.output


def test_env_as_json() -> None:
    result = call("env", "--json", "-")
    found = json.loads(result.stdout)
    assert found["kvpager"] == kvpager.__version__
    assert set(found["versions"]) == {"python", "torch", "transformers", "triton", "numpy"}
    assert found["kernels"]["cpu"]["paged_attention"].keys() == {"backend", "reason"}


@pytest.mark.parametrize(
    ("version", "inside"),
    [("2.10.1", False), ("2.11.0", True), ("2.13.1+cu130", True), ("2.14.0", False), ("3", False)],
)
def test_supported_range_holds_both_ends(version: str, inside: bool) -> None:
    assert is_inside(version, ("2.11", "2.13")) is inside


def test_importing_the_commands_is_cheap() -> None:
    code = "import sys, kvpager.cli, kvpager.cli.app; print(*sorted(sys.modules))"
    loaded = run_process(code=code).stdout.split()
    assert {"kvpager.cli.app", "kvpager.cli.bench", "kvpager.cli.run"} <= set(loaded)
    assert {"torch", "transformers", "numpy", "matplotlib", "tqdm"}.isdisjoint(loaded)
