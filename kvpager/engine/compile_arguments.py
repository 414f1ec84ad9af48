"""Checks of `torch.compile` arguments for the engine's thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CUDA_GRAPHS = "triton.cudagraphs"


def require_no_cuda_graphs(arguments: Mapping[str, Any]) -> None:
    """Raise `ValueError` if arguments of `torch.compile` request CUDA graphs. O(1).

    torch keeps its CUDA graph trees in thread-local state of the main thread and of autograd's
    threads. In the engine's thread, the compiled forward pass would fail an assertion.
    """
    asked = _asking(arguments)
    if asked is not None:
        raise ValueError(
            f"compile={{{asked}}}: torch cannot record CUDA graphs in the engine's thread. "
            "Use mode='default' or mode='max-autotune-no-cudagraphs'."
        )


def _asking(arguments: Mapping[str, Any]) -> str | None:
    """Return the argument that requests CUDA graphs as text, or None."""
    from torch._inductor import config, list_mode_options

    backend, mode = arguments.get("backend", "inductor"), arguments.get("mode")
    options = arguments.get("options") or {}
    if backend == "cudagraphs":
        return "'backend': 'cudagraphs'"
    if backend != "inductor":
        return None
    if _CUDA_GRAPHS in options:
        return f"'options': {{{_CUDA_GRAPHS!r}: True}}" if options[_CUDA_GRAPHS] else None
    if isinstance(mode, str) and list_mode_options().get(mode, {}).get(_CUDA_GRAPHS):
        return f"'mode': {mode!r}"
    if config.triton.cudagraphs:
        return "torch._inductor.config.triton.cudagraphs"
    return None
