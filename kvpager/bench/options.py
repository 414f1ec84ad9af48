"""Options of commands, as dataclass fields that carry their help."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(
    panel: str,
    help: str,
    metavar: str | None = None,
    default: Any = None,
    *,
    shown: str | None = None,
    name: str | None = None,
) -> Any:
    """Return a dataclass field that `kvpager.cli.options.takes_options` makes an option. O(1).

    Args:
        panel: the group of options in the help.
        help: what the help says about it.
        metavar: the name of its value in the help.
        default: the field's default.
        shown: the default in words, for the help.
        name: the option; by default the field's name, with `--no-name` for a flag.
    """
    told = {"help": help, "metavar": metavar, "show_default": shown or True}
    names = () if name is None else (name,)
    return field(default=default, metadata={"rich_help_panel": panel, "names": names, **told})
