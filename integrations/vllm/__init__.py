"""kvpager's tiers under vLLM: `offload`."""

from kvpager.integrations.vllm.connector import KvpagerOffloadingConnector
from kvpager.integrations.vllm.cross_stack import run_probe
from kvpager.integrations.vllm.options import offload
from kvpager.integrations.vllm.spec import KvpagerOffloadingSpec
from kvpager.integrations.vllm.synchronous import KvpagerConnector

__all__ = [
    "KvpagerConnector",
    "KvpagerOffloadingConnector",
    "KvpagerOffloadingSpec",
    "offload",
    "run_probe",
]
