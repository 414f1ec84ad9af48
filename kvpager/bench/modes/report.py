"""Print the figures of the modes as a table, and as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvpager._text import size
from kvpager.bench.modes.comparison import ModeFigures
from kvpager.bench.throughput.report import setting
from kvpager.bench.throughput.workload import Workload

if TYPE_CHECKING:
    from rich.console import Console

_ROWS: dict[str, tuple[str, str, float]] = {  # row: key of the record, format, factor
    "requests at once": ("requests_at_once", "{:,}", 1),
    "live tokens / held slots": ("live_share", "{:.1%}", 1),
    "blocks copied": ("copied_blocks", "{:,}", 1),
    "preempted": ("preempted", "{:,}", 1),
    "tokens/s": ("tokens_per_s", "{:,.0f}", 1),
    "relative to reserved": ("over_reserved", "{:.2f}", 1),
    "p90 latency, s": ("p90_latency_s", "{:.2f}", 1),
    "tokens/s within the limit": ("tokens_per_s_within_limit", "{:,.0f}", 1),
}


def records(figures: Sequence[ModeFigures]) -> list[dict[str, Any]]:
    """Return the figures as plain data, each beside those of "reserved". O(steps)."""
    found = [each.as_record() for each in figures]
    base = next((each["tokens_per_s"] for each in found if each["mode"] == "reserved"), None)
    for each in found:
        each["over_reserved"] = None if base is None else each["tokens_per_s"] / base
    return found


def assumptions(
    workload: Workload, max_model_len: int, memory: int, limit: float | None
) -> list[str]:
    """Return what the figures assume, a line each. O(1)."""
    lines = [
        f"{workload.name}: {workload.prompt_tokens:,} prompt tokens, {workload.new_tokens:,} new",
        f"{size(memory)} for the KV cache of each mode",
        f'mode "reserved" reserves {max_model_len:,} tokens for each request (the longest has '
        f"{workload.longest:,})",
    ]
    if limit is not None:
        lines.append(
            f"latency limit: 90% of the requests end within {limit:.2f} s of their arrival"
        )
    return lines


def show(machine: dict[str, Any], figures: Sequence[ModeFigures], lines: Sequence[str]) -> None:
    """Print the assumptions, the model, the hardware and the figures. O(steps)."""
    from rich.console import Console

    console = Console(highlight=False)
    for line in (*lines, *setting(machine)):
        console.print(line, markup=False)
    show_table(console, figures, list(_ROWS))


def show_table(console: Console, figures: Sequence[ModeFigures], rows: Sequence[str]) -> None:
    """Print a column of figures for each mode. O(steps)."""
    from kvpager.bench import tables

    columns = [
        tables.Column(each["mode"], [_cell(each, *_ROWS[row]) for row in rows])
        for each in records(figures)
    ]
    tables.show(console, "", rows, columns)


def _cell(record: dict[str, Any], key: str, form: str, factor: float) -> str:
    value = record[key]
    return "-" if value is None else form.format(value * factor)


def lines(machine: dict[str, Any], figures: Sequence[ModeFigures], limit: float | None) -> str:
    """Return JSON lines: the machine and settings, then a line per mode. O(steps)."""
    found = [machine | {"p90_limit_s": limit}, *records(figures)]
    return "".join(json.dumps(record) + "\n" for record in found)
