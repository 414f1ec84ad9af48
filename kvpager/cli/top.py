"""The command `kvpager top`: shows an engine in a terminal."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from kvpager.cli.errors import wrong_usage
from kvpager.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console

    from kvpager.top.view import View

    Show = Callable[[View], None]

_FRAME_S = 0.2
_SCRAPE_S = 1.0
_WAIT_S_MAX = 1e6  # for a step of a recording: a sleep of centuries is an error

_Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A recording of Engine(record=...), or the URL of the metrics of an engine on this "
        "machine, such as http://127.0.0.1:9400/metrics.",
        show_default=False,
    ),
]
_Once = Annotated[
    bool, typer.Option("--once", help="Print the last state and exit.", show_default=False)
]
_Follow = Annotated[
    bool,
    typer.Option("--follow", help="Follow a recording that is being written.", show_default=False),
]
_Speed = Annotated[
    float,
    typer.Option(metavar="X", min=0.001, max=1e6, help="Play a recording X times as fast."),
]
_Prefix = Annotated[str, typer.Option(metavar="NAME", help="Prefix of the names of the metrics.")]


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

    def run(show: Show) -> None:
        if "://" in source:
            _scrape(source, prefix, show, once=once)
        elif follow:
            _follow(source, console, show)
        else:
            _play(source, console, show, None if once else speed)

    if once:
        run(lambda view: console.print(drawn(view, console.width)))
        return
    with Live(console=console, auto_refresh=False) as live:
        run(lambda view: live.update(drawn(view, console.width), refresh=True))


def _scrape(url: str, prefix: str, show: Show, *, once: bool) -> None:
    """Show an engine each second."""
    from kvpager.top.scraped import Scraper

    with wrong_usage():
        scraper = Scraper(url, prefix)
    while True:
        try:
            show(scraper.view())
        except ValueError as error:
            raise BadInput(f"{url}: {error}") from None
        if once:
            return
        time.sleep(_SCRAPE_S)


def _play(path: str, console: Console, show: Show, speed: float | None) -> None:
    """Show a recording at the speed of its run times `speed`; with None, its last moment."""
    from kvpager.recording.reader import Recording
    from kvpager.top.recorded import Player
    from kvpager.top.screen import cells_for

    cells = cells_for(console.width)
    began = shown = time.monotonic()
    with wrong_usage(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the last line of a run that crashed is cut
        recording = Recording(path)
        player = Player(recording.header)
        for step in recording:
            if speed is not None:
                wait_s = step.t / speed - (time.monotonic() - began)
                time.sleep(min(max(wait_s, 0.0), _WAIT_S_MAX))
            player.apply(step)
            if speed is not None and time.monotonic() - shown >= _FRAME_S:
                shown = time.monotonic()
                show(player.view(cells))
        show(player.view(cells))


def _follow(path: str, console: Console, show: Show) -> None:
    """Show a recording while it is written, until it is closed."""
    from kvpager.recording.reader import Recording
    from kvpager.top.recorded import Player
    from kvpager.top.screen import cells_for

    cells, shown = cells_for(console.width), -1.0
    player: Player | None = None

    def wait() -> bool:
        nonlocal shown
        if player is not None and shown != player.seconds:
            shown = player.seconds
            show(player.view(cells))
        time.sleep(_FRAME_S)
        return player is None or not recording.is_complete

    with wrong_usage():
        recording = Recording(path, wait)
        player = Player(recording.header)
        for step in recording:
            player.apply(step)
        show(player.view(cells))
