"""What a token costs in transformers' generate: blocks read in place beside its own cache.

    python benchmarks/generate.py                           # one row and eight rows, some minutes
    python benchmarks/generate.py --quick                   # a few short cases, under a minute
    python benchmarks/generate.py --rows 32 --contexts 128,512 --dtypes bf16
    python benchmarks/generate.py --all                     # every combination that memory allows

A Llama of 8 layers with random weights decodes greedily, once with `kvpager.patch(model)` and once
without, in turns. What is timed is from one token to the last: a prompt's keys and values are not
computed but random numbers, the same for both, which takes the time a prompt would take and leaves
the decode steps what they are. After each turn the caches are cropped back to the prompt. The first
logits have to agree but for rounding. Ratios above 1: kvpager is quicker.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LogitsProcessorList
from transformers.generation import LogitsProcessor

# As a file of its own, too: `python benchmarks/generate.py`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kvpager
from benchmarks import timing
from kvpager.integrations.huggingface.releases import with_cache

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}
ROWS, CONTEXTS = (1, 8, 32), (128, 512, 2048, 8192)
LAYERS, KV_HEADS, HEAD_DIM = 8, 4, 64
# Both caches at once; concatenation and a growing pool each keep two copies for a moment.
COPIES_AT_ONCE = 4


class Case(NamedTuple):
    """A batch of `rows` whose prompts have `context` tokens."""

    dtype: str
    rows: int
    context: int

    @property
    def name(self) -> str:
        context = f"{self.context // 1024}k" if self.context >= 1024 else str(self.context)
        return f"generate_{self.dtype}_b{self.rows}_{context}"

    @property
    def kv_bytes(self) -> int:
        """Of all layers."""
        elements = 2 * LAYERS * KV_HEADS * HEAD_DIM
        return self.rows * self.context * elements * DTYPES[self.dtype].itemsize


class Stamps(LogitsProcessor):
    """When each token's logits were there, and the first ones; the scores pass unchanged."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.first = torch.empty(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.times:
            self.first = scores.clone()
        self.times.append(time.perf_counter())
        return scores

    @property
    def seconds_per_token(self) -> float:
        """From the first token to the last."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def small_llama(dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=16_384,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype).eval()
    # Every turn has to give the same number of tokens.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def fill(cache: DynamicCache, case: Case) -> DynamicCache:
    """Write the keys and values of the context: the same random numbers for every cache."""
    numbers = torch.Generator().manual_seed(1)
    for layer in range(LAYERS):
        shape = (2, case.rows, KV_HEADS, case.context, HEAD_DIM)
        keys, values = torch.randn(shape, generator=numbers).to(DTYPES[case.dtype])
        cache.update(keys, values, layer)
    return cache


class Contender:
    """Decodes from a full cache, and takes the cache back to where it was."""

    def __init__(self, model: LlamaForCausalLM, case: Case, new: int) -> None:
        self.model, self.new = model, new
        self.context = case.context
        self.cache = fill(DynamicCache(config=model.config), case)
        ids = torch.Generator().manual_seed(2)
        # All but the last of these tokens stand in the cache.
        self.ids = torch.randint(1, 4096, (case.rows, case.context + 1), generator=ids)
        self.tokens = self.logits = torch.empty(0)

    def __call__(self) -> float:
        """Seconds per token."""
        stamps = Stamps()
        output = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            **with_cache({}, self.cache),
            max_new_tokens=self.new,
            do_sample=False,
            logits_processor=LogitsProcessorList([stamps]),
        )
        self.tokens, self.logits = output[:, self.ids.shape[1] :], stamps.first
        self.cache.crop(self.context - self.cache.get_seq_length())
        return stamps.seconds_per_token


class Patched(Contender):
    """The same in blocks: what it makes and does happens under a patch."""

    def __init__(self, model: LlamaForCausalLM, case: Case, new: int, block_size: int) -> None:
        self.block_size = block_size
        with kvpager.patch(model, block_size=block_size) as patch:
            super().__init__(model, case, new)
        self.patch = patch  # undone, but it goes on counting for the cache that was made under it

    def __call__(self) -> float:
        with kvpager.patch(self.model, block_size=self.block_size):
            return super().__call__()


def require_same(case: Case, paged: Contender, plain: Contender) -> float:
    """The share of equal tokens; stops unless the first logits are the same but for rounding."""
    error = float((paged.logits - plain.logits).abs().max() / plain.logits.abs().max())
    if not error <= TOLERANCES[case.dtype]:
        raise SystemExit(f"{case.name}: logits differ by {error:.2e} of the largest")
    return float((paged.tokens == plain.tokens).float().mean())


def measure(case: Case, options: argparse.Namespace, lines: timing.Lines) -> None:
    """Both contenders in turns, and what the patch counted."""
    model = small_llama(DTYPES[case.dtype])
    plain = Contender(model, case, options.new)
    paged = Patched(model, case, options.new, options.block_size)
    times = timing.turns(
        {"kvpager": paged, "dynamic_cache": plain},
        options.repeats,
        seconds=options.seconds,
        clock=lambda contender: contender(),
    )
    same = require_same(case, paged, plain)
    for name, each in times.items():
        lines.add(f"{case.name}_{name}_ms", statistics.median(each) * 1e3, "ms/token")
    stats = paged.patch.stats()
    # In bfloat16 a rounding decides between near-equal logits, of which random weights make many.
    tokens = {"same_tokens": round(same, 4)} if case.dtype == "fp32" else {}
    lines.add(
        f"{case.name}_vs_dynamic_cache",
        timing.ratio(times, "dynamic_cache", "kvpager"),
        "ratio",
        **tokens,
        in_place_reads=stats.in_place_reads,
        gathers=stats.gathers,
        turns=len(times["kvpager"]),
    )


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def cases(options: argparse.Namespace) -> list[Case]:
    """Return the requested cases, the quick ones first."""
    if options.quick:
        rows, contexts = (1, 8), (128, 512)
    elif options.all:
        rows, contexts = ROWS, CONTEXTS
    else:
        rows, contexts = (1, 8), (512, 2048, 8192)
    rows, contexts = options.rows or rows, options.contexts or contexts
    dtypes = options.dtypes.split(",")
    chosen = [Case(*each) for each in itertools.product(dtypes, rows, contexts)]
    return sorted((case for case in chosen if options.only in case.name), key=_size)


def _size(case: Case) -> tuple[int, str]:
    return case.kv_bytes, case.name


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short contexts, fewer turns")
    parser.add_argument("--all", action="store_true", help="1, 8 and 32 rows of 128 to 8k tokens")
    parser.add_argument("--only", default="", metavar="NAME", help="cases whose name contains this")
    parser.add_argument("--rows", type=numbers, metavar="N,N", help="batch sizes")
    parser.add_argument("--contexts", type=numbers, metavar="N,N", help="tokens in the cache")
    parser.add_argument("--dtypes", default="fp32,bf16", help="default: fp32,bf16")
    parser.add_argument("--new", type=int, default=17, help="tokens per turn (default: 17)")
    parser.add_argument("--block-size", type=int, default=16, help="default: 16")
    parser.add_argument("--repeats", type=int, help="turns per case (default: 9, quick 3)")
    parser.add_argument("--seconds", type=float, default=30, help="end a case after this")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    options = parser.parse_args()
    options.repeats = options.repeats or (3 if options.quick else 9)
    if options.new < 2:
        parser.error(f"--new {options.new}: a time per token needs at least 2 tokens")
    unknown = set(options.dtypes.split(",")) - set(DTYPES)
    if unknown:
        parser.error(f"--dtypes {options.dtypes}: choose from {','.join(DTYPES)}")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    lines = timing.Lines()
    timing.describe()
    for case in timing.progress(cases(options), "generate"):
        need, room = COPIES_AT_ONCE * case.kv_bytes, timing.available_bytes()
        if room and need > room:
            timing.note(
                f"{case.name}: skipped, as it needs {need / 2**30:.1f} GiB "
                f"and {room / 2**30:.1f} are free"
            )
            continue
        measure(case, options, lines)
    ratios = [line["value"] for line in lines.kept if line["unit"] == "ratio"]
    if ratios:
        lines.add("all_generate_vs_dynamic_cache_min", min(ratios), "ratio", cases=len(ratios))
        mean = timing.geometric_mean(ratios)
        lines.add("all_generate_vs_dynamic_cache_geomean", mean, "ratio", cases=len(ratios))


if __name__ == "__main__":
    main()
