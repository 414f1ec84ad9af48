"""What the installed transformers calls the cache, for tests that pass or read one."""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version

NAME = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


def passing(cache: Any) -> dict[str, Any]:
    """Return the keyword argument that passes `cache` to `generate` or a forward pass."""
    return {NAME: cache}


def cache_of(output: Any) -> Any:
    """Return the cache in the output of `generate` or of a forward pass."""
    return getattr(output, NAME)
