"""Many requests at once, recorded, and the report of them."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import kvpager
from kvpager.demo.model import Engine as Model
from kvpager.demo.scenarios import QUESTIONS, Row, help_text
from kvpager.report.writer import write_report

NUM_REQUESTS = 48
LENGTH_MAX = 1024  # tokens of a request, which a naive allocator would reserve for each
NUM_REGIONS = 4  # so large is the memory
STEP_TOKENS = 128
PREFIX_TOKENS = 200
OWN_TOKENS = 240


def write_demo_report(model: Model, block_bytes: int, page: Path) -> None:
    """Run requests through an `Engine` that records, and write the report. O(tokens).

    Args:
        block_bytes: bytes of a block of the model.

    Raises: `KVPagerError`, `ValueError` if the model has no place in an engine; `OSError`.
    """
    size = model.settings.block_size
    longest = min(LENGTH_MAX, model.max_positions or LENGTH_MAX)
    with tempfile.TemporaryDirectory() as folder:
        recording = Path(folder, "run.jsonl")
        with kvpager.Engine(
            model.model,
            memory=NUM_REGIONS * -(-longest // size) * block_bytes,
            block_size=size,
            max_model_len=longest,
            max_batch_tokens=STEP_TOKENS,
            record=recording,
        ) as engine:
            streams = [
                engine.submit(prompt, max_new_tokens=new, do_sample=False)
                for prompt, new in _requests(model, longest)
            ]
            for stream in streams:
                stream.result()
        write_report(recording, page)


def _requests(model: Model, longest: int) -> Iterator[tuple[Row, int]]:
    """Yield prompts and numbers of new tokens; two in three prompts share a beginning."""
    choose = random.Random(0)
    texts = [model.tokenize(help_text(name)) for name in ("compound", "import", "execmodel")]
    for number in range(NUM_REQUESTS):
        text = texts[number % 3]
        own = choose.randrange(10, OWN_TOKENS)
        start = choose.randrange(max(1, len(text) - own))
        new = choose.randrange(8, 4 * model.settings.max_new_tokens)
        prefix = text[:PREFIX_TOKENS] if number % 3 else []
        question = model.tokenize("\n\n" + QUESTIONS[number % len(QUESTIONS)])
        prompt = (prefix + text[start : start + own] + question)[: longest // 2]
        yield prompt, min(new, longest - len(prompt))
