"""What the parts of `benchmarks/throughput.py` share, and what they watch."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks import timing
from kvpager.bench import models
from kvpager.bench.throughput.by_engine import EngineSystem
from kvpager.bench.throughput.results import Run
from kvpager.bench.throughput.systems import Options
from kvpager.bench.throughput.workload import Workload, synthetic
from kvpager.engine.metrics import StepRecord
from kvpager.integrations.huggingface.engine import Engine
from kvpager.scheduling.scheduler import Scheduler

BLOCK = 16
Runs = dict[str, list[Run]]


class Sizes(NamedTuple):
    """How much of everything."""

    requests: int = 64
    prompt: tuple[int, int] = (32, 512)
    new: int = 128
    system_prompt: int = 1024
    shared_prompt: tuple[int, int] = (32, 128)
    shared_new: int = 32
    samples: int = 8
    sample_prompt: int = 512
    sample_new: int = 32
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    rows: int = 256
    rows_prompt: tuple[int, int] = (32, 64)


QUICK = Sizes(8, (16, 48), 8, 64, (4, 16), 4, 4, 64, 4, (1, 2, 4), 8, (4, 8))


class Bench:
    """What the parts share: the model, the sizes, and where figures go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.given = options
        self.sizes = QUICK if options.quick else Sizes()
        self.model = models.load(None)
        self.vocabulary = models.vocabulary(self.model)
        self.lines = timing.Lines()
        self.options = Options(
            block_size=BLOCK, threads=options.threads, vllm_python=options.vllm_python
        )

    def requests(self, count: int, prompt: tuple[int, int], new: int, shared: int = 0) -> Workload:
        return synthetic(count, prompt, new, vocabulary=self.vocabulary, prefix_len=shared)

    def usual(self) -> Workload:
        """The requests of `systems` and `memory`."""
        return self.requests(self.sizes.requests, self.sizes.prompt, self.sizes.new)

    def stage(self, name: str, repeat: int, count: int) -> Callable[[int], None]:
        timing.note(f"  {name}: {'getting ready' if repeat == 0 else f'turn {repeat}'}")
        return lambda done: None

    def engines(self, variants: dict[str, Options], work: Workload) -> Runs:
        """Engines that differ in their options, in turns over the same requests."""
        runs: Runs = {name: [] for name in variants}
        with contextlib.ExitStack() as stack:
            systems = {}
            for name, options in variants.items():
                self.stage(name, 0, 0)
                systems[name] = EngineSystem(self.model, options, work)
                stack.callback(systems[name].close)
                systems[name].run(work.warm_up(), lambda done: None)
            for turn in range(1, self.given.repeats + 1):
                for name, system in systems.items():
                    runs[name].append(system.run(work, self.stage(name, turn, 0)))
        return runs

    def rate(self, name: str, runs: list[Run], **more: Any) -> None:
        value = statistics.median(run.tokens_per_second for run in runs)
        first = statistics.median(each.to_first_token for run in runs for each in run.served)
        self.lines.add(name, value, "tokens/s", first_token_s=round(first, 3), **more)

    def faster(self, name: str, runs: list[Run], over: list[Run], **more: Any) -> None:
        """Add the ratio of tokens per second: the median over the turns."""
        pairs = zip(runs, over, strict=True)
        ratios = [run.tokens_per_second / other.tokens_per_second for run, other in pairs]
        self.lines.add(name, statistics.median(ratios), "ratio", **more)


class Sampler:
    """Some samples of one prompt: of one request, or of one request each."""

    def __init__(self, bench: Bench, *, together: bool) -> None:
        self.sizes, self.together = bench.sizes, together
        items = bench.requests(1, (self.sizes.sample_prompt,) * 2, self.sizes.sample_new)
        self.prompt = items.items[0].prompt
        self.peak = 0
        self.engine = Engine(
            models.share_weights(bench.model), memory="256MiB", block_size=BLOCK,
            prefix_cache=together,
            on_step=self.note,
        )  # fmt: skip

    def note(self, record: StepRecord) -> None:
        self.peak = max(self.peak, record.stats.pool.num_held)

    def __call__(self) -> None:
        self.engine.clear_prefix_cache()
        options = {"do_sample": True, "max_new_tokens": self.sizes.sample_new}
        count = self.sizes.samples
        if self.together:
            outputs = self.engine.generate([self.prompt], num_return_sequences=count, **options)
        else:
            outputs = self.engine.generate([self.prompt] * count, **options)
        found = [sample for output in outputs for sample in output.samples]
        assert [len(sample.token_ids) for sample in found] == [self.sizes.sample_new] * count


class Watched:
    """When steps are planned and completed, and how long that takes."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, bool, float]] = []  # when, all rows decode, seconds in it
        self._seconds = 0.0

    @contextlib.contextmanager
    def watching(self, num_rows: int) -> Iterator[None]:
        plan, complete = Scheduler.plan, Scheduler.complete

        def timed_plan(scheduler: Scheduler, *arguments: Any) -> Any:
            start = time.perf_counter()
            found = plan(scheduler, *arguments)
            seconds = time.perf_counter() - start
            decodes = found is not None and len(found) == len(found.token_ids) == num_rows
            self.steps.append((start, decodes, seconds))
            return found

        def timed_complete(scheduler: Scheduler, *arguments: Any) -> Any:
            start = time.perf_counter()
            found = complete(scheduler, *arguments)
            begun, decodes, seconds = self.steps[-1]
            self.steps[-1] = begun, decodes, seconds + time.perf_counter() - start
            return found

        # What is measured runs as it is, timed from outside.
        Scheduler.plan, Scheduler.complete = timed_plan, timed_complete  # type: ignore[method-assign]
        try:
            yield
        finally:
            Scheduler.plan, Scheduler.complete = plan, complete  # type: ignore[method-assign]

    def decoding(self) -> tuple[list[float], list[float]]:
        """Of steps in which all rows decode: how long they took, and the scheduler's part."""
        walls, parts = [], []
        for (begun, decodes, part), (ended, *_) in zip(self.steps, self.steps[1:], strict=False):
            if decodes:
                walls.append(ended - begun)
                parts.append(part)
        return walls, parts
