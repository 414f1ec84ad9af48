"""Build the native CPU kernels ahead, for an image or a machine without a compiler at run time.

python -m kvpager.kernels.cpu build
"""

from __future__ import annotations

import argparse
import sys

from kvpager.kernels.cpu import compiler
from kvpager.kernels.cpu.compiler import BuildError
from kvpager.kernels.cpu.library import Library


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kvpager.kernels.cpu", description="The native CPU kernels of kvpager."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="build them now, into the cache folder")
    build.add_argument(
        "--variant",
        default="auto",
        help="auto: the best for this CPU (default); all: each that it can run; or one of "
        + ", ".join(variant.name for variant in compiler.VARIANTS),
    )
    build.add_argument("--rebuild", action="store_true", help="build even what is there already")
    build.set_defaults(run=_build)
    status = commands.add_parser("status", help="show variants, compiler and cache folder")
    status.set_defaults(run=_status)
    chosen = parser.parse_args(arguments)
    try:
        chosen.run(chosen)
    except (BuildError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _build(chosen: argparse.Namespace) -> None:
    able = compiler.variants()
    if chosen.variant == "auto":
        wanted = able[:1]
    elif chosen.variant == "all":
        wanted = able
    else:
        wanted = [compiler.variant_named(chosen.variant)]
    for variant in wanted:
        built = compiler.ensure(variant, rebuild=chosen.rebuild)
        library = Library(built.path)
        threads = "" if library.threaded else ", one thread"
        print(f"{variant.name}: {built.origin}, {library.lanes} lanes{threads}: {built.path}")


def _status(_: argparse.Namespace) -> None:
    able = {variant.name for variant in compiler.variants()}
    for variant in compiler.VARIANTS:
        print(f"{variant.name:12} {'runs here' if variant.name in able else 'not on this CPU'}")
    print(f"compiler     {compiler.find_compiler() or 'none found'}")
    print(f"cache        {compiler.cache_folder()}")


if __name__ == "__main__":
    sys.exit(main())
