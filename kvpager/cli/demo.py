"""The command `kvpager demo`: a model generates with kvpager and without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from kvpager.cli.errors import one_line_errors
from kvpager.cli.files import check_writable, write_json
from kvpager.cli.options import JsonFile, takes


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command."""

    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_PATH",
            help="Any transformers causal language model.",
            show_default="the bundled one, offline",
        ),
    ] = None
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A prompt of scenario (a); may be given repeatedly."),
    ] = None
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each row.")] = 32
    device: Annotated[
        str | None,
        typer.Option(help="Such as cpu or cuda:1.", show_default="cuda if there is one, else cpu"),
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, float16, or auto: as the checkpoint says.",
            show_default="float32 for the bundled model, else auto",
        ),
    ] = None
    block_size: Annotated[int, typer.Option(help="Token slots of a block, a power of two.")] = 16
    memory: Annotated[
        str | None,
        typer.Option(
            help="The most bytes the blocks may take, such as 64MiB.", show_default="no bound"
        ),
    ] = None
    json_file: JsonFile = None


@takes(Options)
def demo(options: Options) -> None:
    """Generate with transformers' own cache and with kvpager, and compare texts and memory.

    Exit code: 0 if all outputs are identical or differ by near-ties only (two tokens whose logits
    are equal within the dtype's rounding), 1 for any other difference, 2 for bad input.
    """
    from kvpager.demo.settings import Settings

    settings = Settings(
        model=options.model,
        prompts=tuple(options.prompt or ()),
        new_tokens=options.new_tokens,
        device=options.device,
        dtype=options.dtype,
        block_size=options.block_size,
        memory=options.memory,
    )
    json_file = options.json_file
    with one_line_errors():
        check_writable(json_file)
        settings.check()
        from kvpager.demo.session import run

        results, console = run(settings, quiet=json_file == "-")
    write_json(json_file, results.as_json())
    if json_file not in (None, "-"):
        console.print(f"figures: {json_file}", markup=False, highlight=False)
    if results.is_wrong:
        raise typer.Exit(1)
