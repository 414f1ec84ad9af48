"""The settings of a user: `offload`, or the same as JSON for `vllm serve`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpager import _validate as arguments
from kvpager.blocks.policies import make_policy
from kvpager.integrations.vllm.interface import KVTransferConfig
from kvpager.storage.tiers.agreement import check_shared
from kvpager.storage.tiers.urls import checked_tiers

# vLLM's own settings of its OffloadingConnector that kvpager passes on.
_PASSED = frozenset(
    {"block_size", "blocks_per_chunk", "offload_prompt_only", "self_describing_kv_events"}
)
_ADDED = frozenset({"spec_module_path", "spec_name"})


@dataclass(frozen=True)
class Options:
    """The settings of kvpager in `kv_connector_extra_config`.

    Attributes:
        host_memory: bytes of host memory for blocks.
        tiers: URLs of the stores below it, in the order in which they are asked.
        eviction: which blocks leave the host memory first.
        model_id: the name of the model in the stores; None for a digest of its files.
        cross_stack: True shares the stores with other stacks.
    """

    host_memory: int
    tiers: tuple[str, ...] = ()
    eviction: str = "lru"
    model_id: str | None = None
    cross_stack: bool = False

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> Options:
        """Read and check settings. Raises: `ValueError`, `TypeError` for a bad one."""
        ours = {name: value for name, value in extra.items() if name not in _PASSED | _ADDED}
        if unknown := sorted(ours.keys() - cls.__dataclass_fields__.keys()):
            known = ", ".join(sorted({*cls.__dataclass_fields__, *_PASSED}))
            raise ValueError(f"{unknown[0]}: kvpager has no such setting for vLLM. Use {known}")
        num_bytes = arguments.parse_memory(ours.get("host_memory"), "host_memory")
        if num_bytes is None:
            raise TypeError('host_memory: expected bytes or a text such as "8GiB"')
        given = ours.get("tiers", ())
        tiers = (given,) if isinstance(given, str) else tuple(given)
        if not all(isinstance(tier, str) for tier in tiers):
            raise TypeError("tiers: expected URLs. The processes of vLLM open the stores.")
        checked_tiers(tiers)
        make_policy(eviction := ours.get("eviction", "lru"), 1)
        model_id = ours.get("model_id")
        arguments.label("model_id", model_id)
        options = cls(num_bytes, tiers, eviction, model_id, ours.get("cross_stack", False))
        if arguments.flag("cross_stack", options.cross_stack):
            check_shared(tiers, model_id)
        return options


def offload(
    host_memory: int | str,
    *,
    tiers: str | Sequence[str] = (),
    eviction: str = "lru",
    model_id: str | None = None,
    synchronous: bool = False,
    cross_stack: bool = False,
    **settings: Any,
) -> Any:
    """Return the `KVTransferConfig` with which vLLM keeps blocks in kvpager's tiers.

    Pass it as `LLM(..., kv_transfer_config=offload("8GiB"))`.

    Args:
        host_memory: bytes of host memory for blocks, or a text such as `"8GiB"`.
        tiers: URLs of stores below it, such as `"disk:/var/cache/kv?capacity=200GiB"`.
        eviction: which blocks leave first: a policy's name in `kvpager.blocks.policies.POLICIES`.
        model_id: the name of the model in the stores, such as `"llama-3-8b@8cde5ca"`; by default, a
            digest of its files.
        synchronous: take kvpager's connector, which copies within the step, not vLLM's
            OffloadingConnector.
        cross_stack: share the stores with other stacks, such as transformers under kvpager, that
            have the same `model_id` and blocks as large as a chunk. Needs `synchronous`, and a call
            of `run_probe`.
        settings: vLLM's own: `blocks_per_chunk`, `block_size`, `offload_prompt_only`,
            `self_describing_kv_events`.

    Raises: `ValueError`, `TypeError` for a bad argument.
    """
    extra: dict[str, Any] = {
        "host_memory": host_memory,
        "tiers": [tiers] if isinstance(tiers, str) else list(tiers),
        "eviction": eviction,
        "model_id": model_id,
        "cross_stack": cross_stack,
        **settings,
    }
    if Options.of(extra).cross_stack and not synchronous:
        raise ValueError("cross_stack: expected synchronous=True. Pass both.")
    if not arguments.flag("synchronous", synchronous):
        extra |= {
            "spec_name": "KvpagerOffloadingSpec",
            "spec_module_path": "kvpager.integrations.vllm.spec",
        }
    return KVTransferConfig(
        kv_connector="KvpagerConnector" if synchronous else "KvpagerOffloadingConnector",
        kv_connector_module_path="kvpager.integrations.vllm",
        kv_role="kv_both",
        kv_connector_extra_config=extra,
    )
