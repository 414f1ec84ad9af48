"""Size an engine's pool, and measure the costs of preemption."""

from __future__ import annotations

import math
import time
from statistics import median
from typing import NamedTuple

import numpy as np

from kvpager._text import counted
from kvpager._text import size as as_text
from kvpager.blocks.windows import blocks_for
from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.cache.budget import Budget
from kvpager.integrations.huggingface.runner.model_info import ModelInfo
from kvpager.integrations.huggingface.runner.model_runner import ModelRunner
from kvpager.integrations.huggingface.runner.warm_up import step_of_rows
from kvpager.plans import CopyPlan
from kvpager.scheduling.preemption import PreemptionCosts
from kvpager.scheduling.request import Request, blocks_needed
from kvpager.scheduling.scheduler import Scheduler
from kvpager.storage.block_storage import BlockStorage
from kvpager.storage.free_memory import free_bytes

# The part of the free memory that an engine takes by default. A host has other uses for its memory.
_OF_DEVICE, _OF_HOST = 0.9, 0.5
_TRIALS, _TRIAL_TOKENS = 5, 128


class PoolSizes(NamedTuple):
    """The number of blocks in each tier."""

    device: int
    host: int


def pool_blocks(
    info: ModelInfo,
    budget: Budget,
    max_num_seqs: int,
    max_model_len: int | None,
    max_chunk: int | None = None,
) -> PoolSizes:
    """Return the number of blocks in each tier. O(1).

    The bounds of `budget` give the numbers. Without a bound, the pool has room for `max_num_seqs`
    rows of `max_model_len` tokens, within 90 % of a GPU's free memory or 50 % of the host's.

    Raises: `ValueError` if a bound is less than one block, `KVPagerError` if the device has no room
    for one.
    """
    size = budget.block_bytes(info.shapes, info.dtype, info.device)
    # Less than a block for each group of layers holds no token.
    least = len(info.windows)
    budget.refuse_below(least * size, on_device=True)
    if budget.bound is not None:
        device = budget.bound // size
    else:
        part = _OF_DEVICE if info.device.type == "cuda" else _OF_HOST
        device = int(free_bytes(info.device) * part) // size
        if max_model_len is not None:
            longest = blocks_for(max_model_len, budget.block_size, info.windows, max_chunk)
            device = min(device, max_num_seqs * longest)
    if budget.mode == "reserved":
        device = _whole_regions(device, budget, size, max_model_len, max_num_seqs)
    host = 0 if budget.host is None or budget.host.bound is None else budget.host.bound // size
    if device < least:
        raise KVPagerError(
            f"{info.device} has no room for one block of {counted(budget.block_size, 'token')} "
            f"({as_text(least * size)}). Free memory there, or use a smaller block_size."
        )
    return PoolSizes(device, host)


def _whole_regions(
    num_blocks: int, budget: Budget, size: int, max_model_len: int | None, max_num_seqs: int
) -> int:
    """Return the blocks of the regions that fit into `num_blocks`. Raises: `ValueError`."""
    if max_model_len is None:
        raise ValueError(
            'mode="reserved": the model has no longest sequence. Set max_model_len to reserve '
            "regions of this length."
        )
    region = -(-max_model_len // budget.block_size)
    if num_blocks < region:
        raise ValueError(
            f"{budget.bound_as_given()}: a region of max_model_len={max_model_len} tokens takes "
            f"{as_text(region * size)}. Raise memory to {as_text(region * size, round_up=True)} or "
            "lower max_model_len."
        )
    return min(num_blocks // region, max_num_seqs) * region


def require_room(
    request: Request, scheduler: Scheduler, storage: BlockStorage, budget: Budget
) -> None:
    """Refuse a request that the pool could not hold alone. O(groups). Raises: `ValueError`."""
    num_prompt, max_model_len = len(request.prompt), scheduler.max_model_len
    if max_model_len is not None and num_prompt + request.max_new_tokens > max_model_len:
        return  # the scheduler refuses it
    need = blocks_needed(request, num_prompt, scheduler.manager)
    if need <= storage.num_blocks:
        return
    bound = "the engine's pool, a part of the free memory,"
    if budget.bound is not None:
        bound = budget.bound_as_given()
    num_bytes = need * storage.block_bytes
    samples = "" if request.n == 1 else f" in {request.n} samples"
    raise ValueError(
        f"request {request.request_id!r}: a prompt of {num_prompt} and "
        f"{request.max_new_tokens} new tokens{samples} may need {counted(need, 'block')} of KV "
        f"cache ({as_text(num_bytes)}), "
        f"{bound} allows {storage.num_blocks}. Raise memory to "
        f"{as_text(num_bytes, round_up=True)} or lower max_new_tokens."
    )


def measured_costs(runner: ModelRunner) -> PreemptionCosts:
    """Measure the time to compute a token and to move a block: medians of a few runs.

    Overwrites the first blocks of both tiers. Call it before the first request. Without host
    blocks, moving one takes infinitely long.
    """
    storage, longest = runner.storage, runner.info.max_length or _TRIAL_TOKENS
    tokens = min(_TRIAL_TOKENS, longest, storage.num_blocks * storage.block_size)
    plan = step_of_rows(runner, [(0, tokens)])
    num_blocks = min(8, storage.num_blocks, storage.num_host_blocks)
    pairs = np.stack([np.arange(num_blocks, dtype=np.int32)] * 2, axis=1)
    compute, move = [], []
    for _ in range(_TRIALS):
        began = time.perf_counter()
        runner.run(plan, {0: [0] * tokens})
        computed = time.perf_counter()
        storage.apply(CopyPlan(pairs, "device", "host"))
        compute.append(computed - began)
        move.append(time.perf_counter() - computed)
    runner.forget(np.zeros(1, np.int32))
    return PreemptionCosts(
        seconds_per_token=median(compute) / tokens,
        seconds_per_block=median(move) / num_blocks if num_blocks else math.inf,
    )
