"""What the commands refuse with one line and exit code 2."""

from __future__ import annotations


class BadInput(Exception):
    """An input that the user can correct. The text is one line."""
