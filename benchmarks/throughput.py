"""Continuous batching: the Engine beside transformers' generate and vLLM.

    python benchmarks/throughput.py --vllm-python ENV     # all of it, half an hour or so
    python benchmarks/throughput.py --only systems        # one part; several with commas
    python benchmarks/throughput.py --quick               # small requests, a minute or two
    python benchmarks/throughput.py --only concurrency --plot docs/images/throughput.svg

The model is a Llama of 28 million parameters in bfloat16 with random weights. The parts:

    systems      64 requests at once, prompts of 32 to 512 tokens, 128 new tokens each: tokens/s by
                 system, and the peak of the KV cache
    memory       the same requests with room for a third of them: preemption by recompute and by
                 swap, beside a number of rows that never needs preemption
    shared       64 requests behind a system prompt of 1,024 tokens, with and without prefix_cache;
                 8 samples of one prompt beside 8 separate requests
    concurrency  1, 2, 4 .. 256 requests at once
    scheduler    the share of a step of 256 rows that scheduler and block manager take

Contenders take turns. A ratio is the median of the ratios within the turns; above 1, the first
contender is quicker. Tokens of two runs may differ by rounding, because the batches differ.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

# As a file of its own, too: `python benchmarks/throughput.py`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import timing
from benchmarks.memory import plot_file
from benchmarks.throughput_rig import BLOCK, Bench, Sampler, Watched
from kvpager.bench import models, plots
from kvpager.bench.throughput import comparison, report
from kvpager.bench.throughput.by_engine import EngineSystem
from kvpager.bench.throughput.results import Figures, Run
from kvpager.bench.throughput.workload import Workload
from kvpager.integrations.huggingface.engine import Engine
from kvpager.scheduling.preemption import PreemptionCosts

# -------------------------------------------------------------------- systems, and their memory


def systems(bench: Bench) -> None:
    names = ["kvpager", "kvpager-compiled", "generate", "generate_batch"]
    if bench.given.no_compile:
        names.remove("kvpager-compiled")
    if bench.given.vllm_python is not None:
        names += ["vllm-eager", "vllm"]
    work = bench.usual()
    subset = {} if bench.given.all_generate_batch else {"generate_batch": 8}
    figures = comparison.measure(
        names, bench.model, work, bench.options,
        repeats=bench.given.repeats, subsets=subset, stage=bench.stage,
    )  # fmt: skip
    for each in figures:
        found = each.as_record()
        name = each.system.replace("-", "_")
        value = found.pop("tokens_per_s")
        bench.lines.add(f"throughput_{name}", value, "tokens/s", **_rounded(found))
        if each is not figures[0]:
            assert each.over_kvpager is not None
            bench.lines.add(f"throughput_kvpager_vs_{name}", 1 / each.over_kvpager, "ratio")
    slots(bench, figures[0], work)


def _rounded(record: dict[str, Any]) -> dict[str, Any]:
    return {
        key: round(value, 4) if isinstance(value, float) else value
        for key, value in record.items()
        if not isinstance(value, list)
    }


def slots(bench: Bench, figures: Figures, work: Workload) -> None:
    """Add the peak of the KV cache, and the size of a reserved region per request."""
    memory = figures.last.memory
    assert memory is not None
    config = bench.model.config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    places = {"model_limit": config.max_position_embeddings, "longest_request": work.longest}
    bench.lines.add("kv_live_share_at_peak", memory.live_share, "fraction", goal=0.96)
    bench.lines.add("kv_held_bytes_at_peak", memory.held_bytes, "bytes")
    for name, tokens in places.items():
        reserved = len(work.items) * tokens * token_bytes
        bench.lines.add(f"kv_reserved_bytes_{name}", reserved, "bytes", tokens_each=tokens)
        bench.lines.add(f"kv_reserved_{name}_over_held", reserved / memory.held_bytes, "ratio")


# -------------------------------------------------------------------- too little memory


def memory(bench: Bench) -> None:
    work = bench.usual()
    third = work.blocks(BLOCK) // 3
    measured = EngineSystem(bench.model, bench.options, work)
    measured.close()
    tight = replace(bench.options, memory=third * measured.block_bytes)
    host = work.blocks(BLOCK) * measured.block_bytes
    never, always = (
        PreemptionCosts(seconds_per_block=math.inf),
        PreemptionCosts(seconds_per_block=0.0),
    )
    rows = never_preempted(work, third)
    runs = bench.engines(
        {
            "roomy": bench.options,
            "capped": replace(tight, max_num_seqs=rows),
            "recompute": replace(tight, host_memory=host, engine={"costs": never}),
            "swap": replace(tight, host_memory=host, engine={"costs": always}),
        },
        work,
    )
    for name, mine in runs.items():
        last = mine[-1]
        bench.rate(
            f"third_{name}", mine, preempted_by_swap=last.swapped,
            preempted_by_recompute=last.recomputed, max_num_seqs=rows if name == "capped" else None,
            same_tokens=round(same_tokens(last, runs["roomy"][-1]), 4),
        )  # fmt: skip
    for name in ("recompute", "swap"):
        bench.faster(f"third_{name}_vs_capped", runs[name], runs["capped"])
        bench.faster(f"third_{name}_vs_roomy", runs[name], runs["roomy"])


def never_preempted(work: Workload, num_blocks: int) -> int:
    """Return the number of rows that always fit, whichever requests they are."""
    needs = sorted(
        (-(-(len(item.prompt) + item.new_tokens) // BLOCK) for item in work.items), reverse=True
    )
    usable = num_blocks - math.ceil(num_blocks / 100)  # the scheduler keeps a hundredth back
    fit = [rows for rows in range(1, len(needs) + 1) if sum(needs[:rows]) <= usable]
    return max(fit, default=1)


def same_tokens(run: Run, other: Run) -> float:
    pairs = zip(run.served, other.served, strict=True)
    return statistics.mean(one.tokens == two.tokens for one, two in pairs)


# -------------------------------------------------------------------- what requests share


def shared(bench: Bench) -> None:
    sizes = bench.sizes
    work = bench.requests(
        sizes.requests, sizes.shared_prompt, sizes.shared_new, sizes.system_prompt
    )
    variants = {"cached": bench.options, "uncached": replace(bench.options, prefix_cache=False)}
    runs = bench.engines(variants, work)
    for name, mine in runs.items():
        held = mine[-1].memory
        bench.rate(
            f"shared_prompt_{name}", mine, prefix_hit_tokens=mine[-1].hit_tokens,
            held_bytes=held.held_bytes if held else None,
        )  # fmt: skip
    bench.faster("shared_prompt_cached_vs_uncached", runs["cached"], runs["uncached"])
    samples(bench)


def samples(bench: Bench) -> None:
    contenders = {
        "one_request": Sampler(bench, together=True),
        "separate": Sampler(bench, together=False),
    }
    try:
        times = timing.turns(contenders, max(bench.given.repeats, 3))
    finally:
        for contender in contenders.values():
            contender.engine.close()
    for name, contender in contenders.items():
        seconds = statistics.median(times[name])
        bench.lines.add(f"samples_{name}_ms", 1000 * seconds, "ms", blocks=contender.peak)
    bench.lines.add(
        "samples_one_request_vs_separate", timing.ratio(times, "separate", "one_request"), "ratio"
    )
    fewer = contenders["separate"].peak / contenders["one_request"].peak
    bench.lines.add("samples_blocks_of_separate_over_one_request", fewer, "ratio")


# -------------------------------------------------------------------- concurrency


def concurrency(bench: Bench) -> None:
    names = ["kvpager", "generate"]
    rates: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    for rows in bench.sizes.concurrency:
        work = bench.requests(rows, bench.sizes.prompt, bench.sizes.new)
        options = replace(bench.options, max_num_seqs=rows)
        figures = comparison.measure(
            names, bench.model, work, options, repeats=bench.given.repeats, stage=bench.stage
        )
        for each in figures:
            bench.rate(f"concurrency_{rows}_{each.system}", each.runs)
            value = statistics.median(run.tokens_per_second for run in each.runs)
            rates[each.system].append((rows, value))
        bench.faster(f"concurrency_{rows}_vs_generate", figures[0].runs, figures[1].runs)
    if bench.given.plot is not None:
        draw(bench.given.plot, rates, bench)


def draw(file: Path, rates: dict[str, list[tuple[int, float]]], bench: Bench) -> None:
    """Plot tokens per second over the number of concurrent requests, as .svg or .png."""
    low, high = bench.sizes.prompt
    work = bench.requests(1, bench.sizes.prompt, bench.sizes.new)
    setting = report.setting(comparison.describe(bench.model, work, bench.options))
    with plots.saved(file, (7.5, 4.5)) as figure:
        axes = figure.subplots()
        for (name, points), look in zip(rates.items(), plots.looks(), strict=False):
            label = "kvpager's Engine" if name == "kvpager" else "generate, one padded batch"
            axes.plot(*zip(*points, strict=True), **look, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(bench.sizes.concurrency, [str(rows) for rows in bench.sizes.concurrency])
        axes.set(xlabel="requests at once", ylabel="tokens/s")
        axes.set_ylim(bottom=0)
        axes.legend()
        title = f"Prompts of {low} to {high} tokens, {bench.sizes.new} new tokens each"
        plots.titles(figure, title, "\n".join(setting))


# -------------------------------------------------------------------- the scheduler's share


def scheduler(bench: Bench) -> None:
    rows = bench.sizes.rows
    work = bench.requests(rows, bench.sizes.rows_prompt, bench.sizes.new)
    watched = Watched()
    with watched.watching(rows), Engine(models.share_weights(bench.model), memory="1GiB") as engine:
        prompts = [item.prompt for item in work.items]
        engine.generate(prompts, max_new_tokens=bench.sizes.new)
    walls, parts = watched.decoding()
    wall, part = statistics.median(walls), statistics.median(parts)
    bench.lines.add(f"step_{rows}_rows_ms", 1000 * wall, "ms", steps=len(walls))
    bench.lines.add(f"step_{rows}_rows_scheduler_us", 1e6 * part, "us")
    shares = [one / two for one, two in zip(parts, walls, strict=True)]
    bench.lines.add(f"step_{rows}_rows_scheduler_share", statistics.median(shares), "fraction")


# -------------------------------------------------------------------- all of it

PARTS: dict[str, Callable[[Bench], None]] = {
    "systems": systems,
    "memory": memory,
    "shared": shared,
    "concurrency": concurrency,
    "scheduler": scheduler,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small requests, few of them")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,PART")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="of each system (default: 2)")
    parser.add_argument("--vllm-python", metavar="PATH", help="an interpreter that has vLLM")
    parser.add_argument("--no-compile", action="store_true", help="leave Engine(compile=True) out")
    parser.add_argument(
        "--all-generate-batch", action="store_true",
        help="all requests for generate_batch, not the first 8 alone",
    )  # fmt: skip
    parser.add_argument(
        "--plot", type=plot_file, metavar="FILE", help="of the part concurrency, .svg or .png"
    )
    options = parser.parse_args()
    options.only = options.only.split(",")
    for part in options.only:
        if part not in PARTS:
            parser.error(f"--only {part}: choose from {', '.join(PARTS)}")
    if options.plot is not None and "concurrency" not in options.only:
        parser.error("--plot draws the part concurrency, which is not among --only")
    for name in ("repeats", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected at least 1")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    timing.describe(vllm=options.vllm_python, repeats=options.repeats)
    bench = Bench(options)
    for part in options.only:
        timing.note(f"{part}:")
        PARTS[part](bench)


if __name__ == "__main__":
    main()
