"""Reuse prompts and replies that an earlier call of `generate` computed.

A namespace for each version of a model separates their prefixes. A cache learns the token ids of
its columns from the prompt (`prefill.py`), and from the tokens that `generate` chooses (`reply`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PrefixConstrainedLogitsProcessor

from kvpager.blocks.sequences import SequenceHandle
from kvpager.errors import OutOfBlocks
from kvpager.integrations.huggingface.cache.budget import LayerKind
from kvpager.integrations.huggingface.cache.paged_cache import PagedCache
from kvpager.integrations.huggingface.cache.pools import PagedPool
from kvpager.integrations.huggingface.cache.prompt import Namespaces, PrefixKey, Prompt
from kvpager.integrations.huggingface.model_state.contents import is_library
from kvpager.integrations.huggingface.model_state.fingerprint import ModelState, ModelWatch
from kvpager.integrations.huggingface.model_state.row_independence import row_dependence
from kvpager.integrations.huggingface.prefix.prefill_inputs import Padding
from kvpager.integrations.huggingface.prefix.prompt_tiers import PromptTiers
from kvpager.integrations.huggingface.releases import cache_in
from kvpager.plans import Int32, Int64


class _PoolLayout(NamedTuple):
    """The key of the pool that holds a model's prompts, and the kind of each layer."""

    key: object
    kinds: list[LayerKind]


_NO_LAYOUT = _PoolLayout(None, [])


@dataclass
class _Served:
    """The facts about a model whose prompts are kept."""

    watch: ModelWatch
    decoding_watch: ModelWatch
    decoding_key: PrefixKey | None = None  # of the last call that decoded
    row_obstacle: tuple[PrefixKey | None, str | None] = None, None  # of the last key
    layout: _PoolLayout = _NO_LAYOUT


class PromptCache:
    """The pool and the prefix key of each model's prompts."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces
        self.tiers: PromptTiers | None = None  # below the pool of the only model
        self._models: weakref.WeakKeyDictionary[nn.Module, _Served] = weakref.WeakKeyDictionary()

    def key_of(self, model: nn.Module, *, samples: bool = True) -> tuple[PrefixKey, str | None]:
        """Return the key under which prompts share blocks now, and a reason if they must not.

        `samples` is an argument of `ModelWatch.look`. O(modules + weights).
        """
        state = self._served(model).watch.look(samples=samples)
        return PrefixKey(self._namespaces.current, str(state.version)), state.doubt

    def decoding_watch(self, model: nn.Module, key: PrefixKey) -> tuple[ModelWatch, bool]:
        """Return the watch over `model` while it decodes, and True if it may be out of date. O(1).

        transformers changes some settings while a model decodes, such as how experts are computed.
        So prompts and decoding have a watch each. The decoding watch is out of date if its last
        call had another `key`, which contains the model's version.
        """
        served = self._served(model)
        before, served.decoding_key = served.decoding_key, key
        return served.decoding_watch, before != key

    def _served(self, model: nn.Module) -> _Served:
        found = self._models.get(model)
        if found is None:
            made = _Served(ModelWatch(model), ModelWatch(model, has_parts=True))
            found = self._models.setdefault(model, made)
        return found

    def prompt(self, model: nn.Module, ids: Tensor, padding: Padding) -> Prompt | str:
        """Return the batch's prompts under the current model version and namespace. O(tokens).

        Returns a reason instead if the model may change undetected or may treat rows differently.
        """
        key, doubt = self.key_of(model)
        if doubt is not None:
            return f"a model that may change undetected ({doubt})"
        served = self._served(model)
        before, obstacle = served.row_obstacle
        if before != key:  # the version in `key` covers everything that `row_dependence` reads
            obstacle = row_dependence(model)
            served.row_obstacle = key, obstacle
        if obstacle is not None:
            return obstacle
        rows = [row[pad:] for row, pad in zip(_to_int32(ids), padding, strict=True)]
        return Prompt(rows, key)

    def known(self, model: nn.Module, cache: PagedCache, prompt: Prompt) -> Int64:
        """Return the number of cached tokens of each row; at least one token is new. O(tokens)."""
        pool, _ = self._pool(model, cache)
        if pool is None:
            return np.zeros(len(prompt.rows), np.int64)
        return np.array([_known(pool, row, prompt.key) for row in prompt.rows], np.int64)

    def attach(self, model: nn.Module, cache: PagedCache, prompt: Prompt, padding: Padding) -> None:
        """Begin the cache with cached prefixes, and record its token ids for `publish`. O(tokens).

        A cache that was begun this way begins again if the pool now holds longer prefixes.
        """
        group = cache.groups[0]
        if group.num_columns:
            if int((padding + self.known(model, cache, prompt)).min()) <= group.num_columns:
                return
            cache.reset()
        group.columns.padding, group.prompt = padding, prompt
        pool, layout = self._pool(model, cache)
        if pool is None:
            return
        # No other cache may take the blocks meanwhile, and no interrupt may lose them.
        with pool.lock, pool.uninterrupted:
            # All rows have as many columns as the row with the shortest cached prefix.
            known = [_known(pool, row, prompt.key) for row in prompt.rows]
            num_columns = int((padding + known).min())
            if num_columns <= int(padding.min()):
                return
            lengths = np.maximum(num_columns - padding, 0).tolist()
            sequences = _begin_known(pool, prompt, lengths)
            if sequences is None:
                return
            group.adopt(layout.key, sequences, prompt.key, num_columns)
            for layer, kind in zip(cache.paged_layers(), layout.kinds, strict=True):
                layer.bind(kind)
                layer.num_columns = num_columns

    def await_turn(self, model: nn.Module, cache: PagedCache) -> None:
        """Wait for other calls if memory is short, before the cache takes blocks. O(layers)."""
        pool, layout = self._pool(model, cache)
        if pool is not None:
            cache.memory.await_turn(layout.kinds[0])

    def prepare(self, model: nn.Module, key: object, kinds: list[LayerKind]) -> ModelWatch:
        """Look for prompts in the pool of this layout, before the first was computed. O(1).

        Returns the watch over the model, whose versions are those of `PrefixKey`.
        """
        served = self._served(model)
        served.layout = _PoolLayout(key, kinds)
        return served.watch

    def _pool(self, model: nn.Module, cache: PagedCache) -> tuple[PagedPool | None, _PoolLayout]:
        """Return the pool of the model's prompts, or None if there is none that fits the cache."""
        layout = self._served(model).layout
        if len(layout.kinds) != len(cache.paged_layers()):
            return None, layout
        with cache.memory.lock:
            return cache.memory.by_layout.get(layout.key), layout

    def publish(self, model: nn.Module, cache: PagedCache) -> None:
        """Publish the full blocks of a prompt that has been computed. O(blocks)."""
        group, layers = cache.groups[0], cache.paged_layers()
        kinds = [layer.kind for layer in layers if layer.kind is not None]
        # Some models change as they compute, such as those with a dynamic rotary base.
        # Weights are sampled before blocks are reused, so it need not happen here.
        now = self.key_of(model, samples=False)
        unchanged = group.prompt is not None and now == (group.prompt.key, None)
        if unchanged and cache.is_fully_paged and len(kinds) == len(layers):
            group.commit()
            self._served(model).layout = _PoolLayout(group.layout, kinds)
        else:
            group.prompt = None  # later columns are not reusable either


def reply(
    original: Callable[..., Any], prompts: PromptCache, model: Any, *args: Any, **kwargs: Any
) -> Any:
    """Run `GenerationMixin._sample` for a new paged cache, and publish the blocks of its tokens.

    In transformers' decoding loop, keys and values depend on the tokens alone, as in a prompt. So
    the next turn of a chat, which repeats the reply, finds its blocks. After the loop the caller
    may change the cache, so its later tokens are unknown.
    """
    cache: Any = cache_in(kwargs)
    processors, streamer = kwargs["logits_processor"], kwargs.get("streamer")
    criteria = kwargs.get("stopping_criteria") or ()
    is_thorough = any(map(_is_user_code, [*processors, *criteria, streamer]))
    guard = _ModelChangeGuard(cache, prompts, model, is_thorough)
    kwargs["logits_processor"] = LogitsProcessorList([guard, *processors])
    kwargs["streamer"] = _TokenStreamer(cache, streamer)
    try:
        result = original(model, *args, **kwargs)
        if cache.groups and cache.groups[0].prompt is not None:
            prompts.publish(model, cache)
    finally:
        for group in cache.groups:
            group.prompt = None
    return result


def _is_user_code(each: object) -> bool:
    """Return True for a processor, criterion or streamer that runs code of the user."""
    module_name = type(each).__module__
    return not is_library(module_name) or isinstance(each, PrefixConstrainedLogitsProcessor)


class _TokenStreamer:
    """A streamer that tells a cache the chosen tokens, and passes them to the user's streamer."""

    def __init__(self, cache: PagedCache, inner: Any) -> None:
        self._cache = cache
        self._inner = inner

    def put(self, tokens: Tensor) -> None:
        """Record the next token of each row, [rows], which is chosen but not computed yet."""
        for group in self._cache.groups:
            group.note_next(_to_int32(tokens.reshape(-1)))
        if self._inner is not None:
            self._inner.put(tokens)

    def end(self) -> None:
        """End the user's streamer."""
        if self._inner is not None:
            self._inner.end()


class _ModelChangeGuard(LogitsProcessor):
    """A logits processor that stops keeping a reply if the model changes, even temporarily.

    It is the first processor, so that no code of the user runs between the forward pass and it.
    """

    def __init__(
        self, cache: PagedCache, prompts: PromptCache, model: nn.Module, is_thorough: bool
    ) -> None:
        self._cache, self._is_thorough = cache, is_thorough
        self._prompts, self._model = prompts, model
        self._before: ModelState | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Compare the model with its state after the first pass. Return `scores` unchanged.

        Compares the whole model if code of the user runs between passes, which may change it.
        Otherwise only another thread may change it, so each call compares the next part.
        """
        kept = [group for group in self._cache.groups if group.prompt is not None]
        prompt = kept[0].prompt if kept else None
        if prompt is not None:
            is_first = self._before is None
            watch, is_outdated = self._prompts.decoding_watch(self._model, prompt.key)
            if self._is_thorough or is_outdated:
                now = watch.look(samples=is_first)
            else:
                now = watch.glance()
            if self._before not in (None, now):
                for group in kept:
                    group.prompt = None
                self._cache.memory.note_fallback(
                    "reply not kept: a change of the model during the call"
                )
            self._before = now
        return scores


def _known(pool: PagedPool, row: Int32, key: PrefixKey) -> int:
    return min(pool.num_known(row, key), len(row) - 1)


def _begin_known(
    pool: PagedPool, prompt: Prompt, lengths: list[int]
) -> list[SequenceHandle] | None:
    """Return sequences of the first `lengths` tokens of each row, all cached; None if full."""
    sequences: list[SequenceHandle] = []
    for row, length in zip(prompt.rows, lengths, strict=True):
        try:
            # One more token, because the prompt's last token never counts as cached.
            sequences.append(pool.allocate(row[: length + 1], prompt.key))
        except OutOfBlocks:
            break
        if sequences[-1].num_cached_tokens < length:  # its own copy evicted part of it
            break
        pool.manager.truncate(sequences[-1], length)
    else:
        return sequences
    pool.manager.free(sequences)
    return None


def _to_int32(ids: Tensor) -> Int32:
    return ids.cpu().numpy().astype(np.int32)
