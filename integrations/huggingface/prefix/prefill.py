"""Prefill of `generate`: use the prompt's ids and mask, which a cache never sees.

`Cache.update` gets keys and values only. Here the prompt's ids and mask are known, so that

- left padding takes no blocks;
- rows that beams or `num_return_sequences` repeat are computed once and forked;
- with prefix caching, blocks that an earlier call of the same model wrote are shared.

Each of these applies only to inputs that it is known to be right for. All other inputs take
transformers' own path.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpager.integrations.huggingface.cache.columns import ExpectedPrompt, UnexpectedColumns
from kvpager.integrations.huggingface.cache.generate_calls import Prompts
from kvpager.integrations.huggingface.cache.paged_cache import PagedCache
from kvpager.integrations.huggingface.cache.prompt import Prompt
from kvpager.integrations.huggingface.model_state.row_independence import row_dependence
from kvpager.integrations.huggingface.prefix.obstacles import prefix_obstacle, row_merge_obstacle
from kvpager.integrations.huggingface.prefix.prefill_batches import prefill_batches
from kvpager.integrations.huggingface.prefix.prefill_inputs import Padding, PrefillInputs
from kvpager.integrations.huggingface.prefix.prompt_cache import PromptCache
from kvpager.integrations.huggingface.releases import set_cache_of, with_cache

Prefill = Callable[..., Any]


def prefill(
    original: Prefill, prompts: PromptCache | None, inputs: PrefillInputs, **kwargs: Any
) -> Any:
    """Run `GenerationMixin._prefill` for an empty paged cache. Return the model's output.

    If it raises, the cache is empty again.
    """
    cache, compute = inputs.cache, functools.partial(original, **kwargs)
    for group in cache.groups:
        group.reset()  # a batch that was cropped to no columns still has rows
    padding = inputs.left_padding()
    reason = "an attention_mask that hides more than left padding"
    try:
        if padding is not None:
            try:
                return _prefill_padded(compute, prompts, padding, inputs)
            except UnexpectedColumns:
                cache.reset()
                cache.memory.calls.note_prompts(None)
                reason = "a model that adds columns to its prompt, or drops some"
        if prompts is not None:
            cache.memory.note_not_kept(reason)
        return compute(*inputs)
    except BaseException:
        cache.reset()
        raise
    finally:
        for group in cache.groups:
            group.columns.announced = None


def _prefill_padded(
    compute: Prefill, prompts: PromptCache | None, padding: Padding, inputs: PrefillInputs
) -> Any:
    """Compute equal rows once, store no padding, and reuse blocks of earlier calls.

    Raises: `UnexpectedColumns` if the model does not write the prompt's columns.
    """
    cache: PagedCache = inputs.cache
    reason = row_merge_obstacle(cache, inputs)
    repeats = _repeats(cache, inputs, reason)
    if repeats > 1:
        inputs, padding = inputs.of_rows(slice(None, None, repeats)), padding[::repeats]
    rows, columns = inputs.ids.shape[:2]
    cache.memory.calls.note_prompts(Prompts(padding, columns, repeats))
    per_pass = inputs.generation_config.prefill_chunk_size or columns
    announced = ExpectedPrompt(rows, columns, per_pass, is_binding=repeats > 1)
    for group in cache.groups:
        if group.holds_text:
            group.columns.padding, group.columns.announced = padding, announced
    prompt: Prompt | str | None = None
    if prompts is not None:
        reason = reason or prefix_obstacle(cache, inputs, padding)
        if reason is None:
            prompts.await_turn(inputs.model, cache)
            prompt = prompts.prompt(inputs.model, inputs.ids, padding)
    if isinstance(prompt, Prompt):
        assert prompts is not None
        output = _prefill_new(compute, prompts, prompt, padding, announced, inputs)
    else:
        output = compute(*inputs)
        if repeats > 1:
            _check_written(cache, columns)
        if prompts is not None:
            cache.memory.note_not_kept(prompt or reason, warns=reason is None)
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)
        _repeat_rows(output, rows, repeats)
    return output


def _repeats(cache: PagedCache, inputs: PrefillInputs, reason: str | None) -> int:
    """Return how many equal rows to compute as one; 1 for no merging, which the report explains."""
    repeats = inputs.repeats()
    if repeats > 1 and reason is None:
        reason = row_dependence(inputs.model)
    if repeats > 1 and reason is not None:
        cache.memory.note_fallback(f"equal rows not merged: {reason}")
        return 1
    return repeats


def _check_written(cache: PagedCache, columns: int) -> None:
    """Raise `UnexpectedColumns` unless the model wrote the prompt to this cache. O(groups)."""
    lengths = {group.num_columns for group in cache.groups if group.num_columns}
    if lengths != {columns}:
        raise UnexpectedColumns(f"the cache holds {sorted(lengths)} columns of {columns}")


def _prefill_new(
    compute: Prefill,
    prompts: PromptCache,
    prompt: Prompt,
    padding: Padding,
    announced: ExpectedPrompt,
    inputs: PrefillInputs,
) -> Any:
    """Compute the new tokens of each row, in the cheapest division into passes."""
    model, cache = inputs.model, inputs.cache
    if prompts.tiers is not None:
        prompts.tiers.fetch(prompt)
    passes = prefill_batches(prompt.rows, prompts.known(model, cache, prompt))
    if len(passes) == 1:
        return _compute_pass(compute, prompts, prompt, padding, announced, inputs)
    parts = [copy.deepcopy(cache) for _ in passes]
    skipped = [int(padding[rows].min()) for rows in passes]
    # Attach all cached prefixes first: the first pass could otherwise evict those of later passes.
    for part, rows, first in zip(parts, passes, skipped, strict=True):
        prompts.attach(model, part, prompt.of(rows), padding[rows] - first)
    outputs = []
    for part, rows, first in zip(parts, passes, skipped, strict=True):
        columns = announced.columns - first
        expected = ExpectedPrompt(len(rows), columns, columns, is_binding=True)
        of_pass = inputs.of_rows((torch.from_numpy(rows).to(inputs.ids.device), slice(first, None)))
        of_pass = of_pass._replace(model_kwargs=with_cache(of_pass.model_kwargs, part))
        known = prompts, prompt.of(rows), padding[rows] - first
        outputs.append(_compute_pass(compute, *known, expected, of_pass))
    order = np.argsort(np.concatenate(passes))
    cache.join(parts, order, padding)
    outputs[0].logits = torch.cat([output.logits[:, -1:] for output in outputs])[order]
    set_cache_of(outputs[0], cache)
    return outputs[0]


def _compute_pass(
    compute: Prefill,
    prompts: PromptCache,
    prompt: Prompt,
    padding: Padding,
    announced: ExpectedPrompt,
    inputs: PrefillInputs,
) -> Any:
    model, cache = inputs.model, inputs.cache
    prompts.attach(model, cache, prompt, padding)
    (group,) = cache.groups
    is_binding = announced.is_binding or group.num_columns > 0
    group.columns.announced = announced._replace(is_binding=is_binding)
    counters = group.memory.counters
    counters.prefix_query_tokens += sum(map(len, prompt.rows))
    counters.prefix_hit_tokens += int(group.columns.lengths(group.num_columns).sum())
    output = compute(*inputs)
    if is_binding:
        _check_written(cache, announced.columns)
    prompts.publish(model, cache)
    return output


def _repeat_rows(output: Any, num_rows: int, repeats: int) -> None:
    for name, value in list(output.items()):
        if isinstance(value, Tensor) and value.dim() and len(value) == num_rows:
            output[name] = value.repeat_interleave(repeats, dim=0)
