"""Open the stores of a patch: name its model, and make the pool of its prompts beforehand."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin

from kvpager.engine.config import EngineConfig
from kvpager.integrations.huggingface.cache.budget import LayerKind
from kvpager.integrations.huggingface.cache.host_share import HostShare
from kvpager.integrations.huggingface.cache.memory import PagedMemory
from kvpager.integrations.huggingface.cache.pools import pool_for
from kvpager.integrations.huggingface.model_state.row_independence import row_dependence
from kvpager.integrations.huggingface.prefix.obstacles import model_obstacle
from kvpager.integrations.huggingface.prefix.prompt_cache import PromptCache
from kvpager.integrations.huggingface.prefix.prompt_tiers import NamedModel, PromptTiers
from kvpager.integrations.huggingface.runner.model_info import (
    ModelInfo,
    inspect_model,
    plain_cache,
)
from kvpager.integrations.huggingface.runner.tiers import (
    buffer_for,
    layout_of,
    no_tiers,
    refuse_tiers,
    tiering_of,
)
from kvpager.integrations.huggingface.runner.wrappers import unwrapped
from kvpager.scheduling.preemption import PreemptionCosts
from kvpager.storage.block_storage import BlockStorage
from kvpager.storage.staging import Staging

_TRIALS, _TRIAL_TOKENS = 3, 256


def open_prompt_tiers(
    patched: nn.Module, memory: PagedMemory, prompts: PromptCache, config: EngineConfig
) -> PromptTiers:
    """Open the stores below the pool of a model's prompts. O(bytes of the weights).

    Of `config`, the settings of tiers count. Runs a few short forward passes. Raises:
    `KVPagerError` for a model that can have no tiers, or has no name; otherwise as `unwrapped`,
    `PagedPool.storage` and `open_stores`.
    """
    model = unwrapped(patched)
    _refuse(patched, model)
    info = inspect_model(model)
    refuse_tiers(model, info)
    if any(layer.window is not None for layer in info.layers):
        raise no_tiers(model, "it has sliding windows, and a patch keeps no prompts of such models")
    shapes = [layer.shape for layer in info.layers]
    if info.others or len(set(shapes)) > 1:
        raise no_tiers(model, "some of its layers have blocks or columns of their own")
    kind = LayerKind(shapes[0], info.dtype, info.device)
    layout = len(shapes), None, kind  # as `LayerGroup.bind` makes it
    named = NamedModel(prompts.prepare(model, layout, [kind] * len(shapes)))
    if named.state.doubt is not None:
        raise no_tiers(model, f"its prompts are not kept, because {named.state.doubt}")
    costs = _measured(model, info) if config.costs is None else config.costs
    pool = pool_for(memory, layout)
    storage = pool.storage(kind, 0, len(shapes)).storage
    with torch.inference_mode(False):  # made in it, staging could never be written outside of it
        staging, share = _staging(memory, storage, info)
        tiering = tiering_of(
            model, info, config, costs, storage, pool.manager, staging, named.adapter
        )
    if memory.host is not None:
        memory.host.share = share
    return PromptTiers(pool, tiering, named)


def _staging(
    memory: PagedMemory, storage: BlockStorage, info: ModelInfo
) -> tuple[Staging, HostShare | None]:
    """Return staging in what rows leave of host memory; without host memory, a buffer."""
    if memory.host is None:
        bound = memory.budget.bound
        num_blocks = None if bound is None else max(bound // storage.block_bytes, 1)
        return buffer_for(storage, num_blocks), None
    share = HostShare(storage, layout_of(storage, info), memory.host.room)
    share.fit(memory.host.room)
    return share.staging, share


def _refuse(patched: nn.Module, model: Any) -> None:
    """Raise `KVPagerError` for a model whose prompts `prefix_cache` does not keep."""
    if sum(isinstance(module, GenerationMixin) for module in patched.modules()) > 1:
        raise no_tiers(model, "it holds another model that can generate")
    if model.training:
        raise no_tiers(model, "it is in training mode, so that it needs model.eval() first")
    if not model.config.is_encoder_decoder:
        reason = model_obstacle(model) or row_dependence(model)
        if reason is not None:
            raise no_tiers(model, f"it is {reason}, whose prompts are not kept")


@torch.inference_mode()
def _measured(model: Any, info: ModelInfo) -> PreemptionCosts:
    """Measure the time to compute a prompt's token: the median of a few passes."""
    tokens = min(_TRIAL_TOKENS, info.max_length or _TRIAL_TOKENS)
    ids, seconds = torch.zeros(1, tokens, dtype=torch.long, device=info.device), []
    for _ in range(_TRIALS):
        cache, began = {info.cache_name: plain_cache(model)}, time.perf_counter()
        model(input_ids=ids, use_cache=True, **cache).logits[0, -1, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return PreemptionCosts(seconds_per_token=median(seconds) / tokens)
