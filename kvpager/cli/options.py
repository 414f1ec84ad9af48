"""Commands that take dataclasses of options, and options that several commands share."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

NUM_CPUS = os.cpu_count() or 1


def takes_options(function: Callable[..., None]) -> Callable[..., None]:
    """Return a command with an option for each field of the dataclasses that `function` takes."""
    hints = get_type_hints(function, include_extras=True)
    kinds: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in kinds:
            parameters += _parameters(kinds[name])
        else:
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(kind=keyword, annotation=hints[name]))

    @functools.wraps(function)
    def command(**given: Any) -> None:
        for name, kind in kinds.items():
            own = {each: given.pop(each) for each in names_of(kind)}
            given[name] = kind(**own)
        function(**given)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def _parameters(options: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(options)
    for each in fields(options):
        told = dict(each.metadata)
        if told:  # the field is an option
            hint = hints[each.name]
            hint = str | None if hint == int | str | None else hint  # typer takes no such union
            yield inspect.Parameter(
                each.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=each.default,
                annotation=Annotated[hint, typer.Option(*told.pop("names"), **told)],
            )


def names_of(options: Any) -> dict[str, str]:
    """Return the options of a dataclass: parameter name -> `--parameter-name`. O(options)."""
    named = [each.name for each in fields(options) if each.metadata]
    return {name: f"--{name.replace('_', '-')}" for name in named}


def _count(value: str | int) -> int:
    """Read a number of operations: `1e7` and `10_000_000` are the same."""
    try:
        number = float(str(value).replace("_", ""))
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not a number") from None
    if not 1 <= number <= 1e12 or number != int(number):
        raise typer.BadParameter(f"{value} is not a whole number from 1 to 1e12")
    return int(number)


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
    typer.Option(
        metavar="FILE", help="Write a plot to a .png or .svg file.", rich_help_panel="Output"
    ),
]
Operations = Annotated[
    int, typer.Option(metavar="N", parser=_count, help="Number of operations, such as 1e7.")
]
Processes = Annotated[
    int, typer.Option(min=1, max=256, help="Parallel processes.", show_default="one per CPU")
]
