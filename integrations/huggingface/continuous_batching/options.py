"""What the settings of transformers' continuous batching mean for an engine."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any, NamedTuple

from kvpager.blocks.groups.windows import blocks_for
from kvpager.integrations.huggingface.cache.memory import PagedMemory
from kvpager.integrations.huggingface.runner.model_info import ModelInfo
from kvpager.integrations.huggingface.runner.sizing import pool_blocks
from kvpager.storage.block_storage import BlockStorage
from kvpager.storage.free_memory import free_bytes, host_bytes

logger = logging.getLogger("kvpager")

_MAX_NUM_SEQS = 256

# Read below, or what is done in any case: no processor is dropped.
_MAPPED = {
    "allow_block_sharing",
    "block_size",
    "cpu_offload_space",
    "cpu_offload_space_safety_threshold",
    "decode_compile_config",
    "default_compile_level",
    "drop_unsupported_processors",
    "max_batch_tokens",
    "max_memory_percent",
    "max_queue_size",
    "max_requests_per_batch",
    "num_blocks",
    "page_size",
    "per_request_processors",
    "return_logprobs",
    "scheduler_type",
    "seed",
    "use_default_compile_configs",
    "varlen_compile_config",
}

# Without a meaning here: what is done instead, and the values that ask for just that.
_DONE_INSTEAD: dict[str, tuple[str, tuple[Any, ...]]] = {
    "auto_switch_to_flash": ("kvpager's own attention reads the blocks", ()),
    "cpu_group_timeout": ("one process computes", ()),
    "disable_nccl_graph_mixing": ("one process computes", ()),
    "kv_padding_interval_size": ("steps are not padded", ()),
    "max_blocks_per_request": ("block tables are as long as they need to be", ()),
    "max_cached_graphs": ("no CUDA graphs are captured", ()),
    "q_padding_interval_size": ("steps are not padded", ()),
    "safety_margin": ("a hundredth of the blocks is kept for requests that run", ()),
    "use_async_batching": ("a step is planned when the one before is done", (False,)),
    "use_cuda_graph": ("no CUDA graphs are captured", (False, (False, False), [False, False])),
}


class Options(NamedTuple):
    """What a manager makes of a `ContinuousBatchingConfig`."""

    engine: dict[str, Any]  # arguments of `Engine`
    max_queue_size: int | None
    with_logprobs: bool
    per_request: bool  # requests may have logits processors of their own
    seed: int | None


@functools.lru_cache(maxsize=256)  # values are the caller's, of any number
def warn_once(option: str, instead: str) -> None:
    """Say what is done instead of what `option` asks for. O(1)."""
    logger.warning("continuous batching: kvpager does not take %s: %s", option, instead)


def read_options(
    config: Any, generation_config: Any, info: ModelInfo, patched: PagedMemory, hints: Any
) -> Options:
    """`config` as options, those of the patch where it says nothing. O(options).

    Warns once of each option that asks for what cannot be done. Raises: `ValueError`.
    """
    _warn_of_others(config)
    page_size, is_said = _page_size(config)
    block_size = page_size if is_said else patched.block_size
    max_num_seqs = config.max_requests_per_batch or _MAX_NUM_SEQS
    engine = {
        "block_size": block_size,
        "kv_cache_dtype": patched.kv_cache_dtype,
        "eviction": patched.eviction,
        "memory": _memory(config, info, patched, block_size, max_num_seqs, hints),
        "host_memory": _host_memory(config, patched),
        "max_num_seqs": max_num_seqs,
        "prefix_cache": config.allow_block_sharing,
        "compile": _compiles(config, generation_config),
    }
    if config.max_batch_tokens is not None:
        engine["max_batch_tokens"] = config.max_batch_tokens
    if config.scheduler_type != "fifo":
        warn_once(f"scheduler_type={config.scheduler_type!r}", "first come, first served")
    if not patched.in_place:
        warn_once("the patch's in_place=False", "blocks are read in place where they can be")
    return Options(
        engine,
        config.max_queue_size or None,
        config.return_logprobs,
        config.per_request_processors,
        config.seed,
    )


def _page_size(config: Any) -> tuple[int, bool]:
    """Tokens of a page, and whether somebody said how many."""
    # Blocks of transformers 5.17 are called pages since.
    name = "page_size" if hasattr(config, "page_size") else "block_size"
    size: int = getattr(config, name)
    return size, size != _default(config, name)


def _default(config: Any, name: str) -> Any:
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    return fields.get(name, dataclasses.MISSING)


def _warn_of_others(config: Any) -> None:
    for name, value in vars(config).items():
        if name in _MAPPED or value == _default(config, name):
            continue
        instead, same = _DONE_INSTEAD.get(name, ("it is not known", ()))
        if value not in same:
            warn_once(f"{name}={value!r}", instead)


def _memory(
    config: Any,
    info: ModelInfo,
    patched: PagedMemory,
    block_size: int,
    max_num_seqs: int,
    hints: Any,
) -> int | None:
    """Bytes of the pool: as many as were asked for, at most what the requests announced need."""
    size = BlockStorage.bytes_of_a_block(
        block_size,
        info.shapes,
        dtype=info.dtype,
        kv_cache_dtype=patched.kv_cache_dtype,
    )
    if config.num_blocks is not None:  # of so many tokens as theirs have
        num_tokens: int = config.num_blocks * _page_size(config)[0]
        return -(-num_tokens // block_size) * len(info.windows) * size
    share = config.max_memory_percent
    if share is not None:
        if not 0 < share <= 1:
            raise ValueError(f"max_memory_percent {share}: expected a share, above 0 and up to 1")
        return int(free_bytes(info.device) * share)
    announced = _announced_blocks(hints, info, block_size, max_num_seqs)
    if announced is None:
        return patched.bound
    plain = PagedMemory(patched.bound, block_size, kv_cache_dtype=patched.kv_cache_dtype)
    return min(announced, pool_blocks(info, plain, max_num_seqs, info.max_length).device) * size


def _announced_blocks(
    hints: Any, info: ModelInfo, block_size: int, max_num_seqs: int
) -> int | None:
    if hints is None or not hints.max_generated_length or not hints.num_requests:
        return None
    if info.is_encoder_decoder:
        longest = 1 + hints.max_generated_length
    else:
        longest = hints.max_prompt_length + hints.max_generated_length
    if info.max_length is not None:
        longest = min(longest, info.max_length)
    # And some to spare, which are kept for those that run.
    each = blocks_for(longest, block_size, info.windows, None)
    blocks: int = each * min(hints.num_requests, max_num_seqs)
    return blocks + blocks // 32 + 1


def _host_memory(config: Any, patched: PagedMemory) -> int | None:
    most: int = int(host_bytes() * config.cpu_offload_space_safety_threshold)
    space: float | None = config.cpu_offload_space
    if space is None:
        return most or None
    if space > 0:
        return min(int(space * 2**30), most) or None
    return None if patched.host is None else patched.host.bound


def _compiles(config: Any, generation_config: Any) -> bool:
    said = {
        "varlen_compile_config": config.varlen_compile_config,
        "decode_compile_config": config.decode_compile_config,
        "compile_config": getattr(generation_config, "compile_config", None),
    }
    for name, value in said.items():
        if value is not None:
            warn_once(name, "torch.compile's default mode, with dynamic shapes, is taken")
    return config.default_compile_level > 0 or any(v is not None for v in said.values())
