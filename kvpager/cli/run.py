"""The command `kvpager run`: run a program with every transformers model patched."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpager.bench.options import option
from kvpager.cli.errors import no_such_option, one_line_errors, wrong_usage
from kvpager.cli.options import names_of, takes_options
from kvpager.errors import BadInput

# Options after COMMAND belong to it.
PASS_THROUGH = {"ignore_unknown_options": True, "allow_interspersed_args": False}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of `patch`."""

    memory: str | None = option(
        "Memory", "Maximum KV cache memory of all pools, such as 4GiB.", "SIZE", shown="no bound"
    )
    host_memory: str | None = option(
        "Memory", "Host memory for rows that do not fit.", "SIZE", shown="none"
    )
    block_size: int = option("Memory", "Tokens per block, a power of two.", "TOKENS", 16)
    kv_cache_dtype: str | None = option(
        "Memory", "Store keys and values in 8 bits.", "int8|fp8_e4m3", shown="the model's dtype"
    )
    prefix_cache: bool = option(
        "Behaviour",
        "Reuse the KV of earlier prompts and replies.",
        default=False,
        name="--prefix-cache",
    )
    in_place: bool = option(
        "Behaviour", "Read blocks in place, or gather them for every read.", default=True
    )


_Command = Annotated[
    list[str],
    typer.Argument(
        metavar="COMMAND ...",
        help="A console script such as `transformers serve MODEL`, a .py file or `-m MODULE`, "
        "and its arguments.",
    ),
]


_Report = Annotated[
    bool,
    typer.Option("--report", help="Print a report to stderr at exit.", rich_help_panel="Output"),
]


@takes_options
def run(command: _Command, options: Options, report: _Report = False) -> None:
    """Run a Python program with `kvpager.patch()` active for every model in its process.

    Example: kvpager run --memory 4GiB transformers serve MODEL --continuous-batching

    Options before COMMAND belong to kvpager, options after it to the program.
    Child processes of the program are not patched.

    Exit status: the program's; 2 for wrong usage of kvpager.
    """
    with one_line_errors(names_of(Options)), wrong_usage():  # not around the program itself
        program, arguments = _find(command)
        from kvpager.integrations.huggingface.patching.patch import patch

        paging = patch(**vars(options))
    sys.argv = arguments
    try:
        with paging:
            program()
    finally:
        if report:
            typer.echo(paging.report(), err=True)


def _find(command: list[str]) -> tuple[Callable[[], Any], list[str]]:
    """Return the program as a function, and its `sys.argv`. Raises `BadInput` if not found."""
    name, *rest = command
    if name.startswith("-") and name != "-m":  # click took it for the program
        flag = name.split("=")[0]
        known = [*names_of(Options).values(), "--report", "--help"]
        raise BadInput(no_such_option(flag, known, "kvpager run"))
    if name == "-m":
        if not rest:
            raise BadInput("-m: no module given. Name one: kvpager run -m package.module")
        return lambda: runpy.run_module(rest[0], run_name="__main__", alter_sys=True), rest
    if Path(name).name.startswith("python"):
        raise BadInput(f"{name}: not a program of its own. Leave it out: kvpager run script.py")
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise BadInput(f"{name}: no such file.")
        sys.path.insert(0, str(Path(name).resolve().parent))  # as the interpreter does
        return lambda: runpy.run_path(name, run_name="__main__"), command
    found = next(iter(entry_points(group="console_scripts", name=name)), None)
    if found is None:
        raise BadInput(
            f"{name}: no installed Python program has this name. "
            "Name a console script, a .py file, or -m MODULE."
        )
    return lambda: sys.exit(found.load()()), command
