"""Choose the CPU kernels once per process: native kernels if they can be built or found.

`KVPAGER_CPU_KERNELS` is `auto` (the default: the best variant for this CPU), the name of a variant,
or `off` for the reference kernels. Case does not matter.
"""

from __future__ import annotations

import logging
import os

from kvpager.kernels import backends
from kvpager.kernels.cpu import compiler
from kvpager.kernels.cpu.attention import PagedAttention
from kvpager.kernels.cpu.cache import BuildError
from kvpager.kernels.cpu.compiler import Variant
from kvpager.kernels.cpu.copies import AppendKV, CopyBlocks, GatherKV
from kvpager.kernels.cpu.library import Library

logger = logging.getLogger("kvpager")

VARIABLE = "KVPAGER_CPU_KERNELS"

KERNELS: dict[str, type[AppendKV | CopyBlocks | GatherKV | PagedAttention]] = {
    "append_kv": AppendKV,
    "copy_blocks": CopyBlocks,
    "gather_kv": GatherKV,
    "paged_attention": PagedAttention,
}


def register() -> None:
    """Register the native kernels for `cpu`, or the reference kernels with the reason."""
    try:
        library, reason = _load()
    except (BuildError, ValueError, OSError) as error:
        logger.warning("kvpager: no native CPU kernels, torch runs instead: %s", error)
        library, reason = None, str(error)
    if library is None:
        backends.register_reference(KERNELS, "cpu", reason)
        return
    for operation, kernel in KERNELS.items():
        backends.register(operation, "cpu", kernel(library), reason)


def choose() -> Variant | None:
    """Return the variant to run, built or not; None for the reference kernels. O(1).

    Raises: `ValueError` if `KVPAGER_CPU_KERNELS` is unknown or this CPU cannot run the variant.
    """
    value = os.environ.get(VARIABLE) or "auto"
    choice = value.lower()
    if choice == "off":
        return None
    if choice == "auto":
        return compiler.variants()[0]
    try:
        return compiler.variant_named(choice)
    except ValueError as error:
        raise ValueError(f"{VARIABLE}={value}: {error}; auto and off are understood, too") from None


def _load() -> tuple[Library | None, str]:
    variant = choose()
    if variant is None:
        return None, f"{VARIABLE}=off"
    built = compiler.ensure(variant)
    library = Library(built.path)
    threads = "" if library.threaded else ", one thread: the compiler has no OpenMP"
    return library, f"{variant.name}, {built.origin}{threads}"
