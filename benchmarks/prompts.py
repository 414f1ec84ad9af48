"""Shared prompts: beams, common prefixes and padding, beside DynamicCache.

    python benchmarks/prompts.py            # some 2 minutes
    python benchmarks/prompts.py --quick    # shorter prompts, a few seconds

The Llama of `generate.py` (8 layers, 512 hidden units, random weights), with and without
`kvpager.patch(model)`, in turns:

- beams: 8 beams of one prompt: TTFT, and the time of a later step.
- reuse: with `prefix_cache=True`, prompts whose long prefix is cached.
- batch: with `prefix_cache=True`, 8 rows with a common prefix that is not cached, and 8 rows of
  which 7 have a cached prefix.
- padding: peak bytes of the KV cache of a left-padded batch.

Above 1, a ratio says that kvpager is quicker or takes less memory.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaForCausalLM, LogitsProcessorList

# As a file of its own, too: `python benchmarks/prompts.py`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kvpager
from benchmarks import timing
from benchmarks.generate import DTYPES, Stamps, small_llama
from kvpager.integrations.huggingface.releases import cache_of

BEAMS = 8
VOCAB = 4096
# What a clock makes of the stamps of one `generate`, begun at a time.
Reading = Callable[[Stamps, float], float]


def to_first_token(stamps: Stamps, begun: float) -> float:
    return stamps.times[0] - begun


def per_token(stamps: Stamps, begun: float) -> float:
    del begun
    return stamps.seconds_per_token


def random_ids(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def timed(model: LlamaForCausalLM, ids: torch.Tensor, reading: Reading, **options: Any) -> float:
    stamps, begun = Stamps(), time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        logits_processor=LogitsProcessorList([stamps]),
        **options,
    )
    return reading(stamps, begun)


def compare(
    name: str,
    lines: timing.Lines,
    options: argparse.Namespace,
    contenders: dict[str, Callable[[], float]],
) -> None:
    """Time the contenders in turns; each says itself how many seconds count."""
    times = timing.turns(
        contenders, options.repeats, seconds=options.seconds, clock=lambda contender: contender()
    )
    for contender, each in times.items():
        lines.add(f"{name}_{contender}_ms", statistics.median(each) * 1e3, "ms")
    ratio = timing.ratio(times, "dynamic_cache", "kvpager")
    lines.add(f"{name}_vs_dynamic_cache", ratio, "ratio", turns=len(times["kvpager"]))


def beams(dtype: str, lines: timing.Lines, options: argparse.Namespace) -> None:
    ours, plain = small_llama(DTYPES[dtype]), small_llama(DTYPES[dtype])
    for what, length, new, reading in (
        ("prefill", options.prompt, 2, to_first_token),
        ("step", 2 * options.prompt, 9, per_token),
    ):
        ids = random_ids(1, length, seed=1)
        run = partial(timed, ids=ids, reading=reading, max_new_tokens=new, num_beams=BEAMS)
        with kvpager.patch(ours):
            contenders = {"kvpager": partial(run, ours), "dynamic_cache": partial(run, plain)}
            compare(f"beams_{what}_{dtype}_{length}", lines, options, contenders)


def reuse(dtype: str, lines: timing.Lines, options: argparse.Namespace) -> None:
    ours, plain = small_llama(DTYPES[dtype]), small_llama(DTYPES[dtype])
    beginning, seeds = random_ids(1, 2 * options.prompt, seed=2), itertools.count(3)

    def run(model: LlamaForCausalLM) -> float:
        # A question that is not cached.
        ids = torch.cat([beginning, random_ids(1, 32, seed=next(seeds))], dim=1)
        return timed(model, ids, to_first_token, max_new_tokens=2)

    with kvpager.patch(ours, prefix_cache=True):
        run(ours)
        contenders = {"kvpager": partial(run, ours), "dynamic_cache": partial(run, plain)}
        compare(f"reuse_{dtype}_{2 * options.prompt}", lines, options, contenders)


def batch(dtype: str, lines: timing.Lines, options: argparse.Namespace) -> None:
    ours, plain = small_llama(DTYPES[dtype]), small_llama(DTYPES[dtype])
    length, seeds = options.prompt, itertools.count(100)
    known = random_ids(1, length, seed=5)

    def rows(beginning: torch.Tensor, count: int) -> torch.Tensor:
        questions = random_ids(count, 32, seed=next(seeds))
        return torch.cat([beginning.expand(count, -1), questions], dim=1)

    def alike(model: LlamaForCausalLM) -> float:
        ids = rows(random_ids(1, length, seed=next(seeds)), BEAMS)
        return timed(model, ids, to_first_token, max_new_tokens=2)

    def mixed(model: LlamaForCausalLM) -> float:
        other = random_ids(1, length, seed=next(seeds))
        ids = torch.cat([rows(known, BEAMS - 1), rows(other, 1)])
        return timed(model, ids, to_first_token, max_new_tokens=2)

    with kvpager.patch(ours, prefix_cache=True):
        timed(ours, known, to_first_token, max_new_tokens=2)
        for what, run in (("mixed", mixed), ("alike", alike)):
            contenders = {"kvpager": partial(run, ours), "dynamic_cache": partial(run, plain)}
            compare(f"batch_{what}_{dtype}_{length}", lines, options, contenders)


def padding(dtype: str, lines: timing.Lines, options: argparse.Namespace) -> None:
    """16 rows of 32 tokens up to the prompt's length, left-padded."""
    ours, plain = small_llama(DTYPES[dtype]), small_llama(DTYPES[dtype])
    lengths = torch.linspace(32, options.prompt, 16).long()
    ids = random_ids(len(lengths), options.prompt, seed=4)
    mask = (torch.arange(options.prompt) >= options.prompt - lengths[:, None]).long()

    def run(model: LlamaForCausalLM) -> transformers.DynamicCache:
        result = model.generate(
            ids, attention_mask=mask, max_new_tokens=17, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
        return cache_of(result)

    cache = run(plain)
    dense = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    with kvpager.patch(ours) as patch:
        run(ours)
        held = patch.stats().peak_held_bytes
    name = f"padding_{dtype}_32_to_{options.prompt}"
    lines.add(f"{name}_kvpager_bytes", held, "bytes")
    lines.add(f"{name}_dynamic_cache_bytes", dense, "bytes")
    lines.add(f"{name}_vs_dynamic_cache", dense / held, "ratio")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="prompts of 128 tokens, fewer turns")
    parser.add_argument("--prompt", type=int, help="tokens (default: 1024, quick 128)")
    parser.add_argument("--only", default="", metavar="NAME", help="beams, reuse, batch or padding")
    parser.add_argument("--dtypes", default="fp32,bf16", help="default: fp32,bf16")
    parser.add_argument("--repeats", type=int, help="turns per case (default: 5, quick 3)")
    parser.add_argument("--seconds", type=float, default=60, help="end a case after this")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    options = parser.parse_args()
    options.repeats = options.repeats or (3 if options.quick else 5)
    options.prompt = options.prompt or (128 if options.quick else 1024)
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    lines = timing.Lines()
    timing.describe()
    parts = [part for part in (beams, reuse, batch, padding) if options.only in part.__name__]
    for part, dtype in timing.progress(
        list(itertools.product(parts, options.dtypes.split(","))), "prompts"
    ):
        part(dtype, lines, options)


if __name__ == "__main__":
    main()
