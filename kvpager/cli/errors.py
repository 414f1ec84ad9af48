"""Errors that a user can mend, as one line and exit code 2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer


def fail(message: str) -> typer.Exit:
    """Print an error; return the exception that ends the command with 2."""
    typer.echo(f"kvpager: {message}", err=True)
    return typer.Exit(2)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and exit code 2."""
    from kvpager.errors import BadInput, OutOfBlocks

    try:
        yield
    except (BadInput, OutOfBlocks) as error:
        raise fail(str(error)) from None
    except ImportError as error:
        if "transformers" not in str(error):
            raise
        raise fail(
            "this needs transformers, which is not installed: pip install 'kvpager[transformers]'"
        ) from error
