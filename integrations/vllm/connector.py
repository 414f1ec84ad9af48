"""vLLM's OffloadingConnector, after a check that kvpager can serve the model."""

from __future__ import annotations

from typing import Any

from kvpager.integrations.vllm.interface import (
    FullAttentionSpec,
    MLAAttentionSpec,
    OffloadingConnector,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
    set_current_vllm_config,
)

_KINDS = (FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec)


class KvpagerOffloadingConnector(OffloadingConnector):  # type: ignore[misc]
    """vLLM's OffloadingConnector with a `KvpagerOffloadingSpec`."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Check the engine and its layers. Raises: as `check_engine` and the spec do."""
        check_engine(vllm_config, kv_cache_config)
        # The spec is given a part of the configuration, without what names the model.
        with set_current_vllm_config(vllm_config):
            super().__init__(vllm_config, role, kv_cache_config)


def check_engine(vllm_config: Any, kv_cache_config: Any) -> None:
    """Check that kvpager can serve an engine. O(layers).

    Raises: `NotImplementedError` for an unknown kind of layer, and for an engine without a prefix
    cache, such as one with latent attention on a CPU.
    """
    for group in kv_cache_config.kv_cache_groups:
        _check_group(group.kv_cache_spec)
    if not vllm_config.cache_config.enable_prefix_caching:
        raise NotImplementedError(
            "enable_prefix_caching=False: this engine does not continue prompts from cached "
            "blocks; vLLM sets this itself where it cannot. Remove kv_transfer_config."
        )


def _check_group(spec: Any) -> None:
    layers = [spec]
    if isinstance(spec, UniformTypeKVCacheSpecs):
        layers = list(spec.kv_cache_specs.values())
    for layer in layers:
        # Not their subclasses: some of these keep other blocks, or other things in them.
        if type(layer) not in _KINDS:
            raise NotImplementedError(
                f"kvpager cannot offload layers of vLLM's kind {type(layer).__name__}. It serves "
                "full attention and sliding windows. Remove kv_transfer_config."
            )
