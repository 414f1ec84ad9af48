"""`kvpager bench modes`: the same requests through each mode, in the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers")

from kvpager.bench.modes import report
from kvpager.bench.modes.comparison import ModeFigures, check_modes, engine_options, rate_within
from kvpager.bench.throughput.results import Moment, Run, Served
from kvpager.cli.app import app
from tests.support import tiny_models


def run(tokens_per_s: float, moments: list[Moment]) -> Run:
    served = [Served(0.0, 1.0, float(finished), [5] * 10) for finished in range(1, 11)]
    return Run(100 / tokens_per_s, served, moments=moments, copied_blocks=3)


def moment(held: int, slot_use: float, *, running: int, waiting: int) -> Moment:
    return Moment(0.0, running, running, held, 100, slot_use, running, waiting, 0)


@pytest.mark.parametrize(
    ("latencies", "limit", "rate"),
    [
        ({1.0: 2.0, 2.0: 4.0}, 3.0, 1.5),
        ({2.0: 4.0, 1.0: 2.0}, 9.0, 2.0),
        ({1.0: 2.0}, 1.0, 0.5),
        ({}, 1.0, 0.0),
    ],
)
def test_the_rate_within_a_latency_lies_between_measured_ones(
    latencies: dict[float, float], limit: float, rate: float
) -> None:
    assert rate_within(latencies, limit) == rate


def test_figures_count_slots_while_requests_wait() -> None:
    """After that, the last requests leave memory empty in every mode."""
    moments = [
        moment(40, 0.25, running=4, waiting=9),
        moment(80, 0.5, running=7, waiting=1),
        moment(10, 1.0, running=1, waiting=0),
    ]
    figures = [ModeFigures("reserved", [run(20, moments)]), ModeFigures("paged", [run(50, [])])]
    reserved, paged = report.records(figures)
    assert (reserved["requests_at_once"], reserved["copied_blocks"]) == (7, 3)
    assert reserved["live_share"] == (40 * 0.25 + 80 * 0.5) / 120
    assert reserved["p90_latency_s"] == pytest.approx(9.1)
    assert (reserved["over_reserved"], paged["over_reserved"]) == (1.0, 2.5)
    assert paged["live_share"] is None


def test_the_memory_is_room_for_four_reserved_requests() -> None:
    model = tiny_models.tiny_model("llama")
    options = engine_options(model, None, max_model_len=100, block_size=16, threads=None)
    config = model.config
    of_token = 4 * 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    assert options.memory == 4 * 112 * of_token  # 100 tokens take 7 blocks
    for mode in ("reserved", "paged", "virtual"):
        assert options.with_engine(mode=mode).engine_config().memory == options.memory


def test_rates_need_the_mode_that_they_are_fractions_of() -> None:
    assert check_modes([" reserved", "paged", "paged"], [0.5]) == ["reserved", "paged"]
    with pytest.raises(ValueError, match="Add paged to the modes"):
        check_modes(["reserved"], [0.5])
    with pytest.raises(ValueError, match="mode='flat': expected one of"):
        check_modes(["flat"], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", "fast"], "rates='fast': expected numbers"),
        (["--rates", "3"], "rates='3': expected numbers above 0"),
    ],
)
def test_wrong_usage_says_what_is_expected(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "modes", *arguments])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.slow
def test_reserved_regions_hold_fewer_live_tokens_than_blocks(tmp_path: Path) -> None:
    file = tmp_path / "modes.jsonl"
    sizes = ["--num-prompts", "10", "--input-len", "8-64", "--output-len", "8"]
    bounds = ["--max-model-len", "256", "--rates", "0.5,1", "--json", str(file)]
    result = CliRunner().invoke(app, ["bench", "modes", *sizes, *bounds])
    assert result.exit_code == 0, result.output
    assert "reserves 256 tokens for each request" in result.output.replace("\n", " ")
    machine, *found = map(json.loads, file.read_text().splitlines())
    assert machine["p90_limit_s"] > 0
    reserved, paged, virtual = found
    assert reserved["requests_at_once"] == 4
    assert paged["requests_at_once"] == virtual["requests_at_once"] == 10
    assert reserved["live_share"] < 0.4 < 0.7 < paged["live_share"]
    assert len(paged["p90_latency_s_by_rate"]) == 2
    assert all(each["tokens_per_s_within_limit"] > 0 for each in found)
