"""Differences between the releases of transformers that kvpager supports.

Since release 5.24, `generate` and forward passes call the cache `cache`. Before, they called it
`past_key_values`. A model whose code is not part of transformers may use the other name.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from packaging.version import InvalidVersion, Version
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from kvpager.errors import UntestedReleaseWarning

# The test suite passes with this minor release, and with the oldest that pyproject.toml allows.
NEWEST_TESTED = "5.24"

_looked_at: set[str] = set()


def _cache_names() -> tuple[str, str]:
    prepare = inspect.signature(GenerationMixin.prepare_inputs_for_generation)
    is_renamed = "cache" in prepare.parameters
    return ("cache", "past_key_values") if is_renamed else ("past_key_values", "cache")


# The name that `generate` of the installed release uses, then the other.
CACHE_NAMES = _cache_names()


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among keyword arguments of `generate` or of a forward pass, or None."""
    name = _name_in(arguments)
    return None if name is None else arguments[name]


def with_cache(arguments: Mapping[str, Any], cache: Cache) -> dict[str, Any]:
    """Return a copy of keyword arguments in which `cache` replaces the cache. O(arguments)."""
    return {**arguments, _name_in(arguments) or CACHE_NAMES[0]: cache}


def _name_in(arguments: Mapping[str, Any]) -> str | None:
    # Only a cache counts: a model that uses one name may give the other another meaning.
    return next((name for name in CACHE_NAMES if isinstance(arguments.get(name), Cache)), None)


def cache_of(output: Any) -> Any:
    """Return the cache in the output of `generate` or of a forward pass, or None."""
    return getattr(output, _attribute(output), None)


def set_cache_of(output: Any, cache: Cache) -> None:
    """Replace the cache in the output of a forward pass."""
    setattr(output, _attribute(output), cache)


def _attribute(output: Any) -> str:
    return next((name for name in CACHE_NAMES if hasattr(output, name)), CACHE_NAMES[0])


def forward_cache_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names under which the forward pass of `model` may take a cache.

    One name if the signature has it. Both if the signature leaves it open with `**kwargs`.
    """
    parameters = inspect.signature(model.forward).parameters
    return tuple(name for name in CACHE_NAMES if name in parameters)[:1] or CACHE_NAMES


def warn_if_untested() -> None:
    """Warn once if the installed transformers is newer than the newest tested release.

    The warning points to the caller of the function that calls this one.
    """
    import transformers  # here, since transformers replaces its own module during its import

    installed = transformers.__version__
    if installed in _looked_at:
        return
    try:
        is_untested = Version(installed).release[:2] > Version(NEWEST_TESTED).release
    except InvalidVersion:  # a user's build without a version number
        is_untested = False
    if is_untested:
        warnings.warn(
            f"transformers {installed}: kvpager was tested with releases up to {NEWEST_TESTED}. "
            "Compare outputs with those of the unpatched model, or install "
            f"'transformers=={NEWEST_TESTED}.*'.",
            UntestedReleaseWarning,
            stacklevel=3,
        )
    _looked_at.add(installed)
