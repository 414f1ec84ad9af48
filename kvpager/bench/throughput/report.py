"""Figures as a table, as JSON lines and as a plot."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpager._text import counted
from kvpager.bench.throughput.results import Figures, Moment

if TYPE_CHECKING:
    from rich.table import Table

    from kvpager.bench.throughput.workload import Workload

_MIB = 1 << 20
_NONE = "-"


def show(machine: dict[str, Any], figures: Sequence[Figures], workload: Workload) -> None:
    """Print what was served, by which model and machine, and the figures. O(tokens)."""
    from rich.console import Console

    model, threads = machine["model"], machine["machine"]["threads"]
    print(
        f"{workload.name}: {workload.prompt_tokens:,} prompt tokens, {workload.new_tokens:,} new\n"
        f"{model['class']}, {model['parameters'] / 1e6:,.0f} million parameters, {model['dtype']}, "
        f"{model['device']}, {counted(threads, 'thread')}"
    )
    Console(highlight=False).print(table(figures))
    for line in notes(figures):
        print(line)


def table(figures: Sequence[Figures]) -> Table:
    """One column for each system. O(tokens)."""
    from rich import box
    from rich.table import Table

    found = Table(box=box.SIMPLE_HEAD)
    found.add_column("")
    for each in figures:
        # Long names take two lines, so that seven systems fit.
        name = re.sub(r"(?<=.)([-_])", r"\n\1", each.system)
        found.add_column(name + ("*" if each.note else ""), justify="right", no_wrap=True)
    records = [each.as_record() for each in figures]
    for label, show in _ROWS.items():
        found.add_row(label, *map(show, records))
    return found


def _shows(key: str, form: str, factor: float = 1) -> Callable[[dict[str, Any]], str]:
    """How a figure of a record is shown."""

    def show(record: dict[str, Any]) -> str:
        value = record[key]
        return _NONE if value is None else form.format(value * factor)

    return show


_ROWS = {
    "tokens/s": _shows("tokens_per_s", "{:,.0f}"),
    "of kvpager's": _shows("over_kvpager", "{:.2f}"),
    "first token, s, median": _shows("first_token_s_median", "{:.2f}"),
    "first token, s, p99": _shows("first_token_s_p99", "{:.2f}"),
    "each further one, ms": _shows("per_token_s_median", "{:.1f}", 1000),
    "KV held at peak, MiB": _shows("kv_peak_bytes", "{:,.1f}", 1 / _MIB),
    "slots of it in use": _shows("kv_live_share", "{:.1%}"),
    "preempted, by swap": _shows("preempted_by_swap", "{:,}"),
    "preempted, by recompute": _shows("preempted_by_recompute", "{:,}"),
    "prompt tokens cached": _shows("prefix_hit_tokens", "{:,}"),
}


def notes(figures: Sequence[Figures]) -> list[str]:
    """What the stars of the table stand for. O(systems)."""
    return [f"* {each.system}: {each.note}" for each in figures if each.note]


def lines(machine: dict[str, Any], figures: Sequence[Figures]) -> str:
    """JSON lines: what the figures depend on, then one line for each system. O(tokens)."""
    records = [machine, *(each.as_record() for each in figures)]
    return "".join(json.dumps(record) + "\n" for record in records)


def draw(file: str | Path, figures: Figures, title: str) -> None:
    """Blocks and requests over the time of a system's last run, as .svg or .png. O(steps).

    Raises: `ValueError` where the system told of no steps; `OSError`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    moments = figures.last.moments
    if not moments:
        raise ValueError(f"{figures.system} told of no steps: there is nothing to draw")
    # Text as text, and nothing of chance or of today: the same figures give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kvpager"}):
        figure = Figure(figsize=(7.5, 6), layout="constrained")
        above, below = figure.subplots(2, sharex=True)
        _draw_blocks(above, moments)
        _draw_requests(below, moments)
        above.set_title(title)
        metadata = {"Date": None} if Path(file).suffix == ".svg" else None
        figure.savefig(file, metadata=metadata)


def _draw_blocks(axes: Any, moments: list[Moment]) -> None:
    times = [moment.seconds for moment in moments]
    held = [moment.held_blocks / moment.pool_blocks for moment in moments]
    live = [share * moment.slot_use for share, moment in zip(held, moments, strict=True)]
    axes.fill_between(times, held, color="lightsteelblue", label="blocks held")
    axes.plot(times, live, color="tab:blue", label="slots with a token")
    axes.set(ylabel="share of the pool", ylim=(0, 1.05))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_requests(axes: Any, moments: list[Moment]) -> None:
    times = [moment.seconds for moment in moments]
    for name, colour in (
        ("running", "tab:green"), ("waiting", "tab:orange"), ("preempted", "tab:red"),
    ):  # fmt: skip
        counts = [getattr(moment, name) for moment in moments]
        axes.plot(times, counts, color=colour, label=name, drawstyle="steps-post")
    axes.set(xlabel="seconds", ylabel="requests")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
