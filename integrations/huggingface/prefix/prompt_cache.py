"""Prompts and replies that were computed before: which there are, how a cache begins with them.

They are kept in a namespace of the model as it was when it computed them. A cache learns the ids of
what it holds at the start of `generate` (`prefill.py`), and here from what `generate` chooses.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
)

from kvpager.blocks.sequences import SequenceHandle
from kvpager.errors import OutOfBlocks
from kvpager.integrations.huggingface.cache.namespaces import Namespaces
from kvpager.integrations.huggingface.cache.paged_cache import PagedCache
from kvpager.integrations.huggingface.cache.pools import LayerKind, PagedPool
from kvpager.integrations.huggingface.cache.prompt import PrefixKey, Prompt
from kvpager.integrations.huggingface.model_state.contents import is_library
from kvpager.integrations.huggingface.model_state.fingerprint import ModelState, ModelWatch
from kvpager.integrations.huggingface.model_state.row_independence import row_dependence
from kvpager.integrations.huggingface.prefix.prefill_inputs import Padding
from kvpager.integrations.huggingface.releases import cache_in
from kvpager.plans import Int32, Int64


class PromptCache:
    """Which pool each model's prompts are in, and under which namespace."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces
        self._layouts: weakref.WeakKeyDictionary[nn.Module, _PoolLayout] = (
            weakref.WeakKeyDictionary()
        )
        self._watches: weakref.WeakKeyDictionary[nn.Module, ModelWatch] = (
            weakref.WeakKeyDictionary()
        )
        self._decoding: weakref.WeakKeyDictionary[nn.Module, tuple[ModelWatch, PrefixKey]] = (
            weakref.WeakKeyDictionary()
        )
        self._obstacles: weakref.WeakKeyDictionary[nn.Module, tuple[PrefixKey, str | None]] = (
            weakref.WeakKeyDictionary()
        )

    def key_of(self, model: nn.Module, *, samples: bool = True) -> tuple[PrefixKey, str | None]:
        """Return whose prompts may share blocks now, or a reason why none may.

        `samples` as in `ModelWatch.look`. O(modules + weights).
        """
        watch = self._watches.get(model)
        if watch is None:
            watch = self._watches.setdefault(model, ModelWatch(model))
        state = watch.look(samples=samples)
        return PrefixKey(self._namespaces.current, str(state.version)), state.doubt

    def decoding_watch(self, model: nn.Module, key: PrefixKey) -> tuple[ModelWatch, bool]:
        """Return the watch over `model` while it decodes, and whether it may be out of date. O(1).

        transformers chooses other settings while a model decodes: how experts are computed. So
        prompts and decoding have a watch each. That of decoding is out of date if it was last
        asked for under another `key`, which names the model's version.
        """
        watch, before = self._decoding.get(model, (None, None))
        if watch is None:
            watch = ModelWatch(model, has_parts=True)
        self._decoding[model] = watch, key
        return watch, before != key

    def _row_obstacle(self, model: nn.Module, key: PrefixKey) -> str | None:
        """Name what may treat rows by their place: `hooks.row_dependence`. O(1) if nothing changed.

        All that it reads is part of the version that `key` names.
        """
        before, obstacle = self._obstacles.get(model, (None, None))
        if before != key:
            obstacle = row_dependence(model)
            self._obstacles[model] = key, obstacle
        return obstacle

    def prompt(self, model: nn.Module, ids: Tensor, padding: Padding) -> Prompt | str:
        """The batch's prompts, of the model as it is and of the namespace of now. O(tokens).

        Returns a reason instead if the model's state, or what it does with rows, cannot be told.
        """
        key, doubt = self.key_of(model)
        if doubt is not None:
            return f"a model that may change undetected ({doubt})"
        obstacle = self._row_obstacle(model, key)
        if obstacle is not None:
            return obstacle
        rows = [row[pad:] for row, pad in zip(_to_int32(ids), padding, strict=True)]
        return Prompt(rows, key)

    def known(self, model: nn.Module, cache: PagedCache, prompt: Prompt) -> Int64:
        """Return how many tokens of each row are in the pool; at least one is new. O(tokens)."""
        pool = self._pool(model, cache)
        if pool is None:
            return np.zeros(len(prompt.rows), np.int64)
        return np.array([_known(pool, row, prompt.key) for row in prompt.rows], np.int64)

    def attach(self, model: nn.Module, cache: PagedCache, prompt: Prompt, padding: Padding) -> None:
        """Let the cache begin with what earlier calls computed, and publish what this one does.

        One that has begun so already begins again where there is more to find now.
        """
        group = cache.groups[0]
        if group.num_columns:
            if int((padding + self.known(model, cache, prompt)).min()) <= group.num_columns:
                return
            cache.reset()
        group.columns.padding, group.prompt = padding, prompt
        pool = self._pool(model, cache)
        if pool is not None:
            _reuse(cache, self._layouts[model], pool, prompt, padding)

    def await_turn(self, model: nn.Module, cache: PagedCache) -> None:
        """Wait for other calls if memory is short, before the cache takes cached blocks."""
        if self._pool(model, cache) is not None:
            cache.memory.await_turn(self._layouts[model].kinds[0])

    def _pool(self, model: nn.Module, cache: PagedCache) -> PagedPool | None:
        """Return the pool of the model's prompts; None without any, or for an unlike cache."""
        home = self._layouts.get(model)
        if home is None or len(home.kinds) != len(cache.paged_layers()):
            return None
        return cache.memory.find_pool(home.layout)

    def publish(self, model: nn.Module, cache: PagedCache) -> None:
        """The prompt has been computed: its full blocks may be reused. O(blocks)."""
        group, layers = cache.groups[0], cache.paged_layers()
        kinds = [layer.kind for layer in layers if layer.kind is not None]
        # Some models change as they compute, such as those with a moving rotary base.
        # Without samples: what they would tell is told before anything is reused.
        now = self.key_of(model, samples=False)
        unchanged = group.prompt is not None and now == (group.prompt.key, None)
        if unchanged and cache.is_fully_paged and len(kinds) == len(layers):
            group.commit()
            self._layouts[model] = _PoolLayout(group.layout, kinds)
        else:
            group.prompt = None  # what follows is not reusable either


def reply(
    original: Callable[..., Any], prompts: PromptCache, model: Any, *args: Any, **kwargs: Any
) -> Any:
    """`GenerationMixin._sample` for an empty paged cache, whose tokens are heard and published.

    Within transformers' own decoding loop keys and values follow from the tokens, as those of a
    prompt do; so a later prompt that repeats the reply, the next turn of a chat, finds its blocks.
    After the loop the caller may change the cache, so no token is known from then on.
    """
    cache: Any = cache_in(kwargs)
    processors, streamer = kwargs["logits_processor"], kwargs.get("streamer")
    criteria = kwargs.get("stopping_criteria") or ()
    is_thorough = any(map(_is_callers, [*processors, *criteria, streamer]))
    lookout = _ModelChangeGuard(cache, prompts, model, is_thorough)
    kwargs["logits_processor"] = LogitsProcessorList([lookout, *processors])
    kwargs["streamer"] = _TokenStreamer(cache, streamer)
    try:
        result = original(model, *args, **kwargs)
        if cache.groups and cache.groups[0].prompt is not None:
            prompts.publish(model, cache)
    finally:
        for group in cache.groups:
            group.prompt = None
    return result


def _is_callers(each: object) -> bool:
    """True for a processor, criterion or streamer that runs code of the caller's."""
    home = type(each).__module__
    return not is_library(home) or isinstance(each, PrefixConstrainedLogitsProcessor)


class _TokenStreamer:
    """A streamer that lets a cache know which tokens were chosen, and passes them on."""

    def __init__(self, cache: PagedCache, inner: Any) -> None:
        self._cache = cache
        self._inner = inner

    def put(self, tokens: Tensor) -> None:
        """The next token of each row, [rows]: they have been chosen, but not computed yet."""
        for group in self._cache.groups:
            group.note_next(_to_int32(tokens.reshape(-1)))
        if self._inner is not None:
            self._inner.put(tokens)

    def end(self) -> None:
        """There are no more."""
        if self._inner is not None:
            self._inner.end()


class _ModelChangeGuard(LogitsProcessor):
    """Stops keeping a reply if the model that computes it changes, even if it changes back.

    It stands before all other processors: of what a caller may hook into a step, nothing runs
    between the forward pass and it.
    """

    def __init__(
        self, cache: PagedCache, prompts: PromptCache, model: nn.Module, is_thorough: bool
    ) -> None:
        self._cache, self._is_thorough = cache, is_thorough
        self._prompts, self._model = prompts, model
        self._before: ModelState | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Compare the model with what it was after the first pass.

        All of it is compared if code of the caller's runs between passes, which may change it.
        Otherwise only another thread may, and a part is compared, another one each time.
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
                    "reply not kept: a change of the model in the middle of it"
                )
            self._before = now
        return scores


class _PoolLayout(NamedTuple):
    """Where a model's keys and values are: the pool's layout, and each layer's kind."""

    layout: object
    kinds: list[LayerKind]


def _reuse(
    cache: PagedCache, home: _PoolLayout, pool: PagedPool, prompt: Prompt, padding: Padding
) -> None:
    # Meanwhile no other cache takes what was found, and no interrupt loses it.
    with pool.lock, pool.uninterrupted:
        # A batch has one length: what the row with the least to offer has in common with the cache.
        known = [_known(pool, row, prompt.key) for row in prompt.rows]
        num_columns = int((padding + known).min())
        if num_columns <= int(padding.min()):
            return
        lengths = np.maximum(num_columns - padding, 0).tolist()
        sequences = _begin_known(pool, prompt, lengths)
        if sequences is None:
            return
        cache.groups[0].adopt(home.layout, sequences, prompt.key, num_columns)
        for layer, kind in zip(cache.paged_layers(), home.kinds, strict=True):
            layer.bind(kind)
            layer.num_columns = num_columns


def _known(pool: PagedPool, row: Int32, key: PrefixKey) -> int:
    return min(pool.num_known(row, key), len(row) - 1)


def _begin_known(
    pool: PagedPool, prompt: Prompt, lengths: list[int]
) -> list[SequenceHandle] | None:
    """Sequences of the first `lengths` tokens of each row, which are in the pool; None if full."""
    sequences: list[SequenceHandle] = []
    for row, length in zip(prompt.rows, lengths, strict=True):
        try:
            # One token more, because the last one never counts as known.
            sequences.append(pool.allocate(row[: length + 1], prompt.key))
        except OutOfBlocks:
            break
        if sequences[-1].num_cached_tokens < length:  # the room for a copy was taken from it
            break
        pool.manager.truncate(sequences[-1], length)
    else:
        return sequences
    pool.manager.free(sequences)
    return None


def _to_int32(ids: Tensor) -> Int32:
    return ids.cpu().numpy().astype(np.int32)
