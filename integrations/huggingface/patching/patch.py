"""`patch` makes transformers models use a paged KV cache; `unpatch` restores them.

Details of the arguments of `patch`:

- `memory`: without it, pools grow as needed and are freed with the last cache. While a pool grows,
  its old and new storage exist together; `memory` counts only one of them. A call of `generate`
  waits until the pools have room for its rows at their maximum length. If no call on another thread
  computes a step for 60 seconds, it raises `OutOfBlocks`.
- `kv_cache_dtype`: stores one scale per token and head, and takes about half the memory of
  bfloat16. Rounding moves the attention output by about 1 % of its norm in int8 and 4 % in fp8, so
  tokens may differ.
- `host_memory`: rows that move there continue there, with the same tokens, but slower. The pool of
  each layer shape may then exceed `memory` by one block. With `tiers`, cached blocks use what rows
  leave: the first tier.
- `prefix_cache`: keeps the blocks of prompts, and of replies by greedy search and sampling. A
  prompt that begins like an earlier one, or repeats a conversation, computes only its new tokens.
  It works for causal text models without sliding windows. It takes memory until
  `Patch.clear_prefix_cache()` or `Patch.undo()`. Without `memory`, prompts are kept while a larger
  pool fits in half of the free memory. A model whose weights, hooks, functions or settings changed
  reuses nothing. Call `clear_prefix_cache()` after changes that cannot be noticed, such as writing
  single elements through `.data`.
- `tiers`: stores that keep prompts beyond this process: URLs such as
  `"disk:/var/cache/kv?capacity=200GiB"`, or stores, which `Patch.undo()` closes. Before a prompt is
  looked up, the blocks that are not cached are fetched from them. `docs/guides/tiers.md` describes
  it. `costs` bounds the time of a fetch.
- A second patch of a model raises `KVPagerError`, and so do `tiers` for a model that can have none.
- `eviction`: a name in `kvpager.blocks.policies.POLICIES`, or a function that returns an
  `EvictionPolicy` for a number of blocks. Every pool gets its own policy. Without `prefix_cache`,
  only the pools of continuous batching cache prompts, so it ranks theirs alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from kvpager import _validate as arguments
from kvpager.blocks.policies import Eviction
from kvpager.engine.config import EngineConfig
from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.cache.budget import Budget
from kvpager.integrations.huggingface.cache.memory import PagedMemory
from kvpager.integrations.huggingface.cache.paged_cache import least_block_bytes
from kvpager.integrations.huggingface.cache.recording import PoolRecorder
from kvpager.integrations.huggingface.patching.handle import Patch, active, lock, uninterrupted
from kvpager.integrations.huggingface.patching.prompt_stores import open_prompt_tiers
from kvpager.integrations.huggingface.patching.replacements import install
from kvpager.integrations.huggingface.prefix.prompt_cache import PromptCache
from kvpager.integrations.huggingface.releases import warn_if_untested
from kvpager.integrations.huggingface.runner.wrappers import no_model
from kvpager.modes import ModeName
from kvpager.recording.recorder import Described
from kvpager.scheduling.preemption import PreemptionCosts
from kvpager.storage.layout import KVCacheDtype
from kvpager.storage.tiers.protocol import BlockStore
from kvpager.storage.tiers.seals import Seal


def patch(
    model: nn.Module | None = None,
    *,
    memory: int | str | None = None,
    block_size: int = 16,
    dtype: torch.dtype | str | None = None,
    kv_cache_dtype: KVCacheDtype | None = None,
    host_memory: int | str | None = None,
    prefix_cache: bool = False,
    namespace: str | None = None,
    in_place: bool = True,
    eviction: Eviction = "lru",
    tiers: str | BlockStore | Sequence[str | BlockStore] = (),
    seal: Seal | None = None,
    model_id: str | None = None,
    costs: PreemptionCosts | None = None,
    mode: ModeName = "paged",
    cross_stack: bool = False,
    record: str | os.PathLike[str] | None = None,
) -> Patch:
    """Keep KV caches in shared blocks. Leaving `with`, or `undo()`, restores transformers exactly.

        with kvpager.patch(model): model.generate(...)  # the same tokens, in less memory

    Args:
        model: the model to patch; None patches every model in the process.
        memory: the most bytes of all pools, such as `"4GiB"`; None lets pools grow as needed.
        block_size: token slots of a block, a power of two.
        dtype: the dtype that keys and values must have; None for the model's own.
        kv_cache_dtype: `"int8"` or `"fp8_e4m3"` keeps keys and values in eight bits, rounded.
        host_memory: bytes for rows without room on the device, and with `tiers` for cached blocks.
        prefix_cache: keep prompts and replies for later calls, until `clear_prefix_cache()`.
        namespace: with `prefix_cache`, only prompts of the same namespace share blocks.
        in_place: let `sdpa` and flash attention read blocks in place; False gathers them.
        eviction: which cached blocks leave first: a policy's name, such as `"lru"`, or a function.
        tiers: with `prefix_cache` and a model, URLs of stores, or stores, that keep prompts.
        seal: what protects blocks in `tiers` outside of the process, such as `Encrypted(secret)`.
        model_id: the name of the weights for `tiers`; None for a digest of their content.
        costs: with `tiers`, how long the model computes prompts; None measures it.
        mode: `"virtual"` maps blocks so that all attention code reads them without a gather.
        cross_stack: share `tiers` with other serving stacks, such as vLLM, after a self-test.
        record: path of a recording of each step, for `kvpager report` and `kvpager top`.

    Raises: `TypeError`, `ValueError`, `KVPagerError`; errors of a store. The model is as before.
    """
    warn_if_untested()
    config = _stores(host_memory, tiers, seal, model_id, costs, cross_stack, record)
    dtype = _checked(model, dtype, prefix_cache, namespace, config)
    budget = Budget(memory, block_size, kv_cache_dtype, host_memory, in_place=in_place, mode=mode)
    paged = PagedMemory(budget, dtype, eviction, namespace, keep_pools=prefix_cache)
    return _begin(model, paged, config)


def _stores(*settings: object) -> EngineConfig:
    names = "host_memory", "tiers", "seal", "model_id", "costs", "cross_stack", "record"
    return EngineConfig.of(None, dict(zip(names, settings, strict=True)))


def _begin(model: nn.Module | None, paged: PagedMemory, stores: EngineConfig) -> Patch:
    """Make a patch that serves the model from now on; close its stores if that fails."""
    if isinstance(model, PreTrainedModel):
        wide = model.dtype if model.dtype.itemsize > 1 else torch.bfloat16
        paged.budget.refuse_below(least_block_bytes(model.config, wide, paged.budget))
    prompts = PromptCache(paged.namespaces) if paged.keep_pools else None
    made = Patch(model, paged, prompts)
    _refuse_second(model)
    if prompts is not None and model is not None and stores.tiers:
        prompts.tiers = open_prompt_tiers(model, paged, prompts, stores)
    try:
        paged.recorder = _recorder(model, paged, stores)
        with lock, uninterrupted:
            _refuse_second(model)
            if made.prompt_tiers is not None:
                made.prompt_tiers.refuse_change()
            if not active:
                install()
            if made.prompt_tiers is not None:
                # A model with other attention functions has another version.
                made.prompt_tiers.renew()
            active.append(made)
    except BaseException:
        if made.prompt_tiers is not None:
            made.prompt_tiers.close()
        if paged.recorder is not None:
            paged.recorder.close()
        raise
    return made


def _recorder(
    model: nn.Module | None, paged: PagedMemory, settings: EngineConfig
) -> PoolRecorder | None:
    """Open the file of `record`; None without one. Raises: `OSError`, `ValueError`."""
    if settings.record is None:
        return None
    longest = None
    if isinstance(model, PreTrainedModel):
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    described = Described(
        source="patch",
        mode=paged.budget.mode,
        max_tokens=longest,
        eviction=paged.eviction if isinstance(paged.eviction, str) else None,
        model=None if model is None else type(model).__name__,
    )
    return PoolRecorder(settings.record, paged.budget.block_size, described, paged.calls)


def _refuse_second(model: nn.Module | None) -> None:
    with lock:
        for other in active:
            if other.is_of(model):
                call = "unpatch()" if model is None else "unpatch(model)"
                raise KVPagerError(f"patched already, by {other!r}. Call kvpager.{call} first.")


def unpatch(model: nn.Module | None = None) -> None:
    """Undo every patch of a model. Use it when the handle that `patch` returned is lost.

        kvpager.patch(model)
        ...
        kvpager.unpatch(model)

    Args:
        model: the model given to `patch`; None undoes `patch()`, which serves every model.

    Does nothing if there is no such patch. Raises: `KVPagerError` if the model is served by
    `patch()` without a model, which cannot be undone for one model alone.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model: expected the model that was patched, got {type(model).__name__}")
    with lock:
        of_model = [made for made in active if made.was_made_for(model)]
        if model is not None and not of_model and any(made.was_made_for(None) for made in active):
            raise KVPagerError(
                f"unpatch({type(model).__name__}): patch() without a model serves every model. "
                "Call kvpager.unpatch() without a model to undo it."
            )
        for made in of_model:
            made.undo()


def _checked(
    model: nn.Module | None,
    dtype: torch.dtype | str | None,
    prefix_cache: bool,
    namespace: str | None,
    stores: EngineConfig,
) -> torch.dtype | None:
    """Return the dtype. Raise an error if `patch` cannot have these arguments together."""
    if model is not None and not _can_generate(model):
        raise no_model(model)
    arguments.flag("prefix_cache", prefix_cache)
    arguments.label("namespace", namespace)
    if namespace is not None and not prefix_cache:
        raise ValueError(
            f"namespace={namespace!r}: separates cached prefixes only. Pass prefix_cache=True too."
        )
    if not stores.tiers:
        if stores.costs is not None:
            raise ValueError("costs: of use with tiers only. Pass tiers=, or leave it out.")
    elif not prefix_cache:
        raise ValueError("tiers: they keep cached prefixes. Pass prefix_cache=True too.")
    elif model is None:
        raise ValueError("tiers: they keep the prompts of one model. Pass it: patch(model, ...).")
    return _checked_dtype(dtype, model)


def _can_generate(model: object) -> bool:
    return isinstance(model, nn.Module) and any(
        isinstance(module, GenerationMixin) for module in model.modules()
    )


def _checked_dtype(dtype: torch.dtype | str | None, model: nn.Module | None) -> torch.dtype | None:
    if dtype is None:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r}: expected a floating dtype such as torch.bfloat16")
    if model is not None:
        present = {parameter.dtype for parameter in model.parameters()}
        if found not in present:
            names = ", ".join(sorted(str(p).removeprefix("torch.") for p in present))
            raise ValueError(
                f"dtype={found}: the model's weights are {names}, and so are its keys and values. "
                "Load the model in that dtype, or leave dtype out."
            )
    return found
