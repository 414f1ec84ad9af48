"""The classes of vLLM's CPU attention that kvpager's backend uses, as small ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, StrEnum
from types import SimpleNamespace
from typing import Any

_paths: dict[Any, str] = {}


class AttentionBackendEnum(Enum):
    CPU_ATTN = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"

    def get_path(self) -> str:
        return _paths.get(self, self.value)


def register_backend(backend: AttentionBackendEnum, class_path: str) -> None:
    _paths[backend] = class_path


class AttentionType(StrEnum):
    DECODER = "decoder"
    ENCODER_ONLY = "encoder_only"


class Attention:
    impl: Any


def get_current_vllm_config() -> Any:
    raise AssertionError("Current vLLM config is not set")


def get_layers_from_vllm_config(
    config: Any, kind: type, names: Iterable[str] | None = None
) -> dict[str, Any]:
    layers = config.compilation_config.static_forward_context
    return {name: layers[name] for name in names or layers if isinstance(layers[name], kind)}


@dataclass
class CPUAttentionMetadata:
    num_actual_tokens: int
    max_query_len: int
    query_start_loc: Any
    max_seq_len: int
    seq_lens: Any
    block_table: Any
    slot_mapping: Any
    scheduler_metadata: Any
    causal: bool = True
    dynamic_causal: Any = None


class CPUAttentionBackend:
    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"


class CPUAttentionMetadataBuilder:
    def __init__(self, spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        self.layer_names = layer_names

    def build(self, common_prefix_len: int, common: Any, fast_build: bool = False) -> Any:
        return SimpleNamespace(scheduler_metadata="of vLLM")


class CPUAttentionBackendImpl:
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: Any,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Any = None,
    ) -> None:
        self.scale, self.alibi_slopes, self.sinks = scale, alibi_slopes, sinks
        self.sliding_window = -1 if sliding_window is None else sliding_window
        self.kv_cache_dtype, self.attn_type = kv_cache_dtype, attn_type
        self.logits_soft_cap = logits_soft_cap or 0
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name

    def forward(self, *args: Any, **settings: Any) -> Any:
        return "attended by vLLM"

    def do_kv_cache_update(self, *args: Any) -> None:
        raise NotImplementedError("written by vLLM")


MODULES: dict[str, tuple[Any, ...]] = {
    "vllm.config": (get_current_vllm_config, get_layers_from_vllm_config),
    "vllm.model_executor.layers.attention": (Attention,),
    "vllm.v1.attention.backend": (AttentionType,),
    "vllm.v1.attention.backends.cpu_attn": (
        CPUAttentionBackend,
        CPUAttentionBackendImpl,
        CPUAttentionMetadata,
        CPUAttentionMetadataBuilder,
    ),
    "vllm.v1.attention.backends.registry": (AttentionBackendEnum, register_backend),
}
