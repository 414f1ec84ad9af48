"""Measure SGLang with a store of kvpager beside SGLang alone: a JSON line per figure.

    make sglang                                        # once: it makes .venv-sglang
    .venv-sglang/bin/python benchmarks/sglang_hicache.py

Two engines of a small llama in float32 take turns, each in processes of its own, on one thread:
SGLang `without` HiCache, and with HiCache and kvpager's `disk` store below it.

`first_token`: a prompt of 2,048 tokens was computed before, and has left the device and SGLang's
host memory. `device`: it is still on the device. `cold`: a prompt that is new, and 8 tokens. `cpu`
is user and system time of the engine's processes, `wall` is elapsed time. `of_without` divides by
the time of SGLang alone, the median over the turns.

The model is wider than those of other benchmarks: SGLang's attention for CPUs computes the scores
of cached tokens again, which would take most of the time of a narrow model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# As a file of its own, too: `python benchmarks/sglang_hicache.py`.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from vllm_offload import MODEL, add  # noqa: E402

from benchmarks import timing  # noqa: E402
from tests.support.sglang_scenarios import ENVIRONMENT, Driver, tokens  # noqa: E402

PREFIX = 2048
WIDTHS = {"hidden_size": 1024, "intermediate_size": 4096}
MODES = ("without", "disk")
KINDS = ("first_token", "device", "cold")


def save_model(folder: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODEL | WIDTHS)).save_pretrained(folder)


def cpu_seconds() -> float:
    """Return user and system time of this process and those it started."""
    import psutil

    own = psutil.Process()
    times = [each.cpu_times() for each in (own, *own.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def serve(mode: str, folder: str) -> None:
    """Answer `KIND NUMBER` lines with the seconds that the request took."""
    settings: dict[str, Any] = {"max_total_tokens": 8192, "page_size": 32}
    if mode == "disk":
        from kvpager.integrations.sglang import offload

        settings |= offload(
            f"disk:{folder}/kv?capacity=2GiB&admit=always",
            hicache_io_backend="direct",
            hicache_mem_layout="page_first_direct",
        )
    driver = Driver(folder, **settings)
    prefix = tokens(1, PREFIX)
    driver.ask([prefix + tokens(2, 40)], 1)
    print("ready", flush=True)
    for line in sys.stdin:
        kind, number = line.split()
        if kind != "device":
            driver.forget()
        prompt = tokens(10_000 + int(number), PREFIX) if kind == "cold" else prefix
        prompt = prompt + tokens(20_000 + int(number) + 100 * KINDS.index(kind), 40)
        wall, cpu = time.perf_counter(), cpu_seconds()
        answer = driver.ask([prompt], 8 if kind == "cold" else 1)
        seconds = {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}
        print(json.dumps(seconds | {"cached": answer["cached"][0]}), flush=True)
    driver.engine.shutdown()


class Engine:
    """An engine in processes of its own."""

    def __init__(self, mode: str, folder: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", mode, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )

    def wait(self) -> None:
        """Wait until the engine can answer."""
        while (line := self.process.stdout.readline()) != "ready\n":
            if not line:
                raise SystemExit("an engine ended")

    def ask(self, kind: str, number: int) -> dict[str, Any]:
        print(kind, number, file=self.process.stdin, flush=True)
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found


def measure(engines: dict[str, Engine], kind: str, repeats: int) -> None:
    times: dict[str, list[dict[str, Any]]] = {mode: [] for mode in engines}
    for turn in range(repeats + 1):  # the first turn is not counted
        for mode, engine in engines.items():
            times[mode].append(engine.ask(kind, turn))
            stored = PREFIX if (kind, mode) == ("first_token", "disk") else 0
            cached = [PREFIX if kind == "device" else 0, 0, stored]
            assert times[mode][-1]["cached"] == cached, (mode, times[mode][-1])
    for clock in ("cpu", "wall"):
        each = {mode: [turn[clock] for turn in times[mode][1:]] for mode in engines}
        for mode, seconds in each.items():
            add(f"{kind}_{mode}_{clock}", statistics.median(seconds), "s")
        ratios = [a / b for a, b in zip(each["disk"], each["without"], strict=True)]
        add(f"{kind}_disk_{clock}_of_without", statistics.median(ratios), "ratio")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--kinds", default=",".join(KINDS), help="figures, separated by commas")
    parser.add_argument("--serve", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("folder", nargs="?", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.folder)
        return
    about = timing.machine() | {"sglang": timing.installed("sglang"), "cpus": os.cpu_count()}
    print(json.dumps({"machine": about}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        engines = {mode: Engine(mode, folder) for mode in MODES}
        for engine in engines.values():
            engine.wait()
        for kind in args.kinds.split(","):
            measure(engines, kind, args.repeats)
        for engine in engines.values():
            engine.process.stdin.close()
            engine.process.wait()


if __name__ == "__main__":
    main()
