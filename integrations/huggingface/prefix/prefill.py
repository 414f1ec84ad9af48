"""What the start of `generate` knows and a cache never sees: padding, equal prompts, token ids.

`Cache.update` is given keys and values only. Here, where the prompt's ids and mask are at hand:

- left padding is noted, so that it takes no blocks;
- rows that beams or `num_return_sequences` repeat are computed once and forked;
- with prefix caching, blocks that an earlier call of the same model wrote are shared.

Each is done only where the inputs are plainly of the kind it understands; anything else goes
through as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvpager.integrations.huggingface.cache.columns import Announced, Unannounced
from kvpager.integrations.huggingface.cache.groups import LayerGroup, Prompt
from kvpager.integrations.huggingface.cache.paged_cache import PagedCache
from kvpager.integrations.huggingface.model_state.hooks import row_obstacle
from kvpager.integrations.huggingface.prefix.obstacles import PER_ROW, why_not_by_row, why_not_kept
from kvpager.integrations.huggingface.prefix.prompts import Padding, PromptCache
from kvpager.integrations.huggingface.prefix.waves import waves
from kvpager.integrations.huggingface.releases import (
    cache_in,
    set_cache_of,
    with_cache,
)

Prefill = Callable[..., Any]


def prefill(
    original: Prefill,
    prompts: PromptCache | None,
    model: nn.Module,
    input_ids: Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    **kwargs: Any,
) -> Any:
    """`GenerationMixin._prefill` for an empty paged cache. Returns the model's output.

    Should it fail, the cache is empty again.
    """
    cache: Any = cache_in(model_kwargs)
    for group in cache.groups:
        group.reset()  # rows may be left of a batch that was cropped to nothing
    padding = _left_padding(input_ids, model_kwargs.get("attention_mask"))
    given = (model, input_ids, generation_config, model_kwargs)
    reason = "an attention_mask that hides more than padding before the prompts"
    try:
        if padding is not None:
            try:
                return _prefill_padded(original, prompts, padding, *given, **kwargs)
            except Unannounced:
                cache.reset()
                reason = "a model that writes other columns than those of its prompt"
        if prompts is not None:
            cache.memory.counters.prefix_unserved_calls += 1
            cache.memory.note_unserved(f"prompts not kept: {reason}")
        return original(*given, **kwargs)
    except BaseException:
        cache.reset()
        raise
    finally:
        for group in cache.groups:
            group.announced = None


def _prefill_padded(
    original: Prefill,
    prompts: PromptCache | None,
    padding: Padding,
    model: nn.Module,
    input_ids: Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    **kwargs: Any,
) -> Any:
    """Compute equal rows once, store no padding, and reuse what earlier calls computed.

    Raises: `Unannounced` where that is wrong for this model.
    """
    cache: PagedCache = cache_in(model_kwargs)
    reason = why_not_by_row(model, cache, input_ids, generation_config, model_kwargs)
    repeats = _repeats(input_ids, generation_config, model_kwargs)
    if reason is not None and repeats > 1:
        cache.memory.note_unserved(f"equal rows not merged: {reason}")
        repeats = 1
    if repeats > 1 and (obstacle := row_obstacle(model)) is not None:
        cache.memory.note_unserved(f"equal rows not merged: {obstacle}")
        repeats = 1
    if repeats > 1:
        input_ids, padding = input_ids[::repeats], padding[::repeats]
        model_kwargs = _of_rows(model_kwargs, slice(None, None, repeats))
    rows, columns = input_ids.shape[:2]
    announced = Announced(rows, columns, generation_config.prefill_chunk_size or columns)
    announced = announced._replace(is_binding=repeats > 1)
    for group in cache.groups:
        if group.holds_text:
            group.announce(padding, announced)
    given = (model, input_ids, generation_config, model_kwargs)
    prompt: Prompt | str | None = None
    if prompts is not None and reason is None:
        reason = why_not_kept(model, cache, input_ids, generation_config, model_kwargs, padding)
    if prompts is not None and reason is None:
        prompts.await_turn(model, cache)
        prompt = prompts.prompt(model, input_ids, padding)
    if isinstance(prompt, str):
        cache.memory.note_doubt(prompt)
    elif prompts is not None and prompt is not None:
        obstacle = prompts.row_obstacle(model, prompt)
        if obstacle is not None:
            cache.memory.note_obstacle(obstacle)
            prompt = None
    if prompts is not None and isinstance(prompt, Prompt):
        output = _prefill_new(original, prompts, prompt, padding, announced, *given, **kwargs)
    else:
        output = original(*given, **kwargs)
        if repeats > 1:
            _check_written(cache, columns)
        if prompts is not None:
            cache.memory.counters.prefix_unserved_calls += 1
        if prompts is not None and reason is not None:
            cache.memory.note_unserved(f"prompts not kept: {reason}")
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)
        _repeat_rows(output, len(input_ids), repeats)
    return output


def _check_written(cache: PagedCache, columns: int) -> None:
    """Raise `Unannounced` unless the prompt is in the cache, a model may have used another one."""
    lengths = {group.num_columns for group in cache.groups if group.num_columns}
    if lengths != {columns}:
        raise Unannounced(f"the cache holds {sorted(lengths)} columns of {columns}")


def _prefill_new(
    original: Prefill,
    prompts: PromptCache,
    prompt: Prompt,
    padding: Padding,
    announced: Announced,
    model: nn.Module,
    input_ids: Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    **kwargs: Any,
) -> Any:
    """Compute what is new in each row, in as many passes as are worth it."""
    cache: Any = cache_in(model_kwargs)
    passes = waves(prompt.rows, prompts.known(model, cache, prompt))
    if len(passes) == 1:
        prompts.attach(model, cache, prompt, padding)
        (group,) = cache.groups
        known = group.num_columns > 0
        group.announced = announced._replace(is_binding=announced.is_binding or known)
        _count_hits(group, prompt)
        output = original(model, input_ids, generation_config, model_kwargs, **kwargs)
        if group.announced is not None and group.announced.is_binding:
            _check_written(cache, announced.columns)
        prompts.publish(model, cache)
        return output
    parts = [copy.deepcopy(cache) for _ in passes]
    skipped = [int(padding[rows].min()) for rows in passes]
    # All hold what they know before the first one may need room.
    for part, rows, first in zip(parts, passes, skipped, strict=True):
        prompts.attach(model, part, prompt.of(rows), padding[rows] - first)
    outputs = []
    for part, rows, first in zip(parts, passes, skipped, strict=True):
        prompts.attach(model, part, prompt.of(rows), padding[rows] - first)
        columns = announced.columns - first
        (group,) = part.groups
        group.announced = Announced(len(rows), columns, columns, is_binding=True)
        _count_hits(group, prompt.of(rows))
        here = torch.from_numpy(rows).to(input_ids.device)
        of_rows = with_cache(_of_rows(model_kwargs, (here, slice(first, None))), part)
        outputs.append(
            original(model, input_ids[here, first:], generation_config, of_rows, **kwargs)
        )
        _check_written(part, columns)
        prompts.publish(model, part)
    order = np.argsort(np.concatenate(passes))
    cache.join(parts, order, padding)
    outputs[0].logits = torch.cat([output.logits[:, -1:] for output in outputs])[order]
    set_cache_of(outputs[0], cache)
    return outputs[0]


def _count_hits(group: LayerGroup, prompt: Prompt) -> None:
    counters = group.memory.counters
    counters.prefix_query_tokens += sum(map(len, prompt.rows))
    counters.prefix_hit_tokens += int(group.lengths(group.num_columns).sum())


def _of_rows(model_kwargs: dict[str, Any], rows: Any) -> dict[str, Any]:
    """The same with what is given per row for these rows (and columns) only."""
    return {
        name: value[rows] if name in PER_ROW and value is not None else value
        for name, value in model_kwargs.items()
    }


def returned_rows(generation_config: Any) -> int:
    """Return how many rows `generate` makes of each prompt: beams, or samples. O(1)."""
    return int(max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1))


def _repeats(input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> int:
    """How many equal rows stand behind one another, as `generate` expands them; 1 for none."""
    repeats = returned_rows(generation_config)
    if repeats == 1 or len(input_ids) % repeats:
        return 1
    for tensor in (input_ids, *(model_kwargs.get(name) for name in PER_ROW)):
        if tensor is not None and not torch.equal(
            tensor[::repeats].repeat_interleave(repeats, dim=0), tensor
        ):
            return 1
    return repeats


def _left_padding(input_ids: Tensor, mask: Tensor | None) -> Padding | None:
    """Padding columns before each row's first token; None where the mask is not plainly that."""
    rows, columns = input_ids.shape[:2]
    if mask is None:
        return np.zeros(rows, np.int64)
    if mask.shape != (rows, columns):
        return None
    here = mask.cpu().numpy() != 0
    padding = here.argmax(axis=1)
    behind = np.arange(columns) >= padding[:, None]
    left_padded = (here == behind).all() and here.any(axis=1).all()
    return padding if left_padded else None


def _repeat_rows(output: Any, num_rows: int, repeats: int) -> None:
    for name, value in list(output.items()):
        if isinstance(value, Tensor) and value.dim() and len(value) == num_rows:
            output[name] = value.repeat_interleave(repeats, dim=0)
