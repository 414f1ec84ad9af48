"""A view on a terminal, with rich."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kvpager._text import size
from kvpager.top.view import Cell, Kind, View

MAP_ROWS_MAX = 12
# Colours that differ in brightness too, and glyphs that differ without colours.
_COLOURS = (
    "cyan",
    "yellow",
    "magenta",
    "green",
    "blue",
    "bright_red",
    "bright_cyan",
    "bright_blue",
)
_GLYPHS = {
    Kind.FREE: ("·", "bright_black"),
    Kind.CACHED: ("░", "white"),
    Kind.HELD: ("█", "cyan"),
    Kind.SHARED: ("▓", "bright_white"),
    Kind.KEPT: ("▒", "red"),
}
_BAR = {"held": Kind.HELD, "cached": Kind.CACHED, "kept": Kind.KEPT, "free": Kind.FREE}


def cells_for(width: int) -> int:
    """Return how many cells fit into the map of a terminal. O(1)."""
    return max(width - 4, 16) * MAP_ROWS_MAX


def drawn(view: View, width: int) -> RenderableType:
    """Return a view as a panel of `width` characters. O(cells)."""
    inside = max(width - 4, 16)
    parts: list[RenderableType] = [_bar(view, inside), _summary(view)]
    if view.cells:
        parts += [Text(), _map(view, inside), _legend(view)]
    if view.rows:
        parts += [Text(), _requests(view)]
    if view.tiers:
        parts += [Text(), _tiers(view)]
    at = "" if view.seconds is None else f" at {view.seconds:.2f} s"
    return Panel(Group(*parts), title=Text(f"{view.title}{at}"), width=width)


def _bar(view: View, width: int) -> Text:
    total = sum(view.blocks.get(name, 0) for name in _BAR)
    bar, drawn_blocks, drawn_chars = Text(), 0, 0
    for name, kind in _BAR.items():
        drawn_blocks += view.blocks.get(name, 0)
        end = round(width * drawn_blocks / max(total, 1))
        glyph, colour = _GLYPHS[kind]
        bar.append(glyph * (end - drawn_chars), colour)
        drawn_chars = end
    return bar


def _summary(view: View) -> Text:
    blocks = ", ".join(f"{count:,} {name}" for name, count in view.blocks.items())
    lines = [f"blocks    {blocks}"]
    held = view.blocks.get("held", 0)
    if view.block_size and held:
        share = view.tokens / (held * view.block_size)
        lines.append(f"slots     {view.tokens:,} of held blocks in use ({share:.1%})")
    states = ", ".join(f"{count:,} {name}" for name, count in view.requests.items())
    lines.append(f"requests  {states}")
    if view.rates:
        rates = ", ".join(f"{rate:,.1f} {name}/s" for name, rate in view.rates.items())
        lines.append(f"rates     {rates}")
    totals = ", ".join(f"{count:,} {name}" for name, count in view.totals.items())
    lines.append(f"totals    {totals}")
    return Text("\n".join(lines))


def _map(view: View, width: int) -> Text:
    picture = Text()
    for at, cell in enumerate(view.cells):
        if at and at % width == 0:
            picture.append("\n")
        glyph, colour = _look(cell)
        picture.append(glyph, colour)
    return picture


def _look(cell: Cell) -> tuple[str, str]:
    glyph, colour = _GLYPHS[cell.kind]
    if cell.kind is Kind.HELD and cell.request is not None:
        colour = _COLOURS[cell.request % len(_COLOURS)]
    return glyph, colour


def _legend(view: View) -> Text:
    names = (Kind.HELD, Kind.SHARED, Kind.CACHED, Kind.FREE)
    legend = "  ".join(f"{_GLYPHS[kind][0]} {kind.value}" for kind in names)
    each = "a block" if view.cell_blocks == 1 else f"{view.cell_blocks} blocks"
    return Text(f"{legend}   each character is {each}; colours are requests", "bright_black")


def _requests(view: View) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("request", "state", "tokens", "at most", "blocks", "shared"):
        table.add_column(name, justify="left" if name == "state" else "right")
    for row in view.rows:
        colour = _COLOURS[row.request % len(_COLOURS)]
        number = Text(str(row.request), colour)
        counts = (row.tokens, row.max_tokens, row.blocks, row.shared)
        table.add_row(number, row.state, *(f"{count:,}" for count in counts))
    return table


def _tiers(view: View) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("tier", "blocks", "loaded", "saved"):
        table.add_column(name, justify="left" if name == "tier" else "right")
    for tier in view.tiers:
        loaded, saved = (
            "?" if count is None else size(count) for count in (tier.loaded_bytes, tier.saved_bytes)
        )
        blocks = "?" if tier.blocks is None else f"{tier.blocks:,}"
        table.add_row(Text(tier.name), blocks, loaded, saved)  # a string could be markup
    return table
