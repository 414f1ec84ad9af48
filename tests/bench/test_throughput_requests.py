"""Requests that are made up, read from a trace, and come when they are due."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from kvpager.bench.throughput.by_engine import EngineSystem
from kvpager.bench.throughput.by_generate import PaddedBatches
from kvpager.bench.throughput.systems import Options
from kvpager.bench.throughput.workload import (
    MONOTONIC,
    Clock,
    Item,
    Workload,
    arrivals,
    from_trace,
    synthetic,
)
from tests.conformance.architectures import VOCAB
from tests.support.throughput_cases import FakeClock, requests, silent, tiny

# --- requests -------------------------------------------------------------------------------------


def test_made_up_requests_are_what_was_asked_for() -> None:
    work = synthetic(200, (10, 20), 5, vocabulary=50, prefix_len=30, seed=3)
    lengths = {len(item.prompt) for item in work.items}
    assert lengths == set(range(40, 51))
    assert {item.new_tokens for item in work.items} == {5}
    assert {item.arrival for item in work.items} == {0.0}
    beginnings = {tuple(item.prompt[:30]) for item in work.items}
    assert len(beginnings) == 1
    assert len({tuple(item.prompt) for item in work.items}) == 200
    assert all(0 < token < 50 for item in work.items for token in item.prompt)
    assert (work.prompt_tokens, work.new_tokens) == (sum(map(len, _prompts(work))), 1000)


def _prompts(work: Workload) -> list[list[int]]:
    return [item.prompt for item in work.items]


def test_the_same_seed_gives_the_same_requests_and_another_others() -> None:
    assert requests(request_rate=3.0) == requests(request_rate=3.0)
    assert _prompts(requests()) != _prompts(requests(seed=2))


def test_a_rate_spreads_arrivals_as_a_poisson_process_does() -> None:
    moments = [item.arrival for item in requests(4000, request_rate=20.0).items]
    assert moments[0] == 0
    assert moments == sorted(moments)
    gaps = [later - before for before, later in itertools.pairwise(moments)]
    # Exponential: mean and deviation are the same, 1 / rate; 4,000 gaps come within a tenth.
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_prompts": 0}, "num_prompts.0: expected at least 1"),
        ({"input_len": (0, 4)}, "input_len.0"),
        ({"input_len": (9, 4)}, "9-4: expected the lower bound first"),
        ({"output_len": 0}, "output_len.0"),
        ({"prefix_len": -1}, "prefix_len.-1"),
        ({"request_rate": 0.0}, "request_rate=0.0"),
        ({"request_rate": float("inf")}, "request_rate=inf"),
        ({"seed": -1}, "seed.-1"),
        ({"vocabulary": 3}, "vocabulary=3"),
    ],
)
def test_requests_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    options = {"num_prompts": 2, "input_len": (2, 4), "output_len": 3, "vocabulary": 50}
    with pytest.raises(ValueError, match=message):
        synthetic(**{**options, **changes})


def test_a_request_longer_than_the_model_is_refused_by_number() -> None:
    items = (Item(0.0, [5, 6], 3), Item(0.0, [5] * 8, 3))
    work = Workload("two", items, 10)
    work.check(11)
    work.check(None)
    with pytest.raises(ValueError, match=r"request 1: 8 \+ 3 tokens, but the model has 10"):
        work.check(10)


def test_warming_up_says_nothing_that_is_said_later() -> None:
    work = requests(prefix_len=16)
    few = work.warm_up()
    assert max(len(prompt) for prompt in _prompts(few)) == max(map(len, _prompts(work)))
    beginnings = {tuple(prompt[:4]) for prompt in _prompts(work)}
    assert all(tuple(prompt[:4]) not in beginnings for prompt in _prompts(few))


# --- traces ---------------------------------------------------------------------------------------


def record(timestamp: int, length: int, new: int, hashes: list[int]) -> str:
    return json.dumps(
        {"timestamp": timestamp, "input_length": length, "output_length": new, "hash_ids": hashes}
    )


def test_a_trace_keeps_its_times_lengths_and_shared_beginnings(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    lines = [
        record(2000, 700, 9, [1, 2]),
        record(3000, 600, 4, [1, 3]),
        record(4500, 5, 6, [4]),
        record(5000, 9000, 6, [5]),
        record(6000, 30, 0, [4]),
    ]
    file.write_text("\n".join(lines))
    work = from_trace(file, vocabulary=99, speed=2.0, max_request_len=1000)
    assert [(item.arrival, len(item.prompt), item.new_tokens) for item in work.items] == [
        (0.0, 700, 9), (0.5, 600, 4), (1.25, 5, 6)
    ]  # fmt: skip
    first, second, third = _prompts(work)
    assert first[:512] == second[:512]
    assert first[512:600] != second[512:]
    assert third != first[:5]
    assert from_trace(file, vocabulary=99, num_prompts=2).items == tuple(
        item._replace(arrival=item.arrival * 2) for item in work.items[:2]
    )


def test_a_csv_file_is_a_trace_too(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("id,arrival,output_length,prompt_length\na,1.5,3,20\nb,1.25,4,10\n")
    work = from_trace(file, vocabulary=99)
    assert [(item.arrival, len(item.prompt), item.new_tokens) for item in work.items] == [
        (0.0, 10, 4), (0.25, 20, 3)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "{}", "line 1: timestamp None"),
        ("a.jsonl", "", "no request in it"),
        ("a.jsonl", record(1, 0, 4, []), "none of 1 requests is short enough"),
        ("a.csv", "arrival,prompt_length\n1,2\n", "no column 'output_length'"),
        ("a.csv", "arrival,prompt_length,output_length\n1,2,3\n1,x,3\n", "line 3: expected three"),
        ("a.csv", "arrival,prompt_length,output_length\n1,2\n", "line 2: expected three"),
        ("a.csv", "arrival,prompt_length,output_length\n-1,2,3\n", "line 2: .* at least 0"),
        ("a.csv", "arrival,prompt_length,output_length\nnan,2,3\n", "line 2: .* at least 0"),
        ("a.csv", f"arrival,prompt_length,output_length\n1,{2**31},3\n", "line 2: .* at most"),
        ("a.csv", f"arrival,prompt_length,output_length\n1,2,{'9' * 5000}\n", "line 2: expected"),
        ("a.csv", f'arrival,prompt_length,output_length\n1,2,"{"9" * 200_000}', "field limit"),
        (
            "a.csv",
            f"arrival,prompt_length,output_length\n1,{10**9},3\n",
            "50,000,000 prompt tokens",
        ),
        ("a.csv", "x" * (2**24 + 1), "line 1: longer than"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        from_trace(file, vocabulary=99)


# --- arrivals -------------------------------------------------------------------------------------


def test_requests_come_when_due_and_late_ones_at_once() -> None:
    fake = FakeClock()
    items = tuple(Item(moment, [5], 1) for moment in (0.0, 0.0, 2.0, 3.0, 9.0))
    came = []
    for number, _ in arrivals(Workload("five", items, 10), 100.0, fake.clock()):
        came.append((number, fake.time - 100))
        if number == 2:
            fake.time += 4  # the consumer takes four seconds
    assert came == [(0, 0.0), (1, 0.0), (2, 2.0), (3, 6.0), (4, 9.0)]


def test_a_padded_batch_waits_for_its_last_request() -> None:
    fake = FakeClock()
    items = tuple(Item(moment, [5, 6], 3) for moment in (0.0, 1.0, 4.0))
    run = PaddedBatches(tiny(), 2, fake.clock()).run(Workload("three", items, VOCAB), silent)
    assert [each.to_first_token for each in run.served] == [1.0, 0.0, 0.0]
    assert [each.finished for each in run.served] == [1.0, 1.0, 4.0]
    assert run.seconds == 4.0


def test_the_engine_gets_requests_when_they_are_due() -> None:
    slept: list[float] = []
    clock = Clock(now=MONOTONIC.now, sleep=slept.append)
    items = tuple(Item(moment, [5, 6], 3) for moment in (0.0, 500.0, 900_000.0))
    work = Workload("three", items, VOCAB)
    system = EngineSystem(tiny(), Options(), work, clock=clock)
    try:
        run = system.run(work, silent)
    finally:
        system.close()
    assert len(slept) == 2  # the fake clock sleeps, not the test
    assert 0 < slept[0] <= 500 < slept[1] <= 900_000
    assert [len(each.tokens) for each in run.served] == [3, 3, 3]
