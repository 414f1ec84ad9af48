"""What `Engine(record=...)` writes: the life of each request, and where its blocks were."""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from kvpager.engine.config import EngineConfig
from kvpager.engine.recording import Record
from kvpager.errors import RequestCancelled, RequestFailed
from kvpager.recording.format import Step
from kvpager.recording.reader import Recording
from kvpager.recording.replay import ReplayedState
from kvpager.scheduling.preemption import PreemptionCosts
from tests.support.toy_runner import ToyEngine, expected
from tests.support.toy_tiers import PROMPT, TieredEngine, store_with_the_prompt

ALWAYS_SWAP = PreemptionCosts(seconds_per_token=1.0, seconds_per_block=0.0)


def replayed(path: Path) -> tuple[list[Step], ReplayedState]:
    """Replay a complete recording; its own counts agree with its tables at each step."""
    recording = Recording(path)
    state = ReplayedState(recording.header)
    steps = []
    for step in recording:
        state.apply(step)
        steps.append(step)
        held = state.filled()
        assert (len(held), sum(held.values())) == (state.counts.held, state.counts.tokens)
    assert recording.is_complete
    return steps, state


def lives(steps: list[Step]) -> dict[int, list[str]]:
    """Return the states of each request, in order."""
    found = defaultdict(list)
    for step in steps:
        for request, state in step.state:
            found[request].append(state)
    return dict(found)


def test_each_request_arrives_runs_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record = Record(path, max_tokens=64, policy="fifo", eviction="lru", model="Toy")
    with ToyEngine(core={"record": record}, max_batch_tokens=8) as engine:
        with engine.pause():
            streams = [engine.ask([*range(20)], 5), engine.ask([1, 2, 3], 4, n=3)]
        for stream in streams:
            stream.result(60)
        engine.check_idle()
    steps, state = replayed(path)
    assert lives(steps) == {number: ["running", "finished"] for number in range(3)}
    arrived = [new for step in steps for new in step.new]
    assert arrived == [(0, 20, 5, 1), (1, 3, 4, 3), (2, 1, 1, 1)]
    assert not state.sequences
    assert not state.requests
    owners = {number: request for step in steps for number, request, _ in step.begin}
    assert sorted(owners.values()) == [0, 1, 1, 1, 2]  # type: ignore[type-var]
    parts = [part for step in steps for part in step.prefill if owners[part[0]] == 0]
    assert [part[1:] for part in parts] == [(0, 8), (8, 8), (16, 4)]


def test_a_recording_names_no_request_and_holds_no_token(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with ToyEngine(core={"record": Record(path)}) as engine:
        names = {"request_id": "secret-id", "namespace": "acme-corp", "lora": "secret-lora"}
        engine.ask([987654321] * 9, 5, **names).result(60)  # type: ignore[arg-type]
    text = path.read_text()
    for secret in ("secret", "acme", "987654321", str(tmp_path)):
        assert secret not in text


def test_preempted_requests_are_swapped_or_dropped_and_run_again(tmp_path: Path) -> None:
    for host, word in ((32, "swapped"), (0, "dropped")):
        path = tmp_path / word
        with ToyEngine(
            12, host, core={"record": Record(path)}, costs=ALWAYS_SWAP, watermark=0.0
        ) as engine:
            with engine.pause():
                streams = [engine.ask([number] * 5, 24) for number in range(4)]
            for number, stream in enumerate(streams):
                assert stream.result(60).token_ids == expected([number] * 5, 24)
            engine.check_idle()
        steps, state = replayed(path)
        preempted = [states for states in lives(steps).values() if word in states]
        assert preempted
        for states in preempted:
            assert states[states.index(word) + 1] == "running"
            assert states[-1] == "finished"
        assert (state.totals.swapped_out > 0) == (word == "swapped")


def test_a_cancelled_and_a_failed_request_end_so(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with ToyEngine(core={"record": Record(path)}) as engine:
        stream = engine.ask([1], 200, request_id="a")
        next(iter(stream))
        engine.cancel("a")
        with pytest.raises(RequestCancelled):
            stream.result(60)
        hook = engine.runner.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(RequestFailed):
            engine.ask([4], 3).result(60)
        hook.remove()
        engine.check_idle()
    ends = {number: states[-1] for number, states in lives(replayed(path)[0]).items()}
    assert ends == {0: "cancelled", 1: "failed", 2: "finished"}


def test_a_request_that_runs_or_waits_when_the_engine_is_closed_is_cancelled(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.jsonl"
    engine = ToyEngine(core={"record": Record(path)}, max_num_seqs=1)
    streams = [engine.ask([1], 200), engine.ask([2], 3)]
    next(iter(streams[0]))
    engine.close()
    steps, state = replayed(path)
    assert [states[-1] for states in lives(steps).values()] == ["cancelled"] * 2
    assert not state.requests


def test_a_cached_prompt_computes_its_last_token_as_a_part(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with ToyEngine(core={"record": Record(path)}) as engine:
        for _ in range(2):
            engine.ask([*range(8)], 1).result(60)
        engine.check_idle()
    steps, _ = replayed(path)
    parts = [part for step in steps for part in step.prefill]
    assert parts == [(0, 0, 8), (1, 7, 1), (2, 0, 1)]


def test_a_prompt_is_fetched_before_it_runs(tmp_path: Path) -> None:
    path, filled, looked = tmp_path / "run.jsonl", store_with_the_prompt(), threading.Event()
    load = filled.load

    def load_after_a_look(*arguments: Any) -> Any:
        assert looked.wait(30)
        return load(*arguments)

    filled.load = load_after_a_look  # type: ignore[method-assign]
    with TieredEngine([filled], core={"record": Record(path)}) as engine:
        recorder = engine._loop.recorder
        assert recorder is not None
        write = recorder._writer.write

        def watch(line: bytes) -> None:
            write(line)
            if b'"fetching"' in line:
                looked.set()

        recorder._writer.write = watch  # type: ignore[method-assign]
        engine.ask(PROMPT).result(60)
        engine.saved()
        engine.check_idle()
    steps, state = replayed(path)
    assert lives(steps)[0] == ["fetching", "running", "finished"]
    assert Recording(path).header.tiers == ("dict",)
    assert state.tiers[0].blocks == 11
    assert max(cached for step in steps for _, _, cached in step.begin) == 36


def test_a_recorder_that_fails_costs_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ToyEngine(core={"record": Record(tmp_path / "run.jsonl")}) as engine:
        recorder = engine._loop.recorder
        assert recorder is not None
        recorder._changes.look = lambda: 1 / 0  # type: ignore[assignment, method-assign, return-value]
        assert engine.ask([5, 6], 4).result(60).token_ids == expected([5, 6], 4)
    assert "ends here" in caplog.text


def test_a_file_that_is_no_recording_is_refused_before_the_engine_starts(tmp_path: Path) -> None:
    (path := tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="not a recording"):
        ToyEngine(core={"record": Record(path)})
    assert path.read_text() == "mine"


def test_record_is_a_path_and_not_of_regions() -> None:
    with pytest.raises(TypeError, match="record=True: expected the path of a file"):
        EngineConfig(record=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="record: mode='reserved' cannot be recorded"):
        EngineConfig(record="run.jsonl", mode="reserved")
