"""kvpager's tiers under vLLM: `offload`."""

from kvpager.integrations.vllm.connector import KvpagerOffloadingConnector
from kvpager.integrations.vllm.options import offload
from kvpager.integrations.vllm.spec import KvpagerOffloadingSpec

__all__ = ["KvpagerOffloadingConnector", "KvpagerOffloadingSpec", "offload"]
