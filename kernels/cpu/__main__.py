"""Build the native CPU kernels ahead of time, for images and machines without a compiler.

python -m kvpager.kernels.cpu build
python -m kvpager.kernels.cpu status
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable

from kvpager.kernels.cpu import cache, compiler, provider
from kvpager.kernels.cpu.cache import BuildError
from kvpager.kernels.cpu.compiler import Built, Variant
from kvpager.kernels.cpu.library import Library


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kvpager.kernels.cpu", description="The native CPU kernels of kvpager."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="build the kernels into the cache folder")
    build.add_argument(
        "--variant",
        help="auto: the best for this CPU; all: every supported variant; or one of "
        + ", ".join(variant.name for variant in compiler.VARIANTS)
        + f" (default: ${provider.VARIABLE}, else auto)",
    )
    build.add_argument("--rebuild", action="store_true", help="rebuild existing libraries")
    build.set_defaults(run=_build)
    about = "show which variants are built and which one would run"
    commands.add_parser("status", help=about).set_defaults(run=_status)
    chosen = parser.parse_args(arguments)
    try:
        chosen.run(chosen)
    except (BuildError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _build(chosen: argparse.Namespace) -> None:
    able = compiler.variants()
    if chosen.variant is None:
        variant = provider.choose()  # that a program would use
        if variant is None:
            off = f"{provider.VARIABLE}=off"
            raise ValueError(f"{off}: nothing to build. Pass --variant to build one.")
        wanted = [variant]
    elif chosen.variant == "auto":
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
    able = compiler.variants()
    for variant in compiler.VARIANTS:
        found = _find(variant)
        built = f"built: {found.path}" if found else "not built"
        said = f"runs here, {built}" if variant in able else "not on this CPU"
        print(f"{variant.name:12} {said}")
    print(f"in use       {_used()}")
    chosen = os.environ.get(provider.VARIABLE)
    if chosen:
        print(f"chosen       {provider.VARIABLE}={chosen}")
    print(f"compiler     {_or_why_not(compiler.find_compiler)}")
    print(f"cache        {_or_why_not(cache.writable_folder)}")


def _find(variant: Variant) -> Built | None:
    """Return the library that `ensure` would find without building."""
    for by_any_compiler in (False, True):
        with contextlib.suppress(BuildError):
            found = compiler.find(variant, by_any_compiler=by_any_compiler)
            if found:
                return found
    return None


def _used() -> str:
    """Describe the variant that a program would use now."""
    try:
        variant = provider.choose()
    except ValueError as error:
        return f"torch: {error}"
    if variant is None:
        return "torch"
    try:
        if compiler.find(variant) is None:
            name = compiler.find_compiler().name
            return f"{variant.name}, after building it with {name} in {cache.writable_folder()}"
    except BuildError as error:
        if _find(variant) is None:
            return f"torch: {error}"
    return variant.name


def _or_why_not(find: Callable[[], object]) -> str:
    try:
        return str(find())
    except BuildError as error:
        return f"none: {error}"


if __name__ == "__main__":
    sys.exit(main())
