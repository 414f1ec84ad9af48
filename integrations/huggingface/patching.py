"""`kvpager.patch`: the one line that puts paging behind transformers, and takes it out again."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel, masking_utils
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import configuration_utils
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.continuous_batching import ContinuousMixin
from transformers.modeling_utils import AttentionInterface

from kvpager import _validate as arguments
from kvpager._atomic import Uninterrupted, new_lock
from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.attention.flash import flash_names, reading_flash_in_place
from kvpager.integrations.huggingface.attention.functions import (
    AttentionFunction,
    reading_in_place,
    register,
)
from kvpager.integrations.huggingface.cache.memory import PagedMemory
from kvpager.integrations.huggingface.cache.paged_cache import (
    PagedCache,
    least_block_bytes,
    unpaged,
)
from kvpager.integrations.huggingface.cache.report import PatchStats, report
from kvpager.integrations.huggingface.continuous_batching.manager import PagedBatchingManager
from kvpager.integrations.huggingface.continuous_batching.routes import retire, routes
from kvpager.integrations.huggingface.prefix.prefill import prefill, returned_rows
from kvpager.integrations.huggingface.prefix.prompts import PromptCache, reply
from kvpager.integrations.huggingface.releases import cache_in, warn_if_untested
from kvpager.storage.block_storage import KVDtype

__all__ = ["PagedCache", "Patch", "PatchStats", "patch", "unpatch"]

logger = logging.getLogger("kvpager")

register()

_lock = new_lock()
_uninterrupted = Uninterrupted(_lock)
_active: list[Patch] = []  # in the order they were made; the last one that covers a model serves it
_undo: list[Callable[[], None]] = []
_scope = threading.local()  # .patch: the patch that serves the cache being made, on this thread


class Patch:
    """Paging is on for a model, or for all of them, until `undo`. Made by `patch`."""

    def __init__(
        self,
        model: nn.Module | None,
        memory: PagedMemory,
        prompts: PromptCache | None,
    ) -> None:
        self.memory = memory
        self.prompts = prompts
        self.managers: weakref.WeakSet[PagedBatchingManager] = weakref.WeakSet()
        self._covers_all = model is None
        self._served = "every model" if model is None else type(model).__name__
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._configs: list[Any] = []
        if model is not None:
            self._models.update(m for m in model.modules() if isinstance(m, GenerationMixin))
            configs = [m.config for m in model.modules() if hasattr(m, "config")]
            self._configs = list({id(config): config for config in configs}.values())

    def __repr__(self) -> str:
        state = "active" if self in _active else "undone"
        return f"<Patch of {self._served}: {state}, {self.memory.options()}>"

    def covers(self, model: nn.Module) -> bool:
        """Whether this patch serves `model`. O(1)."""
        return self._covers_all or model in self._models

    def is_of(self, model: nn.Module | None) -> bool:
        """True if `patch` was called for this model, or for one inside it or around it.

        None means every model. O(modules).
        """
        if model is None or self._covers_all:
            return model is None and self._covers_all
        return any(module in self._models for module in model.modules())

    def covers_config(self, config: Any) -> bool:
        """Whether this patch serves caches made for `config`. O(configurations of the model)."""
        return self._covers_all or any(config is known for known in self._configs)

    @property
    def is_active(self) -> bool:
        """Whether it was not undone. O(patches)."""
        return self in _active

    def stats(self) -> PatchStats:
        """Counts of now, and totals since the patch was made. O(blocks)."""
        host = self.memory.host
        pools, host_pools = self.memory.pools(), [] if host is None else host.pools()
        self.memory.settle()
        if host is not None:
            host.settle()
        stats = [(pool.manager.stats(), pool.block_bytes) for pool in pools]
        counters = self.memory.counters
        return PatchStats(
            num_blocks=sum(s.num_blocks for s, _ in stats),
            num_held_blocks=sum(s.num_held for s, _ in stats),
            num_shared_blocks=sum(s.num_shared for s, _ in stats),
            num_cached_blocks=sum(s.num_cached for s, _ in stats),
            num_sequences=sum(s.num_sequences for s, _ in stats),
            reserved_bytes=self.memory.reserved_bytes,
            held_bytes=sum(s.num_held * size for s, size in stats),
            used_bytes=sum(s.num_tokens * size // s.block_size for s, size in stats),
            cached_bytes=sum(s.num_cached * size for s, size in stats),
            peak_held_bytes=counters.peak_held_bytes,
            peak_dense_bytes=counters.peak_dense_bytes,
            copied_blocks=counters.copied_blocks,
            evicted_blocks=counters.evicted_blocks,
            gathers=counters.gathers,
            in_place_reads=counters.in_place_reads,
            prefix_query_tokens=counters.prefix_query_tokens,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            prefix_unserved_calls=counters.prefix_unserved_calls,
            host_reserved_bytes=sum(pool.reserved_bytes for pool in host_pools),
            host_held_bytes=sum(pool.held_bytes for pool in host_pools),
            peak_host_held_bytes=0 if host is None else host.counters.peak_held_bytes,
            swapped_out_blocks=0 if host is None else host.counters.arrived_blocks,
            swapped_in_blocks=counters.arrived_blocks,
            num_sessions=counters.sessions,
            session_requests=counters.session_requests,
            session_tokens=counters.session_tokens,
        )

    def namespace(self, name: str) -> AbstractContextManager[None]:
        """Calls made within share prompts with calls of namespace `name` only.

            with paging.namespace("acme"):
                model.generate(...)

        It holds for calls of this thread, or of this asyncio task, alone. Raises: `KVPagerError`
        without `prefix_cache`; `TypeError` for what is no name.
        """
        if name is None:
            raise TypeError("namespace None: pass the name of a namespace")
        arguments.label("namespace", name)
        if self.prompts is None:
            raise KVPagerError(
                f"namespace {name!r}: no prompts are kept between calls; patch with "
                "prefix_cache=True"
            )
        return self.prompts.chosen(name)

    def report(self) -> str:
        """What was paged and what that saved, as a text for people. O(blocks)."""
        for manager in list(self.managers):
            manager.note_doubt()
        return report(self.memory, self.stats())

    def clear(self) -> None:
        """Give cached prefixes up, and all memory that no live cache needs. O(cached blocks)."""
        self.memory.clear()

    def undo(self) -> None:
        """Take the patch out: transformers is as it was found. Caches made so far keep working.

        Raises: `KVPagerError` where it was undone before.
        """
        with _lock, _uninterrupted:
            if self not in _active:
                raise KVPagerError("this patch was undone already; make a new one with patch()")
            _active.remove(self)
            if not _active:
                _uninstall()
        retire(self.managers)
        self.memory.clear()

    def __enter__(self) -> Patch:
        if self not in _active:
            raise KVPagerError("this patch was undone already; make a new one with patch()")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self in _active:
            self.undo()


def patch(
    model: nn.Module | None = None,
    *,
    memory: int | str | None = None,
    block_size: int = 16,
    dtype: torch.dtype | str | None = None,
    kv_dtype: KVDtype | None = None,
    host_memory: int | str | None = None,
    prefix_cache: bool = False,
    namespace: str | None = None,
    in_place: bool = True,
) -> Patch:
    """Keep the KV cache of a transformers model - or of every model - in shared blocks.

        with kvpager.patch(model):
            model.generate(...)             # the same tokens, in less memory

    Args:
        model: the model to serve; None serves every model of the process.
        memory: the most bytes its pools may reserve, such as `"4GiB"`; None lets them grow as
            needed and gives the memory back when the last cache is dropped. While a pool grows,
            its old and new storage exist together; the bound counts one of them. A call waits
            until its rows fit, at full length, beside the calls of other threads. It raises
            `OutOfBlocks` if no other call computes a step for 60 seconds.
        block_size: token slots of a block, a power of two.
        dtype: the dtype keys and values must have; None for the model's own.
        kv_dtype: `"int8"` or `"fp8_e4m3"` keeps keys and values in eight bits, with a scale per
            token and head: half the memory of bfloat16, and numbers that are rounded (about 1 %
            of the attention's norm in int8, 4 % in fp8), so tokens may differ.
        host_memory: bytes of host memory, such as `"8GiB"`, for rows of a batch that `memory`, or
            the device, has no room for: they live on there, with the same tokens, slower. Layers
            of every kind may then have one block on the device beyond the bound.
        prefix_cache: keep the blocks of prompts, and of replies by greedy search and sampling,
            between calls, so that a prompt that begins like an earlier one, or repeats a
            conversation, computes only what is new; for causal text models whose layers all look at
            the whole prompt. Takes memory until `clear` or `undo`; without `memory`, prompts are
            kept while a larger pool fits in half of the free memory. A model whose weights, hooks,
            functions or settings changed reuses nothing. Call `clear` after changes that leave no
            trace, such as writing single numbers through `.data`.
        namespace: with `prefix_cache`, only prompts of the same namespace share blocks.
        in_place: let `sdpa` and flash attention read blocks in place; False gathers them for
            every read.

    Nothing else in the program changes: `generate`, beams, sampling, assisted decoding, chunked
    prefill and `copy.deepcopy(cache)` work as before. `undo()`, or leaving `with`, restores
    transformers exactly.

    Raises: `TypeError`, `ValueError` for arguments that make no sense, such as a `memory` in which
    not one block fits; nothing has changed then.
    """
    warn_if_untested()
    if model is not None and not _generative(model):
        raise TypeError(
            f"patch: expected a transformers model that can generate, got {type(model).__name__}; "
            "patch() without a model serves every model"
        )
    arguments.label("namespace", namespace)
    arguments.flag("prefix_cache", prefix_cache)
    arguments.flag("in_place", in_place)
    if namespace is not None and not prefix_cache:
        raise ValueError(
            f"namespace {namespace!r}: it separates prefixes, so set prefix_cache=True"
        )
    paged_memory = PagedMemory(
        memory,
        block_size,
        keep_pools=prefix_cache,
        in_place=in_place,
        dtype=_checked_dtype(dtype, model),
        kv_dtype=kv_dtype,
        host_memory=host_memory,
    )
    if isinstance(model, PreTrainedModel):
        dtype_there = model.dtype if model.dtype.itemsize > 1 else torch.bfloat16
        paged_memory.refuse_below(least_block_bytes(model.config, dtype_there, paged_memory))
    made = Patch(model, paged_memory, PromptCache(namespace) if prefix_cache else None)
    with _lock, _uninterrupted:
        if not _active:
            _install()
        _active.append(made)
    return made


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
        raise TypeError(f"unpatch: expected the model that was patched, got {type(model).__name__}")
    with _lock:
        of_model = [made for made in _active if made.is_of(model)]
        if model is not None and not of_model and any(made.is_of(None) for made in _active):
            raise KVPagerError(
                f"unpatch({type(model).__name__}): patch() without a model serves every model; "
                "call kvpager.unpatch() to undo it"
            )
        for made in of_model:
            made.undo()


def _generative(model: object) -> bool:
    return isinstance(model, nn.Module) and any(
        isinstance(module, GenerationMixin) for module in model.modules()
    )


def _checked_dtype(dtype: torch.dtype | str | None, model: nn.Module | None) -> torch.dtype | None:
    if dtype is None:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype {dtype!r}: expected a floating dtype such as torch.bfloat16")
    if model is not None:
        present = {parameter.dtype for parameter in model.parameters()}
        if found not in present:
            names = ", ".join(sorted(str(p).removeprefix("torch.") for p in present))
            raise ValueError(
                f"dtype {found}: the model has {names}; keys and values take the model's dtype"
            )
    return found


# -------------------------------------------------------------------- the hooks


def _install() -> None:
    """Put the hooks in. Every one is taken out by `_uninstall`, the last first."""
    _replace(DynamicCache, "__init__", _paging_init)
    _replace(GenerationMixin, "generate", _counted_generate)
    _replace(GenerationMixin, "_prepare_cache_for_generation", _scoped_prepare)
    _replace(GenerationMixin, "_prefill", _paging_prefill)
    _replace(GenerationMixin, "_sample", _listening_sample)
    _replace(masking_utils, "_preprocess_mask_arguments", _watched_masks)
    for name, wrap in routes(_patch_for).items():
        _replace(ContinuousMixin, name, wrap)
    _replace(
        configuration_utils,
        "ALL_CACHE_IMPLEMENTATIONS",
        lambda original: (*original, "kvpager"),
    )
    registered: Any = AttentionInterface._global_mapping
    _register("sdpa", reading_in_place(registered["sdpa"]))
    for name in list(flash_names(registered)):
        _register(name, reading_flash_in_place(registered[name]))


def _register(name: str, ours: AttentionFunction) -> None:
    registered: Any = AttentionInterface._global_mapping
    original = registered[name]
    AttentionInterface.register(name, ours)
    _undo.append(
        lambda: _restore(
            f"the {name} attention",
            registered[name] is ours,
            lambda: AttentionInterface.register(name, original),
        )
    )


def _uninstall() -> None:
    while _undo:
        _undo.pop()()


def _restore(what: str, is_ours: bool, restore: Callable[[], None]) -> None:
    if is_ours:
        restore()
    else:
        # Somebody patched over us, and may call what it found, which is inert from now on.
        logger.warning("%s was replaced while patched, and is left as it is", what)


def _replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    original = getattr(owner, name, None)
    if original is None:
        # A private hook that this transformers does without: what it serves is an optimisation.
        logger.warning("transformers has no %s.%s: paging works without it", owner.__name__, name)
        return
    ours = wrap(original)
    setattr(owner, name, ours)
    _undo.append(
        lambda: _restore(
            f"{owner.__name__}.{name}",
            getattr(owner, name) is ours,
            lambda: setattr(owner, name, original),
        )
    )


def _paging_init(original: Callable[..., None]) -> Callable[..., None]:
    """`DynamicCache.__init__`: what it builds is paged afterwards, wherever it is built."""

    @functools.wraps(original)
    def __init__(self: DynamicCache, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is DynamicCache and not torch.compiler.is_compiling():
            config = kwargs.get("config", args[1] if len(args) > 1 else None)
            _note_made_outside(_patch_in_scope(config), config)
            _page(self, _patch_in_scope(config), config)

    return __init__


def _counted_generate(original: Callable[..., Any]) -> Callable[..., Any]:
    """`generate`: calls of other threads may wait for the memory of this one."""

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        serving = _patch_for(self)
        if serving is None or torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        with serving.memory.calls.running():
            return original(self, *args, **kwargs)

    return generate


def _scoped_prepare(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_prepare_cache_for_generation`: here it is known which model a cache is for."""

    @functools.wraps(original)
    def prepare(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        wanted = generation_config.cache_implementation == "kvpager"
        serving = _patch_for(self, wanted=wanted)
        # T5Gemma goes on to replace the cache across by another of its class, with arguments of
        # DynamicCache: what such models find there is plain, and paged in `_prefill`.
        goes_on = type(self)._prepare_cache_for_generation is not prepare
        outer = getattr(_scope, "patch", None)
        _scope.patch = _NOBODY if serving is None or goes_on else serving
        try:
            result = original(self, generation_config, model_kwargs, *args, **kwargs)
        finally:
            _scope.patch = outer
        cache: Any = cache_in(model_kwargs)
        if isinstance(cache, EncoderDecoderCache):
            _page(cache.self_attention_cache, serving)
            if not goes_on:
                _page(cache.cross_attention_cache, serving)
        else:
            _page(cache, serving, self.config)
        if serving is not None:
            mode = args[0] if args else kwargs.get("generation_mode")
            _note_unserved(serving, generation_config, cache, mode)
        return result

    return prepare


def _note_unserved(serving: Patch, generation_config: Any, cache: Any, mode: Any) -> None:
    """Note for the report why a call of `generate` gets no paged cache, or keeps no prompt."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if generation_config.use_cache is False:
        serving.memory.note_unserved("not paged: use_cache=False")
    elif not isinstance(own, PagedCache):
        name, home = type(own).__name__, type(own).__module__.partition(".")[0]
        named = generation_config.cache_implementation
        if home == "transformers":
            what = name if named is None else f"cache_implementation={named!r}"
            serving.memory.note_unserved(f"not paged: {what}, a cache of transformers' own")
        elif home != "kvpager":  # an engine's probe compares with a plain cache
            serving.memory.note_unserved(f"not paged: {name}, a cache passed by the caller")
    elif isinstance(cache, EncoderDecoderCache):
        _note_not_kept(serving, "an encoder-decoder model")
    elif serving.prompts is not None and mode == GenerationMode.ASSISTED_GENERATION:
        is_lookup = generation_config.prompt_lookup_num_tokens is not None
        what = "prompt lookup" if is_lookup else "assisted decoding"
        serving.memory.note_unserved(f"prompts not kept: {what}, whose drafts may be rejected")


def _note_not_kept(serving: Patch, reason: str) -> None:
    """Note for the report a call of `generate` whose prompts could not be looked at."""
    if serving.prompts is not None:
        serving.memory.counters.prefix_unserved_calls += 1
        serving.memory.note_unserved(f"prompts not kept: {reason}")


def _note_made_outside(serving: Patch | None, config: Any) -> None:
    """Note for the report a cache that no `generate` makes."""
    is_outside = getattr(_scope, "patch", None) is None and config is not None
    if serving is not None and serving.prompts is not None and is_outside:
        serving.memory.note_unserved(
            "prompts not kept: a cache made outside generate(), as by a bare forward pass"
        )


def _paging_prefill(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_prefill`: here the prompt's ids and padding are known."""

    @functools.wraps(original)
    def _prefill(
        self: Any,
        input_ids: torch.Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        serving, cache = _patch_for(self), cache_in(model_kwargs)
        if isinstance(cache, EncoderDecoderCache):
            _page(cache.cross_attention_cache, serving)
        inputs = (self, input_ids, generation_config, model_kwargs)
        if serving is not None:
            serving.memory.calls.note_size(
                len(input_ids), _longest(generation_config, model_kwargs)
            )
        if serving is None or not _is_paged(cache) or args:
            return original(*inputs, *args, **kwargs)
        if cache.is_begun:
            _check_padding_is_still_hidden(cache, model_kwargs.get("attention_mask"))
            return original(*inputs, **kwargs)
        if not kwargs.get("is_first_iteration", True) or self.config.is_encoder_decoder:
            return original(*inputs, **kwargs)
        if model_kwargs.get("inputs_embeds") is not None:
            if returned_rows(generation_config) > 1:
                serving.memory.note_unserved("equal rows not merged: inputs_embeds")
            _note_not_kept(serving, "inputs_embeds")
            return original(*inputs, **kwargs)
        return prefill(original, serving.prompts, *inputs, **kwargs)

    return _prefill


def _longest(generation_config: Any, model_kwargs: dict[str, Any]) -> int:
    """Return how long the rows of a call may get, the encoder's included; 0 if not known."""
    encoded = getattr(model_kwargs.get("encoder_outputs"), "last_hidden_state", None)
    columns = 0 if encoded is None else encoded.shape[1]
    return max(generation_config.max_length or 0, columns)


def _watched_masks(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_preprocess_mask_arguments`: here a model's own code says which columns it hides."""

    @functools.wraps(original)
    def preprocess(
        config: Any, inputs_embeds: Any, mask: Any, cache: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(cache, PagedCache) and not torch.compiler.is_compiling():
            for group in cache.groups:
                group.see_mask(mask)
        return original(config, inputs_embeds, mask, cache, *args, **kwargs)

    return preprocess


def _listening_sample(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_sample`: here the tokens that are chosen can be heard."""

    @functools.wraps(original)
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        serving, cache = _patch_for(self), cache_in(kwargs)
        if serving is None or serving.prompts is None or not _is_paged(cache):
            return original(self, *args, **kwargs)
        if cache.is_begun or "logits_processor" not in kwargs:  # who knows what is in it
            return original(self, *args, **kwargs)
        return reply(original, serving.prompts, self, *args, **kwargs)

    return _sample


_NOBODY: Any = object()


def _patch_in_scope(config: Any) -> Patch | None:
    scoped = getattr(_scope, "patch", None)
    if scoped is not None:
        return None if scoped is _NOBODY else scoped
    return next((made for made in reversed(_active) if made.covers_config(config)), None)


def _patch_for(model: Any, *, wanted: bool = False) -> Patch | None:
    """The patch that serves `model`; one of plain options if paging is `wanted` by name."""
    found = next((made for made in reversed(_active) if made.covers(model)), None)
    if found is None and wanted and _active:
        return _asked_for_by_name()
    return found


@functools.cache
def _asked_for_by_name() -> Patch:
    """Serves the models that no patch was made for: nobody's options but the usual ones."""
    return Patch(None, PagedMemory(None, 16), None)


def _page(cache: Any, serving: Patch | None, config: Any = None) -> None:
    if serving is not None and unpaged(cache):
        PagedCache.convert(cache, serving.memory, config)


def _is_paged(cache: Any) -> bool:
    """Return True for a paged cache that has layers in blocks, as caches of attention do."""
    return isinstance(cache, PagedCache) and bool(cache.groups)


def _check_padding_is_still_hidden(cache: PagedCache, mask: torch.Tensor | None) -> None:
    """Padding was never stored, so a later call may not look at it either."""
    group = max(cache.groups, key=lambda each: int(each.padding.max(initial=0)), default=None)
    padding = 0 if group is None else int(group.padding.max(initial=0))
    if group is None or not padding:
        return
    columns = torch.arange(padding)
    hidden = columns < torch.from_numpy(group.padding)[:, None]
    if mask is None or mask.dim() != 2 or bool((mask[:, :padding].cpu() != 0)[hidden].any()):
        raise ValueError(
            "this cache was begun with left padding, which takes no blocks: pass the "
            "attention_mask of the whole sequence, with zeros where the padding was"
        )
