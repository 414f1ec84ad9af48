"""Tables of figures that fit the width of the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


class Column(NamedTuple):
    """A column of figures: its heading, and one cell for each row."""

    heading: str
    cells: Sequence[str]


def show(console: Console, heading: str, labels: Sequence[str], columns: Sequence[Column]) -> None:
    """Print the columns beside their labels, in as many tables as the width needs. O(cells)."""
    rest = list(columns)
    while rest:
        count = len(rest)
        while count > 1 and not _fits(console, _table(heading, labels, rest[:count])):
            count -= 1
        console.print(_table(heading, labels, rest[:count]))
        rest = rest[count:]


def _fits(console: Console, table: Table) -> bool:
    unbounded = console.options.update(max_width=10_000)  # a measure is cut at this width
    return Measurement.get(console, unbounded, table).maximum <= console.width


def _table(heading: str, labels: Sequence[str], columns: Sequence[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(heading, no_wrap=True)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for number, label in enumerate(labels):
        table.add_row(label, *(column.cells[number] for column in columns))
    return table
