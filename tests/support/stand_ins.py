"""Modules of stand-ins under the names of a package that is not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any


@contextmanager
def importable(
    package: str, version: str, modules: Iterable[tuple[str, Iterable[Any]]], **attributes: Any
) -> Iterator[None]:
    """Make members importable from modules of `package`, unless the package is installed.

    `modules` are names with their members. `attributes` are set on `package.platforms`.
    """
    if find_spec(package) is not None:
        yield
        return
    added = dict[str, ModuleType]()
    for name, members in modules:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            parent = ".".join(parts[:count])
            added.setdefault(parent, ModuleType(parent))
        for member in members:
            setattr(added[name], member.__name__, member)
    added[package].__dict__["__version__"] = version
    if attributes:
        added[f"{package}.platforms"].__dict__.update(attributes)
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]
