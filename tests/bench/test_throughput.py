"""Several systems over the same requests: what is measured, and what is refused."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from kvpager.bench import models
from kvpager.bench.throughput import comparison, report, systems
from kvpager.bench.throughput.by_engine import EngineSystem, busiest
from kvpager.bench.throughput.by_generate import PaddedBatches
from kvpager.bench.throughput.results import (
    Memory,
    Moment,
    Run,
    Served,
)
from kvpager.bench.throughput.systems import Options
from kvpager.bench.throughput.workload import (
    Item,
    Workload,
)
from kvpager.errors import KVPagerError
from kvpager.scheduling.preemption import PreemptionCosts
from tests.conformance.architectures import VOCAB
from tests.support.throughput_cases import FIELDS, requests, silent, tiny
from tests.support.tiered_engines import patient_tiering

# --- systems --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_systems_give_the_same_tokens_and_every_figure() -> None:
    model, work = tiny(), requests()
    names = ["kvpager", "generate", "generate-rows", "generate_batch"]
    figures = comparison.measure(names, model, work, Options(batch_size=4, threads=1), repeats=2)
    assert [each.system for each in figures] == names
    expected = [served.tokens for served in figures[0].last.served]
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    for each in figures:
        assert all([served.tokens for served in run.served] == expected for run in each.runs), (
            each.system
        )
        found = each.as_record()
        assert set(found) == FIELDS
        assert (found["requests"], found["repeats"], found["generated_tokens"]) == (6, 2, 42)
        assert 0 < found["first_token_s_median"] <= found["first_token_s_p99"] < found["seconds"]
        assert found["tokens_per_s"] > 0
        assert len(found["tokens_per_s_of_each_repeat"]) == 2
        json.dumps(found)
    assert figures[0].over_kvpager == 1.0
    told = comparison.describe(model, work, Options())
    assert told["model"]["class"] == "LlamaForCausalLM"
    assert told["versions"]["transformers"]
    printed = report.lines(told, figures).splitlines()
    assert [json.loads(line).get("system") for line in printed] == [None, *names]


def test_the_memory_of_a_padded_batch_counts_its_padding() -> None:
    items = (Item(0.0, [5] * 10, 4), Item(0.0, [5] * 30, 4), Item(0.0, [5] * 20, 1))
    model = tiny()
    run = PaddedBatches(model, None).run(Workload("three", items, VOCAB), silent)
    config = model.config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    columns = 30 + 3  # the last token is never written
    assert run.memory == Memory(3 * columns * token_bytes, (10 + 3 + 30 + 3) / (3 * columns))
    assert [len(each.tokens) for each in run.served] == [4, 4, 1]


def test_the_busiest_moment_is_the_one_with_most_blocks() -> None:
    moments = [
        Moment(0.1 * held, 1, 1, held, 9, use, 1, 0, 0)
        for held, use in ((3, 0.5), (7, 0.75), (7, 0.25), (2, 1.0))
    ]
    assert busiest(moments, 100) == Memory(700, 0.75)
    assert busiest([], 100) is None


def test_a_small_pool_preempts_and_gives_the_same_tokens() -> None:
    model, work = tiny(), requests(9)
    free = _engine_run(model, Options(block_size=4), work)
    assert (free.swapped, free.recomputed) == (0, 0)
    assert free.memory is not None
    third = free.memory.held_bytes // 3
    tight = _engine_run(model, Options(memory=third, block_size=4), work)
    assert tight.memory is not None
    assert tight.memory.held_bytes <= third
    assert tight.recomputed
    assert max(moment.preempted for moment in tight.moments) > 0
    assert [each.tokens for each in tight.served] == [each.tokens for each in free.served]


def _engine_run(model: Any, options: Options, work: Workload) -> Run:
    system = EngineSystem(model, options, work)
    try:
        return system.run(work, silent)
    finally:
        system.close()


def test_the_first_step_sees_all_requests_that_are_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slowly(self: EngineSystem, item: Item) -> Any:
        stream = submit(self, item)
        if not self.engine._core._pauses.is_any:
            stream.result()  # as if the next one were submitted after its end
        return stream

    submit = EngineSystem._submit
    monkeypatch.setattr(EngineSystem, "_submit", slowly)
    run = _engine_run(tiny(), Options(), requests(12))
    assert run.moments[0].running + run.moments[0].waiting == 12


def test_prefixes_are_shared_within_a_run_and_forgotten_after_it() -> None:
    work = requests(5, prefix_len=32)
    figures = comparison.measure(["kvpager"], tiny(), work, Options(), repeats=2)
    first, second = (run.hit_tokens for run in figures[0].runs)
    assert first == second
    assert first is not None
    assert first >= 4 * 32
    (without,) = comparison.measure(["kvpager"], tiny(), work, Options(prefix_cache=False))
    assert without.last.hit_tokens == 0


def test_a_run_over_tiers_finds_what_another_process_saved(tmp_path: Path) -> None:
    pytest.importorskip("xxhash")
    work, secret = requests(5, prefix_len=32), tmp_path / "secret"
    secret.write_bytes(b"s" * 32)
    options = Options(
        tiers=[f"disk:{tmp_path}/kv?capacity=8MiB"],
        secret_file=str(secret),
        engine={"costs": PreemptionCosts(seconds_per_token=100.0)},  # every fetch is worth it
    )
    for is_warm in (False, True):
        with patient_tiering():
            [figures] = comparison.measure(["kvpager"], tiny(), work, options, repeats=2)
        for run in figures.runs:
            assert run.tier_tokens is not None
            assert run.hit_tokens is not None
            assert run.hit_tokens >= 4 * 32
            assert (run.tier_tokens > 0) == is_warm
    assert comparison.describe(tiny(), work, options)["options"]["tiers"] == [f"disk:{tmp_path}/kv"]


def test_a_run_without_tiers_reports_no_hits_of_tiers() -> None:
    assert _engine_run(tiny(), Options(), requests(2)).tier_tokens is None


def test_a_request_that_never_fits_is_an_error() -> None:
    model, work = tiny(), requests(prefix_len=64)
    system = EngineSystem(model, Options(), work)
    system.close()
    small = Options(memory=2 * system.block_bytes)
    with pytest.raises(KVPagerError, match=r"allows 2\. Raise memory to"):
        _engine_run(model, small, work)


def test_a_copy_shares_the_weights_but_has_its_own_settings() -> None:
    model = tiny()
    copied = models.share_weights(model)
    mine, its = dict(model.named_parameters()), dict(copied.named_parameters())
    assert all(its[name] is parameter for name, parameter in mine.items())
    copied.set_attn_implementation("eager")
    assert model.config._attn_implementation != "eager"


def test_the_default_model_is_deterministic_and_loads_again() -> None:
    model = models.load(None)
    assert sum(parameter.numel() for parameter in model.parameters()) // 10**6 == 27
    with models.saved(model, None) as folder:
        again = models.load(str(folder))
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert not folder.exists()
    for name, weight in models.load(None).state_dict().items():
        assert (again.state_dict()[name] == weight).all()
    assert again.generation_config.eos_token_id is None


# --- taking turns ---------------------------------------------------------------------------------


class Scripted:
    """A system that takes as long as it is told to, and writes down when it is called."""

    def __init__(self, name: str, seconds: Iterator[float], calls: list[str]) -> None:
        self.name, self.seconds, self.calls = name, seconds, calls
        self.lost = 0

    def run(self, workload: Workload, progress: Any) -> Run:
        self.calls.append(f"{self.name} {len(workload.items)}")
        seconds = next(self.seconds)
        served = [
            Served(0.0, seconds / 2, seconds, [5] * (item.new_tokens - self.lost))
            for item in workload.items
        ]
        progress(len(served))
        return Run(seconds, served)

    def close(self) -> None:
        self.calls.append(f"{self.name} closed")


def scripted(calls: list[str], times: dict[str, list[float]], lost: int = 0) -> Any:
    @contextmanager
    def open_system(name: str, *_: Any) -> Iterator[Scripted]:
        system = Scripted(name, iter(times[name]), calls)
        system.lost = lost
        try:
            yield system
        finally:
            system.close()

    return open_system


@pytest.mark.slow
def test_systems_warm_up_and_then_take_turns() -> None:
    calls: list[str] = []
    stages: list[tuple[str, int, int]] = []

    def stage(name: str, repeat: int, count: int) -> Any:
        stages.append((name, repeat, count))
        return silent

    times = {"kvpager": [9.0, 1.0, 2.0, 4.0], "generate_batch": [9.0, 2.0, 1.0, 8.0]}
    figures = comparison.measure(
        list(times), tiny(), requests(6), Options(), repeats=3, subsets={"generate_batch": 3},
        stage=stage, open_system=scripted(calls, times),
    )  # fmt: skip
    assert calls[:4] == ["kvpager 4", "generate_batch 4", "kvpager 6", "generate_batch 3"]
    assert calls[4:8] == ["kvpager 6", "generate_batch 3"] * 2
    assert sorted(calls[8:]) == ["generate_batch closed", "kvpager closed"]
    assert stages[:3] == [("kvpager", 0, 4), ("generate_batch", 0, 4), ("kvpager", 1, 6)]
    ours, theirs = (each.as_record() for each in figures)
    assert ours["tokens_per_s"] == 21.0  # 6 requests of 7 tokens in 2 seconds
    # 10.5 of 42, 21 of 21, 2.625 of 10.5: medians of what stood side by side.
    assert theirs["over_kvpager"] == 0.25
    assert ours["first_token_s_median"] == 1.0
    assert ours["per_token_s_median"] == pytest.approx(1 / 6)
    assert theirs["note"] == "the first 3 of 6 requests alone"
    assert ours["note"] is None


def test_replies_of_another_length_than_asked_for_are_no_figures() -> None:
    calls: list[str] = []
    with pytest.raises(ValueError, match="request 0 got 6 of 7 tokens"):
        comparison.measure(
            ["generate"], tiny(), requests(), Options(),
            open_system=scripted(calls, {"generate": [1.0, 1.0]}, lost=1),
        )  # fmt: skip
    assert calls[-1] == "generate closed"


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["nothing"], {}, "systems=nothing: expected names from kvpager, "),
        ([], {}, "none given"),
        (["generate-rows"], {}, "systems=generate-rows: set batch_size"),
        (["kvpager"], {"batch_size": 0}, "batch_size.0"),
        (["kvpager"], {"memory": "many"}, "memory.'many'"),
        (["kvpager"], {"block_size": 3}, "block_size.3"),
        (["kvpager"], {"threads": 0}, "threads.0"),
        (["vllm"], {"vllm_python": "nowhere"}, "vllm_python=nowhere: no interpreter"),
        (["kvpager"], {"tiers": ["floppy:a"]}, "no store is called 'floppy'"),
        (["kvpager"], {"secret_file": "a"}, "secret_file=a: of use with tiers only"),
        (["kvpager", "kvpager-compiled"], {"tiers": ["host:1MiB"]}, "cannot share them"),
    ],
)
def test_systems_and_options_that_make_no_sense_are_refused(
    names: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        comparison.measure(names, tiny(), requests(), Options(**options))


def test_a_system_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="vLLM is not installed"):
        systems.check_names(["vllm"], Options())
    assert systems.usual(Options()) == ["kvpager", "generate", "generate_batch"]
    assert systems.usual(Options(batch_size=2, vllm_python=sys.executable), compiled=True) == list(
        systems.SYSTEMS
    )


# --- vLLM, played by a few lines ------------------------------------------------------------------

FAKE_VLLM = """
import os, sys
from types import SimpleNamespace

__version__ = "0.0.fake"
print("what vLLM prints is no answer")


class SamplingParams(SimpleNamespace):
    pass


class LLM:
    def __init__(self, **settings):
        if settings["enforce_eager"]:
            raise RuntimeError("no eager mode in this fake")
        assert settings["max_num_seqs"] == 2 and os.environ["VLLM_CPU_KVCACHE_SPACE"] == "1"
        cache = SimpleNamespace(num_gpu_blocks=10, block_size=8)
        self.llm_engine = self
        self.vllm_config = SimpleNamespace(cache_config=cache)
        self.going, self.steps = {}, 0

    def reset_prefix_cache(self):
        pass

    def add_request(self, name, prompt, params):
        assert params.ignore_eos and params.output_kind == "delta"
        self.going[name] = [prompt["prompt_token_ids"], params.max_tokens]

    def has_unfinished_requests(self):
        return bool(self.going)

    def step(self):
        self.steps += 1
        for name, request in list(self.going.items()):
            request[1] -= 1
            token = sum(request[0]) + request[1]
            if not request[1]:
                del self.going[name]
            output = SimpleNamespace(token_ids=[token])
            yield SimpleNamespace(request_id=name, outputs=[output], finished=not request[1])

    def get_metrics(self):
        found = {"num_preemptions": self.steps, "prefix_cache_hits": 2 * self.steps}
        found["kv_cache_usage_perc"] = 0.5
        return [SimpleNamespace(name="vllm:" + name, value=v) for name, v in found.items()]
"""


@pytest.fixture
def vllm_python(tmp_path: Path) -> str:
    """An environment whose interpreter finds the fake."""
    package = tmp_path / "lib" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_VLLM)
    (package / "sampling_params.py").write_text("class RequestOutputKind:\n    DELTA = 'delta'\n")
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path / "lib"}" exec "{sys.executable}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return str(tmp_path / "env")


def test_vllm_serves_in_an_interpreter_of_its_own(vllm_python: str) -> None:
    model = tiny()
    options = Options(vllm_python=vllm_python, max_num_seqs=2)
    (figures,) = comparison.measure(["vllm"], model, requests(3), options, repeats=2)
    for number, each in enumerate(figures.last.served):
        total = sum(requests(3).items[number].prompt)
        assert each.tokens == [total + left for left in range(6, -1, -1)]
        assert 0 <= each.arrival <= each.first_token <= each.finished
    found = figures.as_record()
    assert (found["preempted_by_swap"], found["preempted_by_recompute"]) == (0, 7)
    assert found["prefix_hit_tokens"] == 14
    config = model.config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert found["kv_peak_bytes"] == 5 * 8 * token_bytes


def test_what_vllm_said_before_it_ended_is_shown(vllm_python: str) -> None:
    options = Options(vllm_python=vllm_python)
    with pytest.raises(KVPagerError, match=r"(?s)exit code 1.*no eager mode in this fake"):
        comparison.measure(["vllm-eager"], tiny(), requests(), options)
