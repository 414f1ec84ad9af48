"""Systems made by their names. Loads torch and transformers, which takes seconds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvpager.bench.throughput.by_engine import EngineSystem
from kvpager.bench.throughput.by_generate import PaddedBatches
from kvpager.bench.throughput.by_generate_batch import ContinuousBatches
from kvpager.bench.throughput.by_vllm import Vllm
from kvpager.bench.throughput.systems import Options, System
from kvpager.bench.throughput.workload import Workload


@contextlib.contextmanager
def opened(
    name: str, model: Any, folder: Path, options: Options, workload: Workload
) -> Iterator[System]:
    """The system of that name, sized for `workload`, while this lasts."""
    system = _make(name, model, folder, options, workload)
    try:
        yield system
    finally:
        system.close()


def _make(name: str, model: Any, folder: Path, options: Options, workload: Workload) -> System:
    if name in ("kvpager", "kvpager-compiled"):
        compiled = name == "kvpager-compiled"
        return EngineSystem(model, options, workload, compiled=compiled)
    if name in ("generate", "generate-rows"):
        rows = options.batch if name == "generate-rows" else None
        return PaddedBatches(model, rows)
    if name == "generate_batch":
        return ContinuousBatches(model, options)
    return Vllm(folder, options, workload, eager=name == "vllm-eager")
