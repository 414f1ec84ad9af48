"""Share of greedy replies that differ from `DynamicCache`, and whether rounding explains each.

    python benchmarks/same_tokens.py            # some 5 minutes
    python benchmarks/same_tokens.py --quick    # a few seconds

The bundled model continues prompts of 8 to 300 tokens by 30 tokens, greedily, one prompt at a
time, unpatched (`DynamicCache`). The same prompts are then continued in three other ways:

- in_place: under `kvpager.patch(model)`;
- gathered: under `kvpager.patch(model, in_place=False)`;
- dynamic_cache_batched: unpatched, in left-padded batches of 10, which shows how often
  transformers differs from itself.

A reply is a near-tie if the log-probabilities of the two tokens at its first difference are equal
within the rounding of the dtype (`kvpager.demo.comparison`), and wrong otherwise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

# As a file of its own, too: `python benchmarks/same_tokens.py`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kvpager
from benchmarks import timing
from kvpager.demo.comparison import differences
from kvpager.testing import tiny_llama_path

PROMPT_TOKENS = (8, 20, 64, 150, 300)
NEW_TOKENS = 30
BATCH = 10

Row = list[int]


@dataclass
class Judge:
    """The unpatched model, as `differences` asks it."""

    model: Any

    @property
    def eps(self) -> float:
        return torch.finfo(self.model.dtype).eps

    @torch.inference_mode()
    def logits(self, ids: Row, num_last: int) -> torch.Tensor:
        logits = self.model(torch.tensor([ids]), use_cache=False).logits
        return logits[0, -num_last:].float()


@dataclass
class Replies:
    prompts: list[Row]
    rows: list[Row]


def make_prompts(count: int) -> list[Row]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_path())
    ids = tokenizer("\n".join(map(str, topics.values())), add_special_tokens=False)["input_ids"]
    lengths = [PROMPT_TOKENS[number % len(PROMPT_TOKENS)] for number in range(count)]
    return [ids[number * 37 :][:length] for number, length in enumerate(lengths)]


def generate(model: Any, prompts: list[Row]) -> Replies:
    """One call: left-padded, greedy, `NEW_TOKENS` for each row."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return Replies(prompts, output[:, width:].tolist())


def one_by_one(model: Any, prompts: list[Row]) -> list[Replies]:
    return [generate(model, [prompt]) for prompt in prompts]


def batched(model: Any, prompts: list[Row]) -> list[Replies]:
    """In batches, told one reply at a time as `one_by_one` tells them."""
    starts = range(0, len(prompts), BATCH)
    batches = [generate(model, prompts[start : start + BATCH]) for start in starts]
    return [
        Replies([prompt], [row])
        for batch in batches
        for prompt, row in zip(batch.prompts, batch.rows, strict=True)
    ]


def ways(model: Any, prompts: list[Row]) -> Iterator[tuple[str, list[Replies]]]:
    with kvpager.patch(model):
        yield "in_place", one_by_one(model, prompts)
    with kvpager.patch(model, in_place=False):
        yield "gathered", one_by_one(model, prompts)
    yield "dynamic_cache_batched", batched(model, prompts)


def measure(dtype: str, prompts: list[Row], lines: timing.Lines) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_path(), dtype=dtype).eval()
    expected = one_by_one(model, prompts)
    for way, got in timing.progress(ways(model, prompts), dtype):
        found = list(differences(Judge(model), expected, got, beams=False))
        lines.add(
            f"same_tokens_{dtype}_{way}",
            100 * (1 - len(found) / len(prompts)),
            "% of replies",
            replies=len(prompts),
            near_ties=sum(each.is_near_tie for each in found),
            wrong=sum(not each.is_near_tie for each in found),
            largest_margin_of_tolerance=round(
                max((abs(each.margin or 0) / (each.tolerance or 1) for each in found), default=0), 3
            ),
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=100, help="number of prompts")
    parser.add_argument("--dtypes", default="float32,bfloat16,float16")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="10 prompts")
    options = parser.parse_args()
    if options.quick:
        options.prompts = 10
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    lines = timing.Lines()
    timing.describe()
    prompts = make_prompts(options.prompts)
    for dtype in options.dtypes.split(","):
        measure(dtype, prompts, lines)


if __name__ == "__main__":
    main()
