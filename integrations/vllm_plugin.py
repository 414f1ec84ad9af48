"""vLLM's entry point for kvpager's attention: it does nothing unless the user asks for it.

It stands outside `integrations/vllm`, because vLLM imports it in every process of every engine.
"""

from __future__ import annotations

import os

VARIABLE = "KVPAGER_VLLM_ATTENTION"
BACKEND = "kvpager.integrations.vllm.attention.KvpagerAttentionBackend"


def choice() -> str:
    """Return the user's choice: `0` (vLLM's attention), `1` (kvpager's where it was measured to be
    faster) or `always` (wherever it runs). O(1).

    Raises: `ValueError` for another value of `KVPAGER_VLLM_ATTENTION`.
    """
    value = os.environ.get(VARIABLE) or "0"
    if value not in ("0", "1", "always"):
        raise ValueError(f"{VARIABLE}={value}: expected 0, 1 or always. Change the variable.")
    return value


def register() -> None:
    """Let vLLM's CPU platform use kvpager's attention backend, if the user asked for it. O(1).

    Raises: `ValueError` for an unknown choice.
    """
    if choice() == "0":
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    # The platform uses CPU_ATTN whatever the user names, and asks the registry for its class.
    register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
