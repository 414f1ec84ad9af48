"""How commands fail: one line on stderr, `kvpager: argument=value: constraint. Fix.`

Exit status 2: the command was used wrongly. Exit status 1: its work failed. Only a bug of kvpager
leaves a traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

WRONG_USAGE, FAILED, INTERRUPTED = 2, 1, 130

# typer brings its own copy of click; older releases of typer import click.
_ClickError: type[Exception] = typer.BadParameter.__mro__[2]


def fail(message: str, status: int = WRONG_USAGE) -> typer.Exit:
    """Print an error; return the exception that ends the command with `status`."""
    typer.echo(f"kvpager: {' '.join(message.split())}", err=True)
    return typer.Exit(status)


@contextlib.contextmanager
def one_line_errors(options: Mapping[str, str]) -> Iterator[None]:
    """Turn the errors that a user can correct into one line and an exit status.

    `options`: the command's options by parameter name, as in `{"block_size": "--block-size"}`. A
    library's message about `block_size=12` names the option.
    """
    from kvpager.errors import BadInput, KVPagerError

    try:
        yield
    except BadInput as error:
        raise fail(_naming(str(error), options)) from None
    except KVPagerError as error:
        raise fail(_naming(str(error), options), FAILED) from None
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of a pipe has gone: typer ends quietly
            raise
        raise fail(_of_file(error), FAILED) from None
    except ImportError as error:
        if "pip install" in str(error):  # a missing extra of kvpager
            raise fail(f"{error}") from None
        if "transformers" not in str(error):
            raise
        raise fail(
            "transformers is not installed. Run: pip install 'kvpager[transformers]'"
        ) from None


@contextlib.contextmanager
def wrong_usage() -> Iterator[None]:
    """Turn errors about arguments and input files into `BadInput`."""
    from kvpager.errors import BadInput

    try:
        yield
    except OSError as error:
        raise BadInput(_of_file(error)) from None
    except (ValueError, TypeError) as error:
        raise BadInput(str(error)) from None


def _of_file(error: OSError) -> str:
    if error.filename is None:
        return str(error)
    return f"{error.filename}: {error.strerror}."


def _naming(message: str, options: Mapping[str, str]) -> str:
    """Return `message` with the option in place of the parameter that it begins with."""
    match = re.match(r"(\w+)[= ]", message)
    if match is None or match[1] not in options:
        return message
    return f"{options[match[1]]}={message[match.end() :]}"


def _flags_without_type(params: list[Any]) -> list[Any]:
    """Return `params`; the help then shows flags without <bool>, since they take no value."""
    for param in params:
        if getattr(param, "is_bool_flag", False):
            param.metavar = ""
    return params


class Program(TyperCommand):
    """A command that runs another program, whose errors are its own."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the arguments and options."""
        return _flags_without_type(super().get_params(ctx))


class Command(Program):
    """A command whose errors are one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Exits with 1 or 2 if it fails."""
        options = {
            param.name: param.opts[0]
            for param in self.params
            if param.name and param.opts[0].startswith("-")
        }
        with one_line_errors(options):
            return super().invoke(ctx)


class Group(TyperGroup):
    """A group of commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the arguments and options."""
        return _flags_without_type(super().get_params(ctx))


class Commands(Group):
    """The command `kvpager`: usage errors are one line, too."""

    def main(self, *args: Any, **more: Any) -> Any:
        """Run the command line and exit with its status."""
        more["standalone_mode"] = False
        try:
            status = super().main(*args, **more)
        except _ClickError as error:
            _exit_for(error)
        except typer.Abort:
            typer.echo("kvpager: interrupted.", err=True)
            status = INTERRUPTED
        sys.exit(status if isinstance(status, int) else 0)


def _exit_for(error: Any) -> NoReturn:
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(WRONG_USAGE)
    context = getattr(error, "ctx", None)
    command = "kvpager" if context is None else context.command_path
    usage = _usage(error)
    end = "" if usage.endswith("?") else "."
    sys.exit(fail(f"{usage}{end} See `{command} --help`.").exit_code)


def no_such_option(given: str, options: Iterable[str], command: str) -> str:
    """Return the message on an option that `command` lacks. O(options)."""
    known = difflib.get_close_matches(given, options, 1)
    return f"{_unknown(given, known)}. See `{command} --help`."


def _unknown(given: str, known: Iterable[str]) -> str:
    meant = " or ".join(sorted(known))
    return f"{given}: no such option" + (f" (meant: {meant}?)" if meant else "")


def _usage(error: Any) -> str:
    """Return what is wrong with the command line, as `--option=value: constraint`."""
    if hasattr(error, "possibilities") and hasattr(error, "option_name"):
        return _unknown(error.option_name, error.possibilities or ())
    message = str(error.message).rstrip(".")
    message = re.sub(r"^Input should be ([^,]*).*", r"expected \1", message)
    param = getattr(error, "param", None)
    if not isinstance(error, typer.BadParameter) or param is None or not message:
        return str(error.format_message()).rstrip(".")
    match = re.fullmatch(r"('[^']*'|\S+) is (not .*)", message)
    if match is None:
        return f"{param.opts[0]}: {message}"
    value = match[1].strip("'")
    return f"{param.opts[0]}={value}: {match[2]}"
