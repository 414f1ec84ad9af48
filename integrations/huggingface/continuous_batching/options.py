"""Translate settings of transformers' continuous batching for an engine."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from kvpager.blocks.stats import Stats
from kvpager.blocks.windows import blocks_for
from kvpager.integrations.huggingface.cache.budget import Budget
from kvpager.integrations.huggingface.cache.memory import PagedMemory
from kvpager.integrations.huggingface.runner.model_info import ModelInfo
from kvpager.integrations.huggingface.runner.sampling import SamplingSettings
from kvpager.integrations.huggingface.runner.sizing import pool_blocks
from kvpager.storage.free_memory import free_bytes, host_bytes

logger = logging.getLogger("kvpager")

_MAX_NUM_SEQS = 256

# Settings that are read, and one that always holds: no processor is dropped.
_MAPPED = {
    "allow_block_sharing", "block_size", "cpu_offload_space", "cpu_offload_space_safety_threshold",
    "decode_compile_config", "default_compile_level", "drop_unsupported_processors",
    "max_batch_tokens", "max_memory_percent", "max_queue_size", "max_requests_per_batch",
    "num_blocks", "page_size", "per_request_processors", "return_logprobs", "scheduler_type",
    "seed", "use_default_compile_configs", "varlen_compile_config",
}  # fmt: skip

# Arguments of logits processors that are not settings; transformers ignores them, too.
_PASSED_OVER = {"filter_value", "min_tokens_to_keep"}

# Settings without effect: the behaviour instead, and the values that agree with it.
_DONE_INSTEAD: dict[str, tuple[str, tuple[Any, ...]]] = {
    "auto_switch_to_flash": ("kvpager's own attention reads the blocks", ()),
    "cpu_group_timeout": ("one process computes", ()),
    "disable_nccl_graph_mixing": ("one process computes", ()),
    "kv_padding_interval_size": ("steps are not padded", ()),
    "max_blocks_per_request": ("block tables have any length", ()),
    "max_cached_graphs": ("no CUDA graphs are captured", ()),
    "q_padding_interval_size": ("steps are not padded", ()),
    "safety_margin": ("1 % of the blocks is reserved for running requests", ()),
    "use_async_batching": ("a step is planned after the previous step", (False,)),
    "use_cuda_graph": ("no CUDA graphs are captured", (False, (False, False), [False, False])),
}


@functools.lru_cache(maxsize=256)  # bounded: users may pass any number of values
def warn_once(option: str, instead: str) -> None:
    """Log that `option` has no effect, and the behaviour instead. O(1)."""
    logger.warning("continuous batching: kvpager ignores %s: %s", option, instead)


def engine_options(
    config: Any, generation_config: Any, info: ModelInfo, patched: PagedMemory, hints: Any
) -> dict[str, Any]:
    """Return the arguments of `Engine` for a `ContinuousBatchingConfig`. O(options).

    Options of the patch fill the gaps of `config`. `hints` are the expected requests, or None.
    Warns once of each option without effect. Raises: `ValueError`.
    """
    _warn_of_others(config)
    page_size, is_explicit = _page_size(config)
    budget = patched.budget
    block_size = page_size if is_explicit else budget.block_size
    max_num_seqs = config.max_requests_per_batch or _MAX_NUM_SEQS
    engine = {
        "block_size": block_size,
        "kv_cache_dtype": budget.kv_cache_dtype,
        "eviction": patched.eviction,
        "memory": _memory(config, info, budget, block_size, max_num_seqs, hints),
        "host_memory": _host_memory(config, budget),
        "max_num_seqs": max_num_seqs,
        "max_queue_size": config.max_queue_size or None,
        "prefix_cache": config.allow_block_sharing,
        "compile": _compiles(config, generation_config),
    }
    if config.max_batch_tokens is not None:
        engine["max_batch_tokens"] = config.max_batch_tokens
    if config.scheduler_type != "fifo":
        warn_once(f"scheduler_type={config.scheduler_type!r}", "first come, first served")
    if not budget.in_place:
        warn_once("the patch's in_place=False", "blocks are read in place if the model allows it")
    return engine


def _page_size(config: Any) -> tuple[int, bool]:
    """Return the tokens of a page, and True if the user set them."""
    # Since transformers 5.18, the setting is called page_size.
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
        instead, same = _DONE_INSTEAD.get(name, ("the setting is unknown", ()))
        if value not in same:
            warn_once(f"{name}={value!r}", instead)


def _memory(
    config: Any, info: ModelInfo, budget: Budget, block_size: int, max_num_seqs: int, hints: Any
) -> int | None:
    """Return the bytes of the pool: the requested number, or the need of the hinted requests."""
    plain = Budget(budget.bound, block_size, kv_cache_dtype=budget.kv_cache_dtype)
    size = plain.block_bytes(info.shapes, info.dtype)
    if config.num_blocks is not None:  # each of page_size tokens
        num_tokens: int = config.num_blocks * _page_size(config)[0]
        return -(-num_tokens // block_size) * len(info.windows) * size
    share = config.max_memory_percent
    if share is not None:
        if not 0 < share <= 1:
            raise ValueError(f"max_memory_percent={share}: expected more than 0, at most 1")
        return int(free_bytes(info.device) * share)
    announced = _announced_blocks(hints, info, block_size, max_num_seqs)
    if announced is None:
        return budget.bound
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
    # 3 % more, which are reserved for running requests.
    each = blocks_for(longest, block_size, info.windows, None)
    blocks: int = each * min(hints.num_requests, max_num_seqs)
    return blocks + blocks // 32 + 1


def _host_memory(config: Any, budget: Budget) -> int | None:
    most: int = int(host_bytes() * config.cpu_offload_space_safety_threshold)
    space: float | None = config.cpu_offload_space
    if space is None:
        return most or None
    if space > 0:
        return min(int(space * 2**30), most) or None
    return None if budget.host is None else budget.host.bound


def _compiles(config: Any, generation_config: Any) -> bool:
    configs = {
        "varlen_compile_config": config.varlen_compile_config,
        "decode_compile_config": config.decode_compile_config,
        "compile_config": getattr(generation_config, "compile_config", None),
    }
    for name, value in configs.items():
        if value is not None:
            warn_once(name, "torch.compile runs in its default mode with dynamic shapes")
    return config.default_compile_level > 0 or any(v is not None for v in configs.values())


class RequestOverrides(NamedTuple):
    """The settings that a request overrides."""

    max_new_tokens: int | None
    eos: int | list[int] | None
    settings: dict[str, Any]  # of logits processors


class SettingsFactory:
    """A maker of sampling settings from one config. Settings that the config leaves open are off.

    `per_request` lets requests override settings.
    Raises: `ValueError` for settings that cannot be batched.
    """

    def __init__(self, model: Any, config: Any, info: ModelInfo, *, per_request: bool) -> None:
        self._model, self._config, self._info = model, config, info
        self._per_request = per_request
        self.num_samples: int = config.num_return_sequences or 1
        self._known = functools.lru_cache(maxsize=256)(self._make)
        self._known(1, (), ())  # raises

    def settings_for(
        self, wanted: RequestOverrides, num_prompt: int, pool: Callable[[], Stats]
    ) -> SamplingSettings:
        """Return the settings of a request whose prompt has `num_prompt` tokens. O(1) if known.

        `pool` returns the size of the pool.
        Raises: `ValueError`, `TypeError` for invalid settings.
        """
        settings = {k: v for k, v in wanted.settings.items() if k not in _PASSED_OVER}
        for name in wanted.settings.keys() & _PASSED_OVER:
            warn_once(f"a request's {name}", "it is ignored, as in transformers")
        if settings and not self._per_request:
            raise ValueError(
                f"{', '.join(sorted(settings))}: requests may not override settings. "
                "Set per_request_processors=True in the ContinuousBatchingConfig."
            )
        limit = self._limit(wanted, num_prompt, pool)
        eos = self._config.eos_token_id if wanted.eos is None else wanted.eos
        ends = [eos] if isinstance(eos, int) else list(eos or ())
        return self._known(
            limit,
            tuple(token for token in ends if token >= 0),  # -1 is how transformers says none
            tuple(sorted(settings.items())),
        )

    def _limit(self, wanted: RequestOverrides, num_prompt: int, pool: Callable[[], Stats]) -> int:
        """Return the most new tokens: the requested number within the model's positions."""
        begins = 1 if self._info.is_encoder_decoder else num_prompt
        longest, asked = self._info.max_length, wanted.max_new_tokens
        if asked is None:
            asked = self._config.max_new_tokens
        if asked is None and self._config.max_length is not None:
            asked = self._config.max_length - begins
        room = None if longest is None else longest - begins
        if asked is None:
            fits = self._fits(begins, pool())
            return fits if room is None else max(min(room, fits), 1)
        if room is not None and 0 < room < asked:
            warn_once("max_new_tokens", f"a sequence ends at the model's {longest} positions")
            return room
        return asked

    def _fits(self, begins: int, pool: Stats) -> int:
        """Return how many new tokens fit if the request has the whole pool."""
        shared = begins // pool.block_size
        blocks = shared + (pool.num_blocks - shared) // self.num_samples
        return max(blocks * pool.block_size - begins, 1)

    def _make(
        self, max_new_tokens: int, eos: tuple[int, ...], settings: tuple[tuple[str, Any], ...]
    ) -> SamplingSettings:
        own = self._model.generation_config
        special = ("bos_token_id", "pad_token_id", "decoder_start_token_id")
        missing = [name for name in special if getattr(self._config, name) is None]
        options = {name: getattr(own, name) for name in missing} | dict(settings)
        return SamplingSettings(
            self._model,
            self._config,
            is_complete=True,
            max_new_tokens=max_new_tokens,
            max_length=None,
            eos_token_id=list(eos) or None,
            **options,
        )
