"""The same requests in the same bytes, in each mode of managing KV memory."""

from __future__ import annotations

import sys

from rich.console import Console

from kvpager.bench.modes import comparison, report
from kvpager.bench.modes.comparison import ModeFigures
from kvpager.bench.throughput.workload import synthetic
from kvpager.demo.model import Engine as Model
from kvpager.modes import ModeName

NUM_REQUESTS, PROMPT_LENGTHS, NEW_TOKENS = 12, (8, 96), 16
_ROWS = ("requests at once", "live tokens / held slots", "tokens/s", "relative to reserved")
LENGTH_MAX = 512  # tokens that mode "reserved" keeps for each request


def show_modes(console: Console, model: Model) -> list[ModeFigures]:
    """Serve a few requests in each mode, and print a table. Return the figures. O(tokens)."""
    names: list[ModeName] = ["reserved", "paged"]
    if sys.platform.startswith("linux"):
        names.append("virtual")
    size = model.settings.block_size
    options = comparison.engine_options(model.model, None, LENGTH_MAX, size, threads=None)
    vocabulary = int(model.model.config.vocab_size)
    workload = synthetic(NUM_REQUESTS, PROMPT_LENGTHS, NEW_TOKENS, vocabulary=vocabulary)
    figures, _ = comparison.measure(model.model, lambda rate: workload, options, modes=names)
    console.print()
    console.rule("[bold]Memory, managed in three ways", align="left", style="dim")
    for line in report.assumptions(workload, LENGTH_MAX, int(options.memory or 0), None):
        console.print(line, markup=False, highlight=False)
    report.show_table(
        console, figures, rows=("requests at once", "live tokens / held slots", "tokens/s")
    )
    return figures
