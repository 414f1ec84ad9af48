"""The options of a command as a dataclass, and options that several commands have."""

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
    """Make a function of `options` a command with one option for each field of that dataclass."""
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


def _count(value: str | int) -> int:
    """Read a number of operations: `1e7` and `10_000_000` are the same."""
    try:
        number = float(str(value).replace("_", ""))
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not a number") from None
    if not 1 <= number <= 1e12 or number != int(number):
        raise typer.BadParameter(f"{value}: expected a whole number from 1 to 1e12")
    return int(number)


JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE|-", help="The figures as JSON; - prints them alone."),
]
Operations = Annotated[int, typer.Option(metavar="N", parser=_count, help="How many, such as 1e7.")]
Processes = Annotated[
    int, typer.Option(min=1, max=256, help="How many at a time.", show_default="one for each CPU")
]
