"""Make the parts of an engine from its configuration and its model."""

from __future__ import annotations

from typing import Any

import torch

from kvpager import _validate as arguments
from kvpager.blocks.groups.manager import GroupedManager
from kvpager.blocks.manager import BlockManager
from kvpager.blocks.policies import chosen_policy
from kvpager.blocks.protocol import CacheManager
from kvpager.engine.config import EngineConfig
from kvpager.engine.recording import Record
from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.cache.budget import Budget
from kvpager.integrations.huggingface.runner.model_info import ModelInfo
from kvpager.integrations.huggingface.runner.model_runner import ModelRunner
from kvpager.integrations.huggingface.runner.sequence_rows import SequenceRows
from kvpager.integrations.huggingface.runner.sizing import PoolSizes, measured_costs
from kvpager.modes.reserved_manager import ReservedManager
from kvpager.scheduling.preemption import PreemptionCosts
from kvpager.scheduling.scheduler import Scheduler
from kvpager.storage.block_storage import BlockStorage


def max_length_of(info: ModelInfo, config: EngineConfig) -> int | None:
    """Return the most tokens of a sequence. Raises: `ValueError` for more than the model allows."""
    if config.max_model_len is None:
        return info.max_length
    most = info.max_length or 2**31 - 1
    return arguments.count("max_model_len", config.max_model_len, at_least=1, at_most=most)


def make_runner(
    model: Any,
    info: ModelInfo,
    config: EngineConfig,
    storage: BlockStorage,
    budget: Budget,
    is_packed: bool,
    max_model_len: int | None,
) -> ModelRunner:
    """Make the runner of the model, compiled if the configuration asks for it. O(layers)."""
    return ModelRunner(
        model,
        info,
        storage,
        budget,
        is_packed=is_packed,
        forward=_compiled_forward(model, config, is_packed),
        sequences=_sequence_rows(info, config, storage, max_model_len),
    )


def _compiled_forward(model: Any, config: EngineConfig, is_packed: bool) -> Any:
    """Return the compiled forward pass; None without `compile`."""
    if not config.compile:
        return None
    if not is_packed:
        raise KVPagerError(
            f"compile={config.compile!r}: {type(model).__name__} computes a forward pass per "
            "sequence, which is not compiled. Leave compile out."
        )
    return torch.compile(model, **{"dynamic": True} | config.compile_arguments)


def _sequence_rows(
    info: ModelInfo, config: EngineConfig, storage: BlockStorage, max_model_len: int | None
) -> list[SequenceRows]:
    """Return the rows of each group of layers; none in mode "paged". O(groups)."""
    if config.mode == "paged":
        return []
    most = storage.num_blocks * storage.block_size
    length = most if max_model_len is None else min(max_model_len, most)
    num_rows = config.max_num_seqs
    if config.mode == "reserved":
        num_rows = storage.num_blocks // -(-length // storage.block_size)
    return [SequenceRows(storage, num_rows, length) for _ in info.windows]


def costs_of(config: EngineConfig, sizes: PoolSizes, runner: ModelRunner) -> PreemptionCosts | None:
    """Return the costs to choose by, measured unless given; None if there is no choice."""
    if config.costs is None and (sizes.host or config.tiers):
        return measured_costs(runner)
    return config.costs


def make_scheduler(
    info: ModelInfo,
    config: EngineConfig,
    sizes: PoolSizes,
    max_model_len: int | None,
    max_chunk: int | None,
    costs: PreemptionCosts | None,
) -> Scheduler:
    """Make the scheduler and the block manager."""
    return Scheduler(
        make_manager(info, config, sizes, max_model_len, max_chunk),
        max_batch_tokens=config.max_batch_tokens,
        max_num_seqs=config.max_num_seqs,
        max_queue_size=config.max_queue_size,
        policy=config.policy,
        prefix_cache=config.prefix_cache and not info.has_state and not info.is_encoder_decoder,
        max_model_len=max_model_len,
        chunked=max_chunk is not None,
        costs=costs,
    )


def make_manager(
    info: ModelInfo,
    config: EngineConfig,
    sizes: PoolSizes,
    max_model_len: int | None,
    max_chunk: int | None,
) -> CacheManager:
    """Make the manager of the pool's blocks, a grouped one if layers have windows. O(blocks)."""
    if config.mode == "reserved":
        assert max_model_len is not None  # as `pool_blocks` made sure
        num_rows = sizes.device // -(-max_model_len // config.block_size)
        return ReservedManager(num_rows, max_model_len, config.block_size)
    events = config.published_events
    settings: dict[str, Any] = {
        "eviction": chosen_policy(config.eviction, sizes.device),
        "num_events": 0 if events is None else events.num_events,
    }
    counts = sizes.device, config.block_size, sizes.host
    if not any(info.windows):
        return BlockManager(*counts, **settings)
    return GroupedManager(info.windows, *counts, max_chunk=max_chunk, **settings)


def record_of(config: EngineConfig, model: Any, max_tokens: int | None) -> Record | None:
    """Return what to record, and where; None for nothing. O(1)."""
    if config.record is None:
        return None
    eviction = config.eviction if isinstance(config.eviction, str) else None
    name = type(model).__name__
    return Record(config.record, max_tokens, config.policy, eviction, name, config.mode)
