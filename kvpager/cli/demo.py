"""The command `kvpager demo`: generate with kvpager and without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from kvpager.cli.files import check_writable, write_json
from kvpager.cli.options import JsonFile, option, takes


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command."""

    model: Annotated[
        str | None,
        option(
            "Model and hardware",
            "Any causal language model of transformers.",
            metavar="NAME_OR_PATH",
            show_default="the bundled one, offline",
        ),
    ] = None
    device: Annotated[
        str | None,
        option(
            "Model and hardware",
            "Device, such as cpu or cuda:1.",
            metavar="DEVICE",
            show_default="cuda if torch finds one, else cpu",
        ),
    ] = None
    dtype: Annotated[
        str | None,
        option(
            "Model and hardware",
            "float32, bfloat16, float16, or auto for the checkpoint's dtype.",
            metavar="DTYPE",
            show_default="float32 for the bundled model, else auto",
        ),
    ] = None
    prompt: Annotated[
        list[str] | None,
        option("Requests", "Prompt of scenario (a); repeatable.", metavar="TEXT"),
    ] = None
    max_new_tokens: Annotated[
        int, option("Requests", "Generated tokens per row.", metavar="TOKENS")
    ] = 32
    block_size: Annotated[
        int, option("Memory", "Tokens per block, a power of two.", metavar="TOKENS")
    ] = 16
    memory: Annotated[
        str | None,
        option(
            "Memory",
            "Maximum KV cache memory, such as 64MiB.",
            metavar="SIZE",
            show_default="no bound",
        ),
    ] = None
    json_file: JsonFile = None


@takes(Options)
def demo(options: Options) -> None:
    """Generate with DynamicCache and with kvpager, and compare texts and memory.

    Exit status: 0 if all outputs are identical or differ only by near-ties;
    1 for any other difference; 2 for wrong usage. In a near-tie the logits of
    two tokens are equal within the dtype's rounding.
    """
    from kvpager.demo.settings import Settings

    settings = Settings(
        model=options.model,
        prompts=tuple(options.prompt or ()),
        max_new_tokens=options.max_new_tokens,
        device=options.device,
        dtype=options.dtype,
        block_size=options.block_size,
        memory=options.memory,
    )
    json_file = options.json_file
    check_writable(json_file)
    settings.check()
    from kvpager.demo.runs import run

    results, console = run(settings, quiet=json_file == "-")
    write_json(json_file, results.as_json())
    if json_file not in (None, "-"):
        console.print(f"figures: {json_file}", markup=False, highlight=False)
    if results.is_wrong:
        raise typer.Exit(1)
