"""What a report costs: to write it, to open it, to move its slider. A JSON line each.

    python benchmarks/report.py                     # 100,000 steps and 100,000 blocks
    python benchmarks/report.py --recording R.jsonl # a recording of yours, or an earlier one

The recording is that of a real scheduler and block manager, whose model computes nothing: 64 rows,
prompts of 2,000 to 8,000 tokens behind four system prompts, replies of 500 to 4,000 tokens.
`replay` reads it and applies each step, as every reader must. Times in the browser are those of
Chromium without a window, which draws on the CPU; a slider step ends when both maps are drawn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# As a file of its own, too: `python benchmarks/report.py`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import timing
from kvpager import BlockManager, Request, Scheduler
from kvpager.recording.reader import Recording
from kvpager.recording.recorder import Described, Recorder
from kvpager.recording.replay import ReplayedState
from kvpager.report.writer import write_report

Figure = tuple[str, float, str]  # name, value, unit

SLIDER_JS = """() => {
  const slider = document.getElementById("step"), taken = [], most = Number(slider.max);
  for (let i = 0; i <= 120; i++) {
    slider.value = Math.round(i * most / 120);
    const began = performance.now();
    slider.dispatchEvent(new Event("input"));
    document.body.offsetHeight; // lays out
    for (const map of document.querySelectorAll("canvas.map")) {
      map.getContext("2d").getImageData(0, 0, 1, 1); // draws
    }
    taken.push(performance.now() - began);
  }
  return taken.slice(1);
}"""


def record(path: Path, num_steps: int, num_blocks: int) -> None:
    """Record a scheduler that always has requests to begin."""
    random = np.random.default_rng(0)
    systems = [random.integers(0, 32_000, 1024, dtype=np.int32) for _ in range(4)]
    manager = BlockManager(num_blocks, 16, num_host_blocks=num_blocks // 4)
    scheduler = Scheduler(manager, max_batch_tokens=8192, max_num_seqs=64, prefix_cache=True)
    described = Described("engine", max_tokens=16_384, policy="fifo", block_bytes=2**21)
    with Recorder.open(path, manager, described, scheduler.progress()) as recorder:
        number = 0
        for _ in range(num_steps):
            while scheduler.num_waiting < 4:
                own = random.integers(0, 32_000, random.integers(1000, 7000), dtype=np.int32)
                prompt = np.concatenate([systems[number % 4], own])
                new = int(random.integers(500, 4000))
                scheduler.submit(Request(request_id=number, prompt=prompt, max_new_tokens=new))
                number += 1
            plan = scheduler.plan()
            assert plan is not None
            recorder.step(plan)
            rows = plan.needs_logits.nonzero()[0]
            scheduler.complete(plan, rows, np.full(len(rows), 7, np.int32))


def replay(path: Path) -> None:
    recording = Recording(path)
    state = ReplayedState(recording.header)
    for step in recording:
        state.apply(step)


def seconds(work: Any, *arguments: Any) -> tuple[float, float]:
    """Seconds of the clock, and of the processor: they differ where other programs run."""
    began, used = time.perf_counter(), time.process_time()
    work(*arguments)
    return time.perf_counter() - began, time.process_time() - used


def figures(recording: Path, folder: Path, repeats: int) -> Iterator[Figure]:
    page = folder / "report.html"
    written = [seconds(write_report, recording, page) for _ in range(repeats)]
    yield "report_recording_mib", recording.stat().st_size / 2**20, "MiB"
    replayed = seconds(replay, recording)
    for index, kind in enumerate(("", "cpu_")):
        yield f"report_replay_{kind}s", replayed[index], "s"
        yield f"report_write_{kind}s", statistics.median(each[index] for each in written), "s"
    yield "report_file_kb", page.stat().st_size / 1000, "kB"
    yield from in_browser(page, repeats)


def in_browser(page: Path, repeats: int) -> Iterator[Figure]:
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        opened, steps = [], []
        for _ in range(repeats):
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            began = time.perf_counter()
            tab.goto(page.as_uri())
            tab.locator("html[data-ready=yes]").wait_for()
            opened.append(time.perf_counter() - began)
            steps += tab.evaluate(SLIDER_JS)
            tab.close()
        yield "report_open_s", statistics.median(opened), "s"
        yield "report_slider_step_ms", statistics.median(steps), "ms"
        yield "report_slider_step_p95_ms", statistics.quantiles(steps, n=20)[-1], "ms"
        yield "report_slider_step_most_ms", max(steps), "ms"
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recording", type=Path, help="use this recording; write it if it is new")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recording = options.recording or Path(folder, "run.jsonl")
        if not recording.exists():
            record(recording, options.steps, options.blocks)
        sizes = {"steps": options.steps, "blocks": options.blocks}
        sizes["playwright"] = timing.installed("playwright")
        print(json.dumps({"machine": timing.machine() | sizes}), flush=True)
        for name, value, unit in figures(recording, Path(folder), options.repeats):
            print(json.dumps({"name": name, "value": round(value, 3), "unit": unit}), flush=True)


if __name__ == "__main__":
    main()
