"""What the start of `generate` knows and a cache never sees: padding, equal prompts, token ids.

`Cache.update` is given keys and values only. Here, where the prompt's ids and mask are at hand:

- left padding is noted, so that it takes no blocks;
- rows that beams or `num_return_sequences` repeat are computed once and forked;
- with prefix caching, blocks that an earlier call of the same model wrote are shared.

Each is done only where the inputs are plainly of the kind it understands; anything else goes
through as it is.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.cache import PagedCache
from kvpager.integrations.huggingface.groups import Prompt
from kvpager.integrations.huggingface.pools import PagedPool
from kvpager.sequences import Sequence

Prefill = Callable[..., Any]

# Tensors of `model_kwargs` that say nothing about a row's keys and values beyond its ids and
# padding. With any other one in play, rows are neither merged nor reused.
_UNDERSTOOD = {"attention_mask", "position_ids"}

# Numbers looked at per weight tensor to notice that it was written.
_SAMPLES = 16


class PromptCache:
    """Which pool each model's prompts are in, and under which namespace."""

    def __init__(self, namespace: str | None) -> None:
        self.namespace = namespace
        self._layouts: weakref.WeakKeyDictionary[nn.Module, object] = weakref.WeakKeyDictionary()
        self._weights: weakref.WeakKeyDictionary[nn.Module, tuple[object, int]] = (
            weakref.WeakKeyDictionary()
        )
        self._versions = itertools.count()

    def namespace_of(self, model: nn.Module) -> str:
        """A name that changes whenever the model's keys and values could. O(parameters)."""
        state = _weights_state(model)
        known = self._weights.get(model)
        if known is None or known[0] != state:
            known = self._weights[model] = (state, next(self._versions))
        # The length in front keeps a namespace's own digits apart from the version.
        name = self.namespace or ""
        return f"{len(name)}:{name}:{known[1]}"

    def attach(self, model: nn.Module, cache: PagedCache, ids: Tensor, padding: Padding) -> None:
        """Let the cache begin with what earlier calls computed, and publish what this one does."""
        group = cache.groups[0]
        rows = [row[pad:] for row, pad in zip(_to_int32(ids), padding, strict=True)]
        group.prompt = Prompt(rows, self.namespace_of(model))
        pool = cache.memory.find_pool(self._layouts.get(model))
        if pool is not None:
            _reuse(cache, pool, group.prompt, padding)

    def publish(self, model: nn.Module, cache: PagedCache) -> None:
        """The prompt has been computed: its full blocks may be reused. O(blocks)."""
        group = cache.groups[0]
        group.commit()
        if group.layout is not None:
            self._layouts[model] = group.layout


Padding = NDArray[np.int64]


def _reuse(cache: PagedCache, pool: PagedPool, prompt: Prompt, padding: Padding) -> None:
    rows, namespace = prompt.rows, prompt.namespace
    sequences: list[Sequence] = []
    try:
        for row in rows:
            sequences.append(pool.allocate(row, namespace))  # noqa: PERF401 - freed on failure
    except KVPagerError:
        pool.manager.free(sequences)
        raise
    # A batch has one length: what the row with the least to offer has in common with the cache.
    cached = padding + [sequence.num_cached_tokens for sequence in sequences]
    num_columns = int(cached.min())
    if num_columns <= int(padding.min()):
        pool.manager.free(sequences)
        return
    for sequence, pad in zip(sequences, padding.tolist(), strict=True):
        pool.manager.truncate(sequence, max(num_columns - pad, 0))
    cache.groups[0].adopt(pool, sequences, num_columns)
    for layer in cache.paged_layers():
        layer.num_columns = num_columns


def prefill(
    original: Prefill,
    prompts: PromptCache | None,
    model: nn.Module,
    input_ids: Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    **kwargs: Any,
) -> Any:
    """`GenerationMixin._prefill` for an empty paged cache. Returns the model's output."""
    cache: PagedCache = model_kwargs["past_key_values"]
    plain = _is_plain(input_ids, generation_config, model_kwargs, cache)
    repeats = _repeats(input_ids, generation_config, model_kwargs) if plain else 1
    if repeats > 1:
        input_ids = input_ids[::repeats]
        model_kwargs = {
            name: value[::repeats] if name in _UNDERSTOOD and value is not None else value
            for name, value in model_kwargs.items()
        }
    padding = _left_padding(input_ids, model_kwargs.get("attention_mask"))
    for group in cache.groups:
        group.padding = padding
    reusable = prompts is not None and plain and _is_reusable(cache, generation_config)
    if reusable and _has_usual_positions(input_ids, padding, model_kwargs.get("position_ids")):
        prompts.attach(model, cache, input_ids, padding)  # type: ignore[union-attr]
    output = original(model, input_ids, generation_config, model_kwargs, **kwargs)
    if prompts is not None and cache.groups and cache.groups[0].prompt is not None:
        prompts.publish(model, cache)
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)
        _repeat_rows(output, len(input_ids), repeats)
    return output


def _is_plain(
    input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], cache: PagedCache
) -> bool:
    """Whether a row's keys and values follow from its ids, mask and positions alone."""
    if not cache.is_fully_paged or input_ids.dim() != 2:
        return False
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, name, False) or model_kwargs.get(name):
            return False
    for name, value in model_kwargs.items():
        if isinstance(value, Tensor) and value.dim() and name not in _UNDERSTOOD:
            return False
    return all(
        value is None or value.shape == input_ids.shape
        for value in (model_kwargs.get(name) for name in _UNDERSTOOD)
    )


def _repeats(input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> int:
    """How many equal rows stand behind one another, as `generate` expands them; 1 for none."""
    repeats = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    if repeats == 1 or len(input_ids) % repeats:
        return 1
    for tensor in (input_ids, *(model_kwargs.get(name) for name in _UNDERSTOOD)):
        if tensor is not None and not torch.equal(
            tensor[::repeats].repeat_interleave(repeats, dim=0), tensor
        ):
            return 1
    return int(repeats)


def _left_padding(input_ids: Tensor, mask: Tensor | None) -> Padding:
    """Padding columns before each row's first token; zeros unless the mask is plainly that."""
    rows, columns = input_ids.shape[:2]
    none = np.zeros(rows, np.int64)
    if mask is None or mask.shape != (rows, columns):
        return none
    here = mask.cpu().numpy() != 0
    padding = here.argmax(axis=1)
    behind = np.arange(columns) >= padding[:, None]
    left_padded = (here == behind).all() and here.any(axis=1).all()
    return padding if left_padded else none


def _is_reusable(cache: PagedCache, generation_config: Any) -> bool:
    group = cache.groups[0]
    return (
        len(cache.groups) == 1
        and group.window is None
        and group.num_layers is not None
        and generation_config.prefill_chunk_size is None
    )


def _has_usual_positions(input_ids: Tensor, padding: Padding, positions: Tensor | None) -> bool:
    if positions is None:
        return not padding.any()
    columns = np.arange(input_ids.shape[1])
    tokens = columns >= padding[:, None]
    usual = columns - padding[:, None]
    return bool((positions.cpu().numpy() == usual)[tokens].all())


def _repeat_rows(output: Any, num_rows: int, repeats: int) -> None:
    for name, value in list(output.items()):
        if isinstance(value, Tensor) and value.dim() and len(value) == num_rows:
            output[name] = value.repeat_interleave(repeats, dim=0)


def _to_int32(ids: Tensor) -> NDArray[np.int32]:
    return ids.cpu().numpy().astype(np.int32)


def _weights_state(model: nn.Module) -> object:
    """Changes when a parameter is replaced, moved, cast or written, or an adapter is switched."""
    weights = list(itertools.chain(model.parameters(), model.buffers()))
    tensors = tuple(
        (id(tensor), tensor.data_ptr(), tensor.dtype, str(tensor.device), _version(tensor))
        for tensor in weights
    )
    adapters = tuple(
        (str(getattr(module, "active_adapters", None)), getattr(module, "disable_adapters", None))
        for module in model.modules()
        if hasattr(module, "active_adapters")
    )
    config = getattr(model, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    return tensors, _sample(weights), adapters, model.training, attention


def _version(tensor: Tensor) -> int:
    # Inference tensors have no version; nothing can write to them outside inference mode.
    return -1 if tensor.is_inference() else tensor._version


def _sample(tensors: list[Tensor]) -> tuple[float, ...]:
    """A few numbers of each tensor: what is written through `.data` leaves no other trace."""
    by_device: dict[torch.device, list[Tensor]] = {}
    with torch.no_grad():
        for tensor in tensors:
            if tensor.numel() and tensor.is_contiguous() and tensor.device.type != "meta":
                flat = tensor.detach().view(-1)
                few = flat[:: -(-flat.numel() // _SAMPLES)].to(torch.float64)
                by_device.setdefault(tensor.device, []).append(few)
        return tuple(x for few in by_device.values() for x in torch.cat(few).tolist())
