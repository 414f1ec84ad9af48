"""The command `kvpager top`: what an engine does, on a terminal."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from kvpager.cli.errors import wrong_usage
from kvpager.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console

    from kvpager.top.view import View

_FRAME_S = 0.2
_SCRAPE_S = 1.0

_Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A recording of Engine(record=...), or the metrics of a running engine, such as "
        "http://127.0.0.1:9400/metrics.",
        show_default=False,
    ),
]
_Once = Annotated[
    bool, typer.Option("--once", help="Print the last moment, and exit.", show_default=False)
]
_Follow = Annotated[
    bool,
    typer.Option("--follow", help="Follow a recording that is being written.", show_default=False),
]
_Speed = Annotated[
    float,
    typer.Option(metavar="X", min=0.001, max=1e6, help="Play a recording X times as fast."),
]
_Prefix = Annotated[str, typer.Option(metavar="NAME", help="Prefix of the metrics.")]


def top(
    source: _Source,
    once: _Once = False,
    follow: _Follow = False,
    speed: _Speed = 1.0,
    prefix: _Prefix = "kvpager",
) -> None:
    """Show the blocks, rates and queue of an engine until Ctrl-C.

    A recording also shows which request holds which block.

    Exit status: 0, 1 if an engine does not answer, or 2 for a bad recording or wrong usage.
    """
    from rich.console import Console
    from rich.live import Live

    from kvpager.top.screen import drawn

    if follow and once:
        raise BadInput("--follow: conflicts with --once. Give one of the two.")
    console = Console(highlight=False)
    is_url = "://" in source
    if is_url:
        views = _scraped(source, prefix)
    else:
        views = _recorded(source, console, once, follow, speed)
    if once:
        for view in views:
            console.print(drawn(view, console.width))
            return
    with Live(console=console, auto_refresh=False) as live:
        for view in views:
            live.update(drawn(view, console.width), refresh=True)


def _scraped(url: str, prefix: str) -> Iterator[View]:
    """Yield a view each second."""
    from kvpager.top.scraped import Scraper

    with wrong_usage():
        scraper = Scraper(url, prefix)
    while True:
        try:
            yield scraper.view()
        except ValueError as error:
            raise BadInput(f"{url}: {error}") from None
        time.sleep(_SCRAPE_S)


def _recorded(
    path: str, console: Console, once: bool, follow: bool, speed: float
) -> Iterator[View]:
    """Yield views of a recording: the last one, as it is written, or as it was recorded."""
    from kvpager.recording.reader import Recording
    from kvpager.top.recorded import Player
    from kvpager.top.screen import cells_for

    cells = cells_for(console.width)
    began = shown = time.monotonic()
    is_caught_up = False

    def wait() -> bool:
        nonlocal is_caught_up
        is_caught_up = True
        time.sleep(_FRAME_S)
        return not recording.is_complete

    with wrong_usage(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the line of a run that goes on is cut now and then
        recording = Recording(path, wait if follow else None)
        player = Player(recording.header)
        for step in recording:
            if not once and not follow:
                time.sleep(max(step.t / speed - (time.monotonic() - began), 0.0))
            player.apply(step)
            now = time.monotonic()
            if not once and now - shown >= _FRAME_S and (is_caught_up or not follow):
                shown = now
                yield player.view(cells)
        yield player.view(cells)
