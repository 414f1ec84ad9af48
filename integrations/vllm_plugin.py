"""vLLM's entry point for kvpager's attention. It does nothing unless the user asks for it.

vLLM imports this module in every process of every engine. So it stands outside of
`integrations/vllm`, and imports nothing of it.
"""

from __future__ import annotations

import os

VARIABLE = "KVPAGER_VLLM_ATTENTION"
BACKEND = "kvpager.integrations.vllm.attention.KvpagerAttentionBackend"


def choice() -> str:
    """Return the user's choice: `0`, `1` or `always`. O(1).

    `0` keeps vLLM's attention. `1` takes kvpager's where it was measured to be faster, `always`
    wherever it runs. Raises: `ValueError` for another value of `KVPAGER_VLLM_ATTENTION`.
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
