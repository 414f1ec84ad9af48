"""The command `kvpager run`: another program, with every transformers model in it patched."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from kvpager.cli.errors import fail, one_line_errors
from kvpager.cli.options import takes

# Options after COMMAND belong to it.
PASS_THROUGH = {"ignore_unknown_options": True, "allow_interspersed_args": False}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command."""

    command: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND ...",
            help="A console script such as `transformers serve MODEL`, a .py file, or `-m MODULE`, "
            "with its arguments.",
        ),
    ]
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Bound of all pools, such as 4GiB.",
            show_default="no bound",
        ),
    ] = None
    host_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Room in host memory for rows that do not fit."),
    ] = None
    block_size: Annotated[int, typer.Option(help="Token slots of a block, a power of two.")] = 16
    prefix_cache: Annotated[
        bool, typer.Option("--prefix-cache", help="Reuse prompts and replies of earlier calls.")
    ] = False
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="int8 or fp8_e4m3: keep keys and values in eight bits.")
    ] = None
    in_place: Annotated[
        bool, typer.Option(help="Read blocks in place, or gather them for every read.")
    ] = True
    report: Annotated[
        bool, typer.Option("--report", help="Print what was paged to stderr at the end.")
    ] = False


@takes(Options)
def run(options: Options) -> None:
    """Run a Python program with `kvpager.patch()` active for every model in its process.

    Example: kvpager run --memory 4GiB transformers serve MODEL --continuous-batching

    Options of kvpager stand before COMMAND, options of the program after it. Exit code: that of
    the program; 2 if the program is not found or an option of kvpager is refused. Processes that
    the program starts are not patched.
    """
    program, arguments = _find(options.command)
    with one_line_errors():
        from kvpager.integrations.huggingface.patching.patch import patch

        try:
            paging = patch(
                memory=options.memory,
                host_memory=options.host_memory,
                block_size=options.block_size,
                prefix_cache=options.prefix_cache,
                kv_cache_dtype=cast(Any, options.kv_cache_dtype),  # it is checked there
                in_place=options.in_place,
            )
        except (TypeError, ValueError) as error:
            raise fail(str(error)) from None
    sys.argv = arguments
    try:
        with paging:
            program()
    finally:
        if options.report:
            typer.echo(paging.report(), err=True)


def _find(command: list[str]) -> tuple[Callable[[], Any], list[str]]:
    """Return the program as a function, and its `sys.argv`. Exits with 2 if there is none."""
    name, *rest = command
    if name == "-m":
        if not rest:
            raise fail("run -m: name a module, as in `kvpager run -m package.module`")
        return lambda: runpy.run_module(rest[0], run_name="__main__", alter_sys=True), rest
    if Path(name).name.startswith("python"):
        raise fail(f"run {name}: leave the interpreter out, as in `kvpager run script.py`")
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise fail(f"run {name}: there is no such file")
        sys.path.insert(0, str(Path(name).resolve().parent))  # as the interpreter does
        return lambda: runpy.run_path(name, run_name="__main__"), command
    found = next(iter(entry_points(group="console_scripts", name=name)), None)
    if found is None:
        raise fail(
            f"run {name}: no installed Python program has this name. "
            "Name a console script, a .py file, or -m MODULE."
        )
    return lambda: sys.exit(found.load()()), command
