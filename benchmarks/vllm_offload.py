"""Measure vLLM with kvpager's tiers beside vLLM alone: a JSON line per figure.

    make vllm                                          # once: it makes .venv-vllm
    .venv-vllm/bin/python benchmarks/vllm_offload.py

Two engines of a small llama in float32 take turns, each in a process of its own, on one thread.
`first_token`: a prompt of 2,048 tokens was computed before, and has left the device. `cold`: a
prompt that is new, and 16 tokens. `cpu` is user and system time of the process, `wall` is elapsed
time. `of_without` divides by the time of vLLM alone, the median over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# As a file of its own, too: `python benchmarks/vllm_offload.py`.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.vllm_scenarios import ENVIRONMENT, Driver, tokens  # noqa: E402

PREFIX = 2048
MODEL = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
MODES = ("without", "offload")


def save_model(folder: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(folder)


def serve(model: str, mode: str) -> None:
    """Answer `KIND NUMBER` lines with the seconds that the request took."""
    settings = {}
    if mode == "offload":
        from kvpager.integrations.vllm import offload

        settings["kv_transfer_config"] = offload("1GiB")
    driver = Driver(model, 300, max_len=4096, **settings)
    prefix = tokens(1, PREFIX)
    driver.ask([prefix + tokens(2, 40)], 1)
    print("ready", flush=True)
    for line in sys.stdin:
        kind, number = line.split()
        driver.forget()
        prompt = tokens(10_000 + int(number), PREFIX) if kind == "cold" else prefix
        wall, cpu = time.perf_counter(), time.process_time()
        answer = driver.ask(
            [prompt + tokens(20_000 + int(number), 40)], 16 if kind == "cold" else 1
        )
        seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps(seconds | {"cached": answer["cached"][0]}), flush=True)


class Engine:
    """An engine in a process of its own."""

    def __init__(self, model: str, mode: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", mode, model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        while (line := self.process.stdout.readline().strip()) != "ready":
            if not line and self.process.poll() is not None:
                raise SystemExit(f"the engine {mode} ended")

    def ask(self, kind: str, number: int) -> dict[str, Any]:
        print(kind, number, file=self.process.stdin, flush=True)
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found


def measure(engines: dict[str, Engine], kind: str, repeats: int) -> None:
    times: dict[str, list[dict[str, Any]]] = {mode: [] for mode in engines}
    for turn in range(repeats + 1):  # the first turn is not counted
        for mode, engine in engines.items():
            times[mode].append(engine.ask(kind, turn))
            expected = PREFIX if (kind, mode) == ("first_token", "offload") else 0
            assert times[mode][-1]["cached"] == expected
    for clock in ("cpu", "wall"):
        each = {mode: [turn[clock] for turn in times[mode][1:]] for mode in engines}
        for mode, seconds in each.items():
            add(f"{kind}_{mode}_{clock}", statistics.median(seconds), "s")
        ratios = [a / b for a, b in zip(each["offload"], each["without"], strict=True)]
        add(f"{kind}_{clock}_of_without", statistics.median(ratios), "ratio")


def add(name: str, value: float, unit: str) -> None:
    print(json.dumps({"name": name, "value": round(value, 4), "unit": unit}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--serve", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("model", nargs="?", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.model, args.serve)
        return
    about = {"platform": platform.platform(), "python": platform.python_version()}
    print(json.dumps({"machine": about | {"cpus": os.cpu_count()}}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        engines = {mode: Engine(folder, mode) for mode in MODES}
        for kind in ("first_token", "cold"):
            measure(engines, kind, args.repeats)
        for engine in engines.values():
            engine.process.stdin.close()
            engine.process.wait()


if __name__ == "__main__":
    main()
