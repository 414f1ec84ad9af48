"""vLLM's OffloadingConnector, after a check that kvpager can serve the model."""

from __future__ import annotations

from typing import Any

from kvpager.integrations.vllm.interface import (
    FullAttentionSpec,
    OffloadingConnector,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
    set_current_vllm_config,
)


class KvpagerOffloadingConnector(OffloadingConnector):  # type: ignore[misc]
    """vLLM's OffloadingConnector with a `KvpagerOffloadingSpec`."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Check the layers of the model. Raises: `NotImplementedError`, and as the spec does."""
        check_groups(kv_cache_config)
        # The spec is given a part of the configuration, without what names the model.
        with set_current_vllm_config(vllm_config):
            super().__init__(vllm_config, role, kv_cache_config)


def check_groups(kv_cache_config: Any) -> None:
    """Raise `NotImplementedError` for layers that kvpager does not serve. O(layers)."""
    for group in kv_cache_config.kv_cache_groups:
        _check_group(group.kv_cache_spec)


def _check_group(spec: Any) -> None:
    layers = [spec]
    if isinstance(spec, UniformTypeKVCacheSpecs):
        layers = list(spec.kv_cache_specs.values())
    for layer in layers:
        if not isinstance(layer, (FullAttentionSpec, SlidingWindowSpec)):
            raise NotImplementedError(
                f"kvpager cannot offload layers of vLLM's kind {type(layer).__name__}. It serves "
                "full attention and sliding windows. Remove kv_transfer_config."
            )
