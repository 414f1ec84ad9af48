"""Open an agent of NIXL, from whichever of its packages is installed."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

PACKAGES = ("nixl", "nixl_cu12", "nixl_cu13")  # the first chooses one of the others


def open_agent(backend: str, options: Mapping[str, str]) -> Any:
    """Return a NIXL agent with one backend. Threads may share it.

    Raises: `ModuleNotFoundError` without NIXL; `ValueError` for a backend that NIXL lacks;
    `OSError` for one that does not start.
    """
    nixl = _package()
    sync = nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
    config = nixl.nixl_agent_config(backends=[], sync_mode=sync)
    agent = nixl.nixl_agent(f"kvpager-{secrets.token_hex(8)}", config)
    known = agent.get_plugin_list()
    if backend not in known:
        raise ValueError(f"backend={backend!r}: NIXL has no such backend. Use one of {known}")
    try:
        agent.create_backend(backend, dict(options))
    except Exception as error:  # NIXL's errors have no common class
        raise OSError(
            f"backend={backend!r}: NIXL cannot start it here ({error}). It printed the reason."
        ) from error
    return agent


def _package() -> Any:
    name = next(filter(find_spec, PACKAGES), None)
    if name is None:
        raise ModuleNotFoundError(
            "NIXL is not installed. Run: pip install 'kvpager[nixl]'", name="nixl"
        )
    shows_errors = logging.raiseExceptions
    package = import_module(name)
    logging.raiseExceptions = shows_errors  # the import turned it off, for the whole process
    if "NIXL_LOG_LEVEL" not in os.environ:
        logging.getLogger("nixl").setLevel(logging.WARNING)  # it writes to the standard output
    return package
