"""The printed output of `kvpager demo`, for 80 columns or more, with or without colour."""

from __future__ import annotations

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

import kvpager
from kvpager._text import change, size
from kvpager.blocks.stats import BlockStatus
from kvpager.demo.measurement import States
from kvpager.demo.results import Result, Results
from kvpager.demo.settings import Settings

MAP_LINES_MAX = 3
MAP_CELLS_MAX = 96
PROMPT_END = 27  # characters

# A letter tells the states apart without colour.
CELLS = {
    BlockStatus.SHARED: ("S", "black on green", "shared by several sequences"),
    BlockStatus.HELD: ("o", "black on cyan", "held by one"),
    BlockStatus.KEPT: ("k", "black on magenta", "kept back: pinned, or a copy is under way"),
    BlockStatus.CACHED: ("c", "black on yellow", "cached only, for later prompts"),
    BlockStatus.FREE: (".", "dim", "free"),
    BlockStatus.RESERVED: ("0", "dim", "the null block"),
}


def show_heading(console: Console, model: str, dtype: str, device: str, settings: Settings) -> None:
    """Print the model, the device and how to read the figures."""
    console.print(
        f"[bold]kvpager {kvpager.__version__}[/]: {escape(model)}, {dtype} on {device}, "
        f"block size {settings.block_size}",
        highlight=False,
    )
    console.print(
        "Every scenario runs with transformers' DynamicCache, then with kvpager.\n"
        f"{settings.max_new_tokens} new tokens a row; end-of-text is suppressed, so rows compare.\n"
        "A row's last token has no keys and values yet. What rows share is needed once.",
        style="dim",
        highlight=False,
    )


def show_result(console: Console, result: Result, settings: Settings) -> None:
    """Print the texts, memory and blocks of a scenario."""
    scenario = result.scenario
    console.print()
    console.rule(f"[bold]({scenario.key}) {escape(scenario.title)}", align="left", style="dim")
    console.print(Text(scenario.note, style="dim"))
    console.print(_texts(console, result))
    console.print(_verdict(result))
    console.print(_memory(result))
    for line in _blocks_lines(result, settings.block_size):
        console.print(Text(line))
    for states in result.paged.states:
        _show_map(console, states)


def _verdict(result: Result) -> Text:
    if result.is_wrong:
        return Text(f" DIFFERENT from DynamicCache: {result.difference}", style="bold red")
    rows = len(result.texts)
    if result.differences:
        return Text(
            f" {len(result.differences)} of {rows} rows took the other side of a near-tie: "
            f"{result.difference}",
            style="yellow",
        )
    return Text(
        f" identical, token by token, to DynamicCache: {result.num_compared} tokens in {rows} "
        f"row{'s' if rows > 1 else ''}",
        style="green",
    )


def _texts(console: Console, result: Result) -> Table:
    table = Table(box=None, padding=(0, 1), show_header=True, header_style="dim")
    table.add_column("row", justify="right")
    table.add_column("prompt's end", style="dim", no_wrap=True)
    table.add_column("generated", overflow="fold", max_width=84)
    for number, row in enumerate(result.texts, start=1):
        table.add_row(
            str(number),
            Text("..." + _printable(row.prompt_end, console.encoding)[-PROMPT_END:]),
            Text(_printable(row.text, console.encoding)),
        )
    return table


def _printable(text: str, encoding: str) -> str:
    """Return one line without control characters and characters that cannot be encoded."""
    words = " ".join(text.split())
    shown = "".join(letter if letter.isprintable() else "?" for letter in words)
    return shown.encode(encoding, "replace").decode(encoding)


# -------------------------------------------------------------------- figures


def _memory(result: Result) -> Table:
    plain, stats = result.plain, result.paged.stats
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=True)
    table.add_column("keys and values")
    for name in ("bytes", "of that wasted", "KV utilisation"):
        table.add_column(name, justify="right")
    table.add_row("needed: every token once", size(plain.needed_bytes), "", "")
    rows, buffers = result.scenario.rows_alive, plain.contiguous
    known, limit = buffers.known_length_tokens, buffers.model_limit_tokens
    lines = [
        ("DynamicCache", plain.reserved_bytes, ""),
        ("kvpager, blocks held", stats.held_bytes, "bold"),
        (_buffer("length known", rows, known), buffers.known_length_bytes, "dim"),
    ]
    if limit is not None and buffers.model_limit_bytes is not None:
        lines.append((_buffer("model's limit", rows, limit), buffers.model_limit_bytes, "dim"))
    for name, taken, style in lines:
        wasted = taken - plain.needed_bytes
        used = _percent(plain.needed_bytes, taken)
        table.add_row(name, size(taken), size(wasted), used, style=style)
    return table


def _buffer(what: str, rows: int, tokens: int) -> str:
    return f"one buffer a row, {what} ({rows} x {tokens:,})"


def _blocks_lines(result: Result, block_size: int) -> list[str]:
    stats, paged = result.paged.stats, result.paged
    lines = [
        f" pool       {size(stats.reserved_bytes)} reserved: {stats.num_blocks} blocks of "
        f"{block_size} tokens, {size(paged.block_bytes)} each",
        f" blocks     {stats.num_held_blocks} held, {stats.num_shared_blocks} of them shared; "
        f"{stats.num_cached_blocks} cached only; {stats.copied_blocks} copied on write",
    ]
    if result.scenario.prefix_cache:
        hits = ", ".join(f"{call.prefix_hit_tokens}/{call.prompt_tokens}" for call in paged.calls)
        fresh = ", ".join(str(call.new_blocks) for call in paged.calls)
        lines += [f" reused     {hits} prompt tokens, call by call"]
        lines += [f" allocated  {fresh} new blocks, call by call"]
    lines.append(
        f" seconds    {result.plain.seconds:.2f} with DynamicCache, {paged.seconds:.2f} with "
        "kvpager (one run)"
    )
    return lines


def _show_map(console: Console, states: States) -> None:
    width = min(console.width - 2, MAP_CELLS_MAX)
    cells, blocks_per_cell = summarise(states, width * MAP_LINES_MAX)
    each = "1 block" if blocks_per_cell == 1 else f"{blocks_per_cell} blocks, by the commonest"
    legend = Text(f" a cell is {each}:")
    for state in BlockStatus:
        letter, style, meaning = CELLS[state]
        if (states == state).any():
            legend.append("  ").append(letter, style=style).append(f" {meaning}")
    console.print()
    console.print(legend)
    for start in range(0, len(cells), width):
        line = Text(" ", no_wrap=True)
        for state in cells[start : start + width].tolist():
            letter, style, _ = CELLS[BlockStatus(state)]
            line.append(letter, style=style)
        console.print(line)


def summarise(states: States, num_cells: int) -> tuple[States, int]:
    """Return up to `num_cells` cells, each with the commonest state of its blocks. O(blocks)."""
    blocks_per_cell = max(1, -(-len(states) // num_cells))
    cells = [
        np.bincount(states[start : start + blocks_per_cell]).argmax()
        for start in range(0, len(states), blocks_per_cell)
    ]
    return np.array(cells, np.int8), blocks_per_cell


# -------------------------------------------------------------------- the end


def show_summary(console: Console, results: Results) -> None:
    """Print a line per scenario, and the verdict."""
    console.print()
    console.rule("[bold]Summary", align="left", style="dim")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=True)
    table.add_column("scenario", overflow="fold")
    for name in ("Dynamic\nCache", "kvpager\nheld", "", "prompt\nreused", "seconds,\none run"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results.scenarios:
        mark = " [bold red]DIFFERENT" if result.is_wrong else " [yellow]near-tie"
        table.add_row(
            f"({result.scenario.key}) {escape(result.scenario.title)}"
            + (mark if result.differences else ""),
            size(result.plain.reserved_bytes),
            size(result.paged.stats.held_bytes),
            change(result.paged.stats.held_bytes, result.plain.reserved_bytes),
            _percent(
                sum(call.prefix_hit_tokens for call in result.paged.calls),
                sum(call.prompt_tokens for call in result.paged.calls),
            ),
            f"{result.plain.seconds:.2f} / {result.paged.seconds:.2f}",
        )
    console.print(table)
    for result in results.scenarios:
        if result.is_wrong:
            console.print(
                f"outputs differ in scenario ({result.scenario.key}): {result.difference}",
                style="bold red",
                highlight=False,
                soft_wrap=True,
            )
    console.print(
        "Held: at the end of a scenario, without the pool's free blocks.",
        style="dim",
        highlight=False,
    )
    if results.identical:
        console.print("all outputs identical", style="bold green")
    elif not results.is_wrong:
        console.print(
            f"all outputs identical but for near-ties: two tokens whose logits are equal within "
            f"the rounding of {results.dtype}",
            style="bold yellow",
            highlight=False,
        )


def _percent(part: int, whole: int) -> str:
    return f"{round(100 * part / max(whole, 1))}%"  # rounded first: never -0%
