"""Replace attributes and attention functions of transformers, and restore the originals."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from transformers.modeling_utils import AttentionInterface

from kvpager.integrations.huggingface.attention.functions import AttentionFunction

logger = logging.getLogger("kvpager")

_undo: list[Callable[[], None]] = []


def around(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return a function that wraps an original: calls go to `function(original, ...)`."""

    def wrap(original: Any) -> Any:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        return call

    return wrap


def replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace attribute `name` of `owner` by `wrap(attribute)`. O(1)."""
    original = getattr(owner, name, None)
    if original is None:
        # This release lacks a private function, and with it an optimisation.
        logger.warning("transformers has no %s.%s: paging works without it", owner.__name__, name)
        return
    get, put = functools.partial(getattr, owner, name), functools.partial(setattr, owner, name)
    _replace(f"{owner.__name__}.{name}", get, put, wrap(original))


def replace_attention(name: str, ours: AttentionFunction) -> None:
    """Register `ours` as the attention function called `name`. O(1)."""
    registered: Any = AttentionInterface._global_mapping
    put = functools.partial(AttentionInterface.register, name)
    _replace(f"the {name} attention", functools.partial(registered.get, name), put, ours)


def _replace(what: str, get: Callable[[], Any], put: Callable[[Any], Any], ours: Any) -> None:
    original = get()

    def restore() -> None:
        if get() is ours:
            put(original)
            return
        # Other code replaced our function and may call it. Without a patch it calls the original.
        logger.warning("%s was replaced by other code while patched, and is left unchanged", what)

    put(ours)
    _undo.append(restore)


def restore_all() -> None:
    """Restore all originals, in reverse order. O(replacements)."""
    while _undo:
        _undo.pop()()
