"""Replace attributes and attention functions of transformers, and restore the originals."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from transformers.modeling_utils import AttentionInterface

from kvpager.integrations.huggingface.attention.functions import AttentionFunction

logger = logging.getLogger("kvpager")

_undo: list[Callable[[], None]] = []


def replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace attribute `name` of `owner` by `wrap(attribute)`. O(1)."""
    original = getattr(owner, name, None)
    if original is None:
        # This release lacks a private function, and with it an optimisation.
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
    """Restore all originals, in reverse order. O(replacements)."""
    while _undo:
        _undo.pop()()


def _restore(what: str, is_ours: bool, restore: Callable[[], None]) -> None:
    if is_ours:
        restore()
    else:
        # Other code replaced our function and may call it. Without a patch it calls the original.
        logger.warning("%s was replaced by other code while patched, and is left unchanged", what)
