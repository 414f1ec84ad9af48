"""The options of a command as a dataclass, and options that several commands share."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

_Options = TypeVar("_Options")
NUM_CPUS = os.cpu_count() or 1


def takes(
    options: type[_Options],
) -> Callable[[Callable[[_Options], None]], Callable[..., None]]:
    """Return a decorator: the command gets one option for each field of the dataclass."""
    hints = get_type_hints(options, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(options)  # type: ignore[arg-type]  # a dataclass
    ]

    def decorate(function: Callable[[_Options], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**given: Any) -> None:
            function(options(**given))

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = hints
        return command

    return decorate


def names_of(options: type[Any]) -> dict[str, str]:
    """Return the options of a dataclass: parameter name -> `--parameter-name`. O(options)."""
    return {each.name: f"--{each.name.replace('_', '-')}" for each in fields(options)}


def _count(value: str | int) -> int:
    """Read a number of operations: `1e7` and `10_000_000` are the same."""
    try:
        number = float(str(value).replace("_", ""))
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not a number") from None
    if not 1 <= number <= 1e12 or number != int(number):
        raise typer.BadParameter(f"{value} is not a whole number from 1 to 1e12")
    return int(number)


def option(panel: str, help: str, *names: str, **more: Any) -> Any:
    """Return a typer option that the help shows in `panel`. O(1)."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


JsonFile = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE|-",
        help="Write the figures as JSON; - prints only them.",
        rich_help_panel="Output",
    ),
]
PlotFile = Annotated[
    str | None,
    option("Output", "Write a plot to a .png or .svg file.", metavar="FILE"),
]
Operations = Annotated[
    int, typer.Option(metavar="N", parser=_count, help="Number of operations, such as 1e7.")
]
Processes = Annotated[
    int, typer.Option(min=1, max=256, help="Parallel processes.", show_default="one per CPU")
]
