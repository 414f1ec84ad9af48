"""Print figures as a table and JSON lines, and plot a run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvpager._text import counted
from kvpager.bench import plots
from kvpager.bench.throughput.results import Figures, Moment

if TYPE_CHECKING:
    from kvpager.bench.tables import Column
    from kvpager.bench.throughput.workload import Workload

_MIB = 1 << 20


def show(machine: dict[str, Any], figures: Sequence[Figures], workload: Workload) -> None:
    """Print the requests, the model, the hardware and the figures of each system. O(tokens)."""
    from rich.console import Console

    from kvpager.bench import tables

    console = Console(highlight=False)
    for line in (
        f"{workload.name}: {workload.prompt_tokens:,} prompt tokens, {workload.new_tokens:,} new",
        *setting(machine),
    ):
        console.print(line, markup=False)
    tables.show(console, "", list(_ROWS), [_column(each) for each in figures])
    for each in figures:
        if each.note:
            console.print(f"* {each.system}: {each.note}", markup=False)


def setting(machine: dict[str, Any]) -> tuple[str, str]:
    """Return the model and the hardware, a line each. O(1)."""
    model, hardware = machine["model"], machine["machine"]
    threads = counted(hardware["threads"], "thread")
    millions = model["parameters"] / 1e6
    parameters = f"{millions:,.0f}" if millions >= 10 else f"{millions:.2g}"
    return (
        f"{model['class']}, {parameters} million parameters, {model['dtype']}",
        f"{model['device']}: {hardware['processor'] or hardware['platform']}, {threads}",
    )


def _column(figures: Figures) -> Column:
    from kvpager.bench.tables import Column

    # A long name takes two lines, so that more systems fit beside each other.
    name = re.sub(r"(?<=.)([-_])", r"\n\1", figures.system) + ("*" if figures.note else "")
    record = figures.as_record()
    cells = []
    for key, form, factor in _ROWS.values():
        value = record[key]
        cells.append("-" if value is None else form.format(value * factor))
    return Column(name, cells)


_ROWS: dict[str, tuple[str, str, float]] = {  # row: key of the record, format, factor
    "tokens/s": ("tokens_per_s", "{:,.0f}", 1),
    "relative to kvpager": ("over_kvpager", "{:.2f}", 1),
    "TTFT median, s": ("first_token_s_median", "{:.2f}", 1),
    "TTFT p99, s": ("first_token_s_p99", "{:.2f}", 1),
    "ITL median, ms": ("per_token_s_median", "{:.1f}", 1000),
    "KV peak, MiB": ("kv_peak_bytes", "{:,.1f}", 1 / _MIB),
    "KV utilisation": ("kv_live_share", "{:.1%}", 1),
    "preempted by swap": ("preempted_by_swap", "{:,}", 1),
    "preempted by recompute": ("preempted_by_recompute", "{:,}", 1),
    "prefix cache hits": ("prefix_hit_tokens", "{:,}", 1),
    "of these from tiers": ("tier_hit_tokens", "{:,}", 1),
}


def lines(machine: dict[str, Any], figures: Sequence[Figures]) -> str:
    """Return JSON lines: the machine and settings, then a line per system. O(tokens)."""
    records = [machine, *(each.as_record() for each in figures)]
    return "".join(json.dumps(record) + "\n" for record in records)


def draw(file: str | Path, figures: Figures, title: str, machine: dict[str, Any]) -> None:
    """Plot KV utilisation and requests over the system's last run, as .svg or .png. O(steps).

    Raises: `ValueError` if the system recorded no steps; `OSError`.
    """
    moments = _until_idle(figures.last.moments)
    if not moments:
        raise ValueError(f"plot={file}: {figures.system} recorded no steps.")
    with plots.saved(file, (7.5, 6)) as figure:
        above, below = figure.subplots(2, sharex=True)
        _draw_memory(above, moments)
        _draw_requests(below, moments)
        plots.titles(figure, f"{figures.system}: {title}", "\n".join(setting(machine)))


def _until_idle(moments: list[Moment]) -> list[Moment]:
    """Return the moments up to the first after the last request. O(steps)."""
    busy = [number for number, each in enumerate(moments) if each.running or each.waiting]
    return moments[: busy[-1] + 2] if busy else []


def _draw_memory(axes: Any, moments: list[Moment]) -> None:
    times = [moment.seconds for moment in moments]
    held = np.array([moment.held_blocks / moment.pool_blocks for moment in moments])
    used = held * np.array([moment.slot_use for moment in moments])
    axes.fill_between(times, held, color="0.85", label="blocks held")
    axes.plot(times, held, color="0.45", linewidth=0.8)
    axes.plot(times, used, color="black", linewidth=1, label="tokens stored")
    axes.set(ylabel="share of the KV cache", ylim=(0, 1.05), xlim=(0, times[-1]))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_requests(axes: Any, moments: list[Moment]) -> None:
    times = [moment.seconds for moment in moments]
    for name, look in zip(("running", "waiting", "preempted"), plots.looks(), strict=False):
        counts = [getattr(moment, name) for moment in moments]
        axes.plot(
            times, counts, label=name, drawstyle="steps-post", **look,
            markevery=max(len(times) // 8, 1),
        )  # fmt: skip
    axes.set(xlabel="seconds", ylabel="requests")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
