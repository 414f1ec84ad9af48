"""The commands `kvpager demo` and `kvpager env`. torch and transformers load when one runs."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import kvpager

app = typer.Typer(
    name="kvpager",
    help="Paged KV-cache memory for PyTorch LLM inference.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE|-", help="The figures as JSON; - prints them alone."),
]


def _fail(message: str) -> typer.Exit:
    typer.echo(f"kvpager: {message}", err=True)
    return typer.Exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvpager {kvpager.__version__}")
        raise typer.Exit


@app.callback()
def kvpager_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Paged KV-cache memory for PyTorch LLM inference."""


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_PATH",
            help="Any transformers causal language model.",
            show_default="the bundled one, offline",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A prompt of scenario (a); may be given repeatedly."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each row.")] = 32,
    device: Annotated[
        str | None,
        typer.Option(help="Such as cpu or cuda:1.", show_default="cuda if there is one, else cpu"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, float16, or auto: as the checkpoint says.",
            show_default="float32 for the bundled model, else auto",
        ),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Token slots of a block, a power of two.")] = 16,
    memory: Annotated[
        str | None,
        typer.Option(
            help="The most bytes the blocks may take, such as 64MiB.", show_default="no bound"
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Generate with transformers' own cache and with kvpager, and compare texts and memory.

    Exit code: 0 if all outputs are identical token by token, 1 if any differs, 2 for bad input.
    """
    from kvpager.demo.settings import Settings

    settings = Settings(
        model=model,
        prompts=tuple(prompt or ()),
        new_tokens=new_tokens,
        device=device,
        dtype=dtype,
        block_size=block_size,
        memory=memory,
    )
    with _one_line_errors():
        _check_writable(json_file)
        settings.check()
        from kvpager.demo.session import run

        results, console = run(settings, quiet=json_file == "-")
    _write_json(json_file, results.as_json())
    if json_file not in (None, "-"):
        console.print(f"figures: {json_file}", markup=False, highlight=False)
    if not results.identical:
        raise typer.Exit(1)


@app.command()
def env(
    json_file: JsonFile = None,
) -> None:
    """Show versions, devices, and which kernels run where and why."""
    from kvpager import environment

    with _one_line_errors():
        _check_writable(json_file)
        found = environment.collect()
    _write_json(json_file, found)
    if json_file != "-":
        environment.show(found)


# -------------------------------------------------------------------- inputs and outputs


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and exit code 2."""
    from kvpager.demo.settings import BadInput
    from kvpager.errors import OutOfBlocks

    try:
        yield
    except BadInput as error:
        raise _fail(str(error)) from None
    except OutOfBlocks as error:
        raise _fail(f"out of blocks: {error}") from None
    except ImportError as error:
        if "transformers" not in str(error):
            raise
        raise _fail(
            "this needs transformers, which is not installed: pip install 'kvpager[transformers]'"
        ) from error


def _check_writable(json_file: str | None) -> None:
    from kvpager.demo.settings import BadInput

    if json_file is None or json_file == "-":
        return
    path = Path(json_file)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise BadInput(f"--json {json_file}: expected a file in a folder that exists, or -")


def _write_json(json_file: str | None, figures: dict[str, Any]) -> None:
    if json_file is None:
        return
    text = json.dumps(figures, indent=2) + "\n"
    if json_file == "-":
        sys.stdout.write(text)
        return
    try:
        Path(json_file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise _fail(f"--json {json_file}: {error.strerror or error}") from None
