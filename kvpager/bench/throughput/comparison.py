"""Measure several systems on the same requests, in turns."""

from __future__ import annotations

import contextlib
import gc
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import kvpager
from kvpager import _validate as arguments
from kvpager.bench import models
from kvpager.bench.environment import installed
from kvpager.bench.throughput.by_engine import EngineSystem
from kvpager.bench.throughput.by_generate import PaddedBatches
from kvpager.bench.throughput.by_generate_batch import ContinuousBatches
from kvpager.bench.throughput.by_vllm import Vllm
from kvpager.bench.throughput.results import Figures, Run, compare
from kvpager.bench.throughput.systems import Options, Progress, System, check_names
from kvpager.bench.throughput.workload import Workload
from kvpager.storage.tiers.urls import bare_url

# Callback: system, repeat (0: warm-up) and number of requests -> progress callback.
Stage = Callable[[str, int, int], Progress]


def opened(
    name: str, model: Any, folder: Path, options: Options, workload: Workload
) -> contextlib.AbstractContextManager[System]:
    """Return a context of the named system, sized for `workload`, which it closes."""
    return contextlib.closing(_make(name, model, folder, options, workload))


def _make(name: str, model: Any, folder: Path, options: Options, workload: Workload) -> System:
    if name in ("kvpager", "kvpager-compiled"):
        compiled = name == "kvpager-compiled"
        return EngineSystem(model, options, workload, compiled=compiled)
    if name in ("generate", "generate-rows"):
        rows = options.batch_size if name == "generate-rows" else None
        return PaddedBatches(model, rows)
    if name == "generate_batch":
        return ContinuousBatches(model, options)
    return Vllm(folder, options, workload, eager=name == "vllm-eager")


def measure(
    names: Sequence[str],
    model: Any,
    workload: Workload,
    options: Options,
    *,
    model_path: str | None = None,
    repeats: int = 1,
    subsets: dict[str, int] | None = None,
    stage: Stage = lambda name, repeat, num_requests: lambda count: None,
    open_system: Any = opened,
) -> list[Figures]:
    """Measure each system `repeats` times, in turns: A B C A B C.

    Each system warms up on a few other requests. Turns spread a machine's drift over all systems.

    Args:
        names: names in `systems.SYSTEMS`.
        model: the model to serve.
        workload: the requests.
        options: for all systems.
        model_path: folder of `model`; None saves it for systems that load it.
        repeats: number of runs per system; figures are medians.
        subsets: system -> n: the system serves only the first n requests.
        stage: called before each run; returns a callback for its progress.
        open_system: replacement for `opened`.

    Raises: `ValueError` for an invalid argument; `KVPagerError` if a system fails.
    """
    options.check()
    names = check_names(names, options)
    repeats = arguments.count("repeats", repeats, at_least=1)
    workload.check(models.max_length(model))
    works = {name: workload.first((subsets or {}).get(name, len(workload.items))) for name in names}
    with contextlib.ExitStack() as stack:
        stack.enter_context(models.torch_threads(options.threads))
        stack.enter_context(models.quiet_transformers())
        folder = Path()
        if any(name.startswith("vllm") for name in names):  # it loads the model
            folder = stack.enter_context(models.saved(model, model_path))
        systems: dict[str, System] = {}
        for name in names:
            few = workload.warm_up()
            progress = stage(name, 0, len(few.items))
            opening = open_system(name, model, folder, options, works[name])
            systems[name] = stack.enter_context(opening)
            systems[name].run(few, progress)
        runs = take_turns(systems, works, repeats, stage)
    return compare(runs, _notes(works, len(workload.items)))


def take_turns(
    systems: dict[str, System], works: dict[str, Workload], repeats: int, stage: Stage
) -> dict[str, list[Run]]:
    """Run each system `repeats` times: A B C A B C. O(requests).

    Raises: `ValueError` if a request did not get all its tokens.
    """
    runs: dict[str, list[Run]] = {name: [] for name in systems}
    for repeat in range(1, repeats + 1):
        for name, system in systems.items():
            gc.collect()
            items = works[name].items
            run = system.run(works[name], stage(name, repeat, len(items)))
            run.check([item.new_tokens for item in items])
            runs[name].append(run)
    return runs


def _notes(works: dict[str, Workload], num_requests: int) -> dict[str, str]:
    return {
        name: f"the first {len(work.items)} of {num_requests} requests alone"
        for name, work in works.items()
        if len(work.items) < num_requests
    }


def describe(model: Any, workload: Workload, options: Options, **more: Any) -> dict[str, Any]:
    """Return what figures depend on, the first line of a file of figures. O(parameters)."""
    return {
        "workload": {
            "name": workload.name,
            "requests": len(workload.items),
            "prompt_tokens": workload.prompt_tokens,
            "new_tokens": workload.new_tokens,
            "longest": workload.longest,
            "last_arrival_s": workload.items[-1].arrival,
        },
        "model": {
            "class": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
        },
        "options": vars(options) | {"tiers": [*map(bare_url, options.tiers or ())]} | more,
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "threads": options.threads or torch.get_num_threads(),
            "python": platform.python_version(),
        },
        "versions": {
            "kvpager": kvpager.__version__,
            **{name: installed(name) for name in ("torch", "transformers", "numpy")},
        },
    }


def _processor() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
