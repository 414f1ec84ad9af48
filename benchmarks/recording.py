"""What `Engine(record=...)` costs: engines with and without take turns, a JSON line per batch.

    python benchmarks/recording.py               # 1, 16 and 64 requests of a model of 28 million
    python benchmarks/recording.py --rows 16

`share`: CPU time of the engine's thread in the recorder, of that in all steps. Other work on the
machine does not change it. `ratio`: wall time with a recording, of without; the median of the
turns. `bytes_per_step`: of the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# As a file of its own, too: `python benchmarks/recording.py`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import timing
from kvpager import Engine
from kvpager.bench.models import default_model

PROMPT, NEW = 64, 24


class Clock:
    """Sums the CPU seconds that the calling thread spends in a function."""

    def __init__(self, function: Any) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        start = time.thread_time()
        try:
            return self.function(*arguments, **options)
        finally:
            self.seconds += time.thread_time() - start


def measure(model: Any, rows: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Serve the same batch with and without a recording, in turns."""
    path = folder / "run.jsonl"
    options: dict[str, Any] = {"memory": "256MiB", "forward": "packed"}
    with Engine(model, record=path, **options) as recorded, Engine(model, **options) as plain:
        recorder = recorded._core._loop.recorder
        clock = Clock(recorder.step)
        recorder.step = clock
        step = Clock(recorded._core._loop.step)
        recorded._core._loop.step = step
        ratios, number, start = [], 0, time.perf_counter()
        while len(ratios) < 3 or time.perf_counter() - start < seconds:
            number += 1
            prompts = [
                [3 + (number + row * at) % 4000 for at in range(PROMPT)] for row in range(rows)
            ]
            taken = {}
            for name, engine in (("with", recorded), ("without", plain))[
                :: 1 if number % 2 else -1
            ]:
                begin = time.perf_counter()
                engine.generate(prompts, max_new_tokens=NEW, do_sample=False)
                taken[name] = time.perf_counter() - begin
            if number == 1:
                clock.seconds = step.seconds = 0.0
                steps_before = recorder._num_steps
            else:
                ratios.append(taken["with"] / taken["without"])
        steps = recorder._num_steps - steps_before
    return {
        "rows": rows,
        "share": round(clock.seconds / step.seconds, 5),
        "recorder_us": round(clock.seconds / steps * 1e6, 1),
        "step_ms": round(step.seconds / steps * 1e3, 2),
        "ratio": round(statistics.median(ratios), 4),
        "turns": len(ratios),
        "bytes_per_step": round(path.stat().st_size / recorder._num_steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number of rows")
    arguments = parser.parse_args()
    timing.describe()
    model = default_model().float()
    with tempfile.TemporaryDirectory() as folder:
        for rows in arguments.rows:
            print(json.dumps(measure(model, rows, arguments.seconds, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
