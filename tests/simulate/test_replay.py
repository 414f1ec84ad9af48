"""Replay: reading traces, counting hits, and the output of `kvpager simulate`."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpager.blocks.policies import POLICIES
from kvpager.simulate.generate import KINDS, generate_trace
from kvpager.simulate.policies import BASELINES
from kvpager.simulate.replay import Trace, offline_optimum, read_trace, replay

ROOT = Path(__file__).resolve().parents[2]


def line(ids: Any, **fields: Any) -> str:
    request = {"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": ids}
    return json.dumps({**request, **fields})


def write(folder: Path, *lines: str) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def trace_of(folder: Path, *prompts: list[int]) -> Trace:
    return read_trace(write(folder, *(line(prompt) for prompt in prompts)))


# --- reading --------------------------------------------------------------------------------------


def test_equal_numbers_stand_for_equal_prefixes(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, [7, 9], [7, 9, 8], [9], [])
    assert [prompt.tolist() for prompt in trace.prompts] == [[0, 1], [0, 1, 2], [3], []]
    assert (trace.num_blocks, trace.num_prefixes) == (6, 4)
    assert trace.unlimited == pytest.approx(2 / 6)


def test_gzipped_trace_reads_alike(tmp_path: Path) -> None:
    plain = write(tmp_path, line([1, 2]), "", line([1, 3]))
    packed = tmp_path / "trace.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    one, two = read_trace(plain), read_trace(packed)
    assert [p.tolist() for p in one.prompts] == [p.tolist() for p in two.prompts]
    packed.write_bytes(packed.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"trace\.jsonl\.gz"):
        read_trace(packed)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "expected an object, got list"),
        (line([1], timestamp=-1), "timestamp -1: expected a number, at least 0"),
        (line([1], input_length="x"), "input_length 'x'"),
        (line([1], output_length=True), "output_length True"),
        (line([1], timestamp=float("nan")), "timestamp nan"),
        (line("12"), "hash_ids '12': expected a list"),
        (line([1, -1]), "hash_ids holds -1: expected ints from 0 to 2"),
        (line([2**31]), "hash_ids holds 2147483648"),
        (line([1.0]), "hash_ids holds 1.0"),
        (line([True]), "hash_ids holds True"),
        (line([1]).replace("hash_ids", "ids"), "hash_ids None"),
    ],
)
def test_a_bad_line_is_reported_with_number_and_reason(
    tmp_path: Path, bad: str, reason: str
) -> None:
    path = write(tmp_path, line([1]), bad, line([1]))
    with pytest.raises(ValueError, match="line 2: ") as caught:
        read_trace(path)
    assert reason in str(caught.value)
    trace = read_trace(path, skip_bad=True)
    assert len(trace.prompts) == 2
    assert len(trace.skipped) == 1
    assert reason in trace.skipped[0]


def test_only_the_first_bad_lines_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path, *["x"] * 5)
    with pytest.raises(ValueError, match=r"line 1: .*line 3: .*; and 2 more"):
        read_trace(path)
    with pytest.raises(ValueError, match="no request in it"):
        read_trace(path, skip_bad=True)


def test_a_line_that_is_not_text_is_bad(tmp_path: Path) -> None:
    path = write(tmp_path, line([1]))
    path.write_bytes(b"\xff\xfe\n" + path.read_bytes())
    assert len(read_trace(path, skip_bad=True).prompts) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_generated_trace_depends_on_its_arguments_alone(kind: str) -> None:
    one, same, other = (generate_trace(200, seed, kind) for seed in (1, 1, 2))
    assert len(one.prompts) == 200
    assert [p.tolist() for p in one.prompts] == [p.tolist() for p in same.prompts]
    assert [p.tolist() for p in one.prompts] != [p.tolist() for p in other.prompts]


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        ("mixed", 0.5, 0.8),
        ("chat", 0.5, 0.8),
        ("agents", 0.8, 0.95),
        ("evaluation", 0.6, 0.95),
        ("one-shot", 0.03, 0.15),
        ("shifting", 0.6, 0.9),
    ],
)
def test_generated_traffic_is_of_its_kind(kind: str, least: float, most: float) -> None:
    assert least < generate_trace(3000, kind=kind).unlimited < most


# --- counting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "hits"),
    # A pool of 4: [1 2] twice, [3 4], then [5 6], which needs two evictions.
    # lru and 2q evict [1 2]; arc evicts [3 4], which was used once.
    [("lru", 2 + 2), ("2q", 2 + 2), ("priority", 2 + 2), ("arc", 2 + 0)],
)
def test_hits_as_counted_by_hand(tmp_path: Path, policy: str, hits: int) -> None:
    trace = trace_of(tmp_path, [1, 2], [1, 2], [3, 4], [5, 6], [3, 4])
    result = replay(trace, 4, policy)
    assert (result.hits, result.blocks) == (hits, 10)
    assert result.hit_ratio == pytest.approx(hits / 10)
    assert result.evicted == (2 if hits == 4 else 4)


@pytest.mark.parametrize(("policy", "hits"), [("lru", 1 + 1), ("2q", 1 + 0), ("arc", 1 + 1)])
def test_reuse_distinguishes_lru_from_fifo(tmp_path: Path, policy: str, hits: int) -> None:
    # A pool of 2: for [3], 2q evicts [1], the first to arrive; the others evict [2].
    trace = trace_of(tmp_path, [1], [2], [1], [3], [1])
    assert replay(trace, 2, policy).hits == hits


def test_only_prompts_longer_than_the_pool_count_as_too_long(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, [1, 2, 3], [1, 2, 3], [1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3])
    for result in (replay(trace, 3, "lru"), offline_optimum(trace, 3)):
        assert (result.hits, result.too_long) == (9, 2)


@pytest.mark.parametrize("policy", [*POLICIES])
def test_a_large_pool_finds_every_repeated_block(policy: str) -> None:
    trace = generate_trace(150, seed=5)
    for capacity in (trace.num_prefixes, 2**31 - 1):
        result = replay(trace, capacity, policy)
        assert result.hit_ratio == pytest.approx(trace.unlimited)
        assert result.evicted == 0


def test_progress_counts_every_request() -> None:
    told: list[int] = []
    replay(generate_trace(150), 50, "lru", told.append)
    assert sum(told) == 150


def random_trace(seed: int, num_requests: int) -> Trace:
    random = np.random.default_rng(seed)
    numbers: dict[tuple[int, int], int] = {}
    prompts = []
    for _ in range(num_requests):
        path, before = [], -1
        for choice in random.integers(0, 3, random.integers(1, 5)).tolist():
            before = numbers.setdefault((before, choice), len(numbers))
            path.append(before)
        prompts.append(np.array(path, np.int32))
    return Trace("random", tuple(prompts), len(numbers))


def best_by_trying(trace: Trace, capacity: int) -> int:
    """Return the maximum hits over every choice of cached blocks."""
    prompts = [tuple(prompt.tolist()) for prompt in trace.prompts]
    parents = {b: a for prompt in prompts for a, b in pairwise(prompt)}

    @cache
    def most(request: int, kept: frozenset[int]) -> int:
        if request == len(prompts):
            return 0
        prompt = prompts[request]
        found = sum(number in kept for number in prompt)
        states = {kept | set(prompt)}
        while len(next(iter(states))) > capacity:  # evict one leaf
            states = {
                state - {leaf}
                for state in states
                for leaf in state - set(prompt) - {parents.get(number) for number in state}
            }
        return found + max(most(request + 1, frozenset(state)) for state in states)

    return most(0, frozenset())


@pytest.mark.parametrize("seed", range(12))
def test_the_offline_optimum_equals_exhaustive_search(seed: int) -> None:
    trace = random_trace(seed, 8)
    for capacity in (4, 6):
        assert offline_optimum(trace, capacity).hits == best_by_trying(trace, capacity)


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("seed", range(4))
def test_no_policy_beats_the_offline_optimum(seed: int) -> None:
    trace = random_trace(100 + seed, 300)
    for capacity in (2, 5, 20, 60):
        best = offline_optimum(trace, capacity)
        for policy in POLICIES:
            result = replay(trace, capacity, policy)
            assert result.hits <= best.hits
            assert result.too_long == best.too_long


# --- the command ----------------------------------------------------------------------------------


def run(*arguments: str, code: str | None = None) -> Any:
    start = ["-c", code] if code else ["-m", "kvpager", "simulate"]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def call(*arguments: str) -> Any:
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    pytest.importorskip("tqdm")
    from typer.testing import CliRunner

    from kvpager.cli.app import app

    return CliRunner().invoke(app, ["simulate", *arguments], prog_name="kvpager")


def test_the_table_has_a_row_per_policy(tmp_path: Path) -> None:
    path = write(tmp_path, *(line([n, n + 1]) for n in (1, 1, 3, 5, 3)))
    result = call(str(path), "--capacity", "4,2", "--capacity", "4")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "trace.jsonl: 5 requests, 10 blocks, 6 of them distinct" in result.stdout
    rows = {row[0]: row[1:] for row in map(str.split, result.stdout.splitlines()) if row}
    assert rows["policy"] == ["blocks", "blocks"]
    assert result.stdout.splitlines()[3].split() == ["2", "4"]
    assert rows["lru"] == ["0.2000", "0.4000"]
    assert rows["arc"] == ["0.2000", "0.2000"]
    assert rows["unlimited"] == ["0.4000", "0.4000"]
    assert rows["offline"] == ["optimum", "0.2000", "0.4000"]
    assert {*POLICIES, *BASELINES} < set(rows)


def test_json_output_contains_all_figures(tmp_path: Path) -> None:
    path = write(tmp_path, line([1, 2]), "x", line([1, 2]))
    result = call(
        str(path), "--skip-bad", "--capacity", "1", "--policy", "lifetime,lru", "--json", "-"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["trace"]["requests"] == 2
    assert len(found["trace"]["skipped"]) == 1
    policies = [entry["policy"] for entry in found["results"]]
    assert policies == ["lifetime", "lru", "offline optimum"]
    assert all(entry["too_long"] == 2 for entry in found["results"])


def test_skipped_lines_and_long_prompts_are_reported(tmp_path: Path) -> None:
    path = write(tmp_path, line([1, 2]), "x")
    result = call(str(path), "--skip-bad", "--capacity", "1", "--policy", "lru")
    assert "1 line skipped, the first: line 2: not JSON" in result.stdout
    assert "Prompts longer than 1 block: 1. Their hits count" in result.stdout


def test_tiers_have_their_own_columns(tmp_path: Path) -> None:
    path = write(tmp_path, *(line([n, n + 1]) for n in (1, 1, 3, 5, 3)))
    arguments = [str(path), "--capacity", "4,2", "--policy", "lru,arc", "--tiers", "host=6,disk=9"]
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert "hit ratio by tier, and blocks written to each:" in result.stdout
    rows = [row.split() for row in result.stdout.splitlines() if row.strip()]
    assert [row for row in rows if row[0] == "pool"] == [["pool", "host", "disk"]] * 2
    assert [row[1:] for row in rows if row[0] == "lru"] == [
        ["0.2000", "0.2000", "0.0000", "0.4000", "6", "6"],
        ["0.4000", "0.0000", "0.0000", "0.4000", "6", "6"],
    ]
    found = json.loads(call(*arguments, "--json", "-").stdout)["results"]
    assert [each["policy"] for each in found] == ["lru", "arc"] * 2
    assert found[0]["tiers"] == [
        {"name": "host", "capacity": 6, "hits": 2, "written": 6},
        {"name": "disk", "capacity": 9, "hits": 0, "written": 6},
    ]


@pytest.mark.parametrize("more", [[], ["--tiers", "host=30,disk=90"]])
def test_a_trace_is_generated_without_importing_torch(more: list[str]) -> None:
    for name in ("typer", "rich", "tqdm"):
        pytest.importorskip(name)
    code = (
        "import sys, kvpager.cli.app as c, kvpager.cli.simulate as s; s.GENERATED = 50; "
        "sys.argv[1:1] = ['simulate', '--capacity', '20']\n"
        "try: c.app()\nfinally: print('torch' in sys.modules)"
    )
    result = run(*more, code=code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("No TRACE given: generating one.\ngenerated mixed, 50 ")
    assert result.stdout.endswith("False\n")
    assert result.stderr == ""


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plot.{suffix}"
    result = call("--generate", "30", "--capacity", "9", "--policy", "lru", "--plot", str(file))
    assert result.exit_code == 0, result.output
    assert f"plot: {file}" in result.stdout
    assert file.stat().st_size > 1000


def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = call("--generate", "5", "--plot", "x.png")
    assert result.exit_code == 2
    assert "pip install 'kvpager[plot]'" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/file"], "no/such/file: No such file or directory"),
        (["."], ".: expected a regular file"),
        (["/dev/zero"], "/dev/zero: expected a regular file"),
        (["x", "--generate", "5"], "--generate=5: conflicts with TRACE"),
        (["x", "--kind", "chat"], "--kind=chat: conflicts with TRACE"),
        (["--kind", "tea"], "kind='tea': expected one of 'mixed', 'chat'"),
        (["--generate", "0"], "--generate=0: expected at least 1"),
        (["--seed", "-1"], "seed=-1: expected at least 0"),
        (["--capacity", "0"], "capacity=0: expected at least 1"),
        (["--capacity", "3000000000"], "capacity=3000000000: expected at most"),
        (
            ["--policy", "lru,best"],
            "--policy=best: expected one of lru, priority, lifetime",
        ),
        (
            ["--tiers", "lots"],
            "--tiers=lots: expected name=blocks, such as host=20000,disk=200000.",
        ),
        (["--tiers", "host=9,"], "--tiers=: expected name=blocks"),
        (["--tiers", "host=-9"], "--tiers=host=-9: expected name=blocks"),
        (["--tiers", "tape=9"], "--tiers=tape=9: expected one of host, disk."),
        (["--tiers", "host=9,host=8"], "--tiers=host=8: host is repeated. Name each tier once."),
        (["--tiers", "host=0"], "--tiers=0: expected at least 1"),
        (["--tiers", "host=3000000000"], "--tiers=3000000000: expected at most"),
        (["--tiers", "host=9", "--plot", "x.svg"], "--plot=x.svg: conflicts with --tiers."),
        (["--plot", "x.pdf"], "--plot=x.pdf: expected a .png or .svg file"),
        (["--plot", "no/such/x.png"], "in a folder that exists"),
        (["--json", "no/such/x.json"], "expected a file in a folder that exists"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("kvpager: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_bad_line_is_refused_in_one_line(tmp_path: Path) -> None:
    result = call(str(write(tmp_path, line([1]), "x")))
    assert result.exit_code == 2
    assert "line 2: not JSON" in result.stderr
    assert result.stderr.count("\n") == 1
