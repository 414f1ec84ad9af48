"""Attributes and attention functions that are replaced, and put back as they were found."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from transformers.modeling_utils import AttentionInterface

from kvpager.integrations.huggingface.attention.functions import AttentionFunction

logger = logging.getLogger("kvpager")

_undo: list[Callable[[], None]] = []


def replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace attribute `name` of `owner` by what `wrap` makes of it. O(1)."""
    original = getattr(owner, name, None)
    if original is None:
        # A private hook that this transformers does without: what it serves is an optimisation.
        logger.warning("transformers has no %s.%s: paging works without it", owner.__name__, name)
        return
    ours = wrap(original)
    setattr(owner, name, ours)
    _undo.append(
        lambda: _restore(
            f"{owner.__name__}.{name}",
            getattr(owner, name) is ours,
            lambda: setattr(owner, name, original),
        )
    )


def replace_attention(name: str, ours: AttentionFunction) -> None:
    """Register `ours` as the attention function called `name`. O(1)."""
    registered: Any = AttentionInterface._global_mapping
    original = registered[name]
    AttentionInterface.register(name, ours)
    _undo.append(
        lambda: _restore(
            f"the {name} attention",
            registered[name] is ours,
            lambda: AttentionInterface.register(name, original),
        )
    )


def restore_all() -> None:
    """Put back everything that was replaced, the last first. O(replacements)."""
    while _undo:
        _undo.pop()()


def _restore(what: str, is_ours: bool, restore: Callable[[], None]) -> None:
    if is_ours:
        restore()
    else:
        # Another patch replaced ours, and may call it. Ours does nothing from now on.
        logger.warning("%s was replaced while patched, and is left as it is", what)
