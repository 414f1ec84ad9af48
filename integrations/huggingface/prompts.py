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
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kvpager.errors import OutOfBlocks
from kvpager.integrations.huggingface.cache import PagedCache
from kvpager.integrations.huggingface.groups import Int32, LayerGroup, Prompt
from kvpager.integrations.huggingface.offloaded import offloaded
from kvpager.integrations.huggingface.pools import LayerKind, PagedPool
from kvpager.integrations.huggingface.waves import waves
from kvpager.sequences import Sequence

Prefill = Callable[..., Any]

# What `model_kwargs` may hold where a row's keys and values follow from its ids and padding. With
# anything else in play, rows are neither merged nor reused.
_PER_ROW = {"attention_mask", "position_ids"}
_HARMLESS = {
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "return_dict",
    "output_attentions",  # these two are looked at more closely
    "output_hidden_states",
}

# Numbers looked at per weight tensor to notice that it was written.
_SAMPLES = 16


# What `PromptCache.chosen` has chosen, the last for each prompt cache holds.
_chosen: ContextVar[tuple[tuple[object, str], ...]] = ContextVar("kvpager_namespaces", default=())


class PromptCache:
    """Which pool each model's prompts are in, and under which namespace."""

    def __init__(self, namespace: str | None) -> None:
        self._namespace = namespace
        self._homes: weakref.WeakKeyDictionary[nn.Module, _Home] = weakref.WeakKeyDictionary()
        self._states: weakref.WeakKeyDictionary[nn.Module, tuple[object, int]] = (
            weakref.WeakKeyDictionary()
        )
        self._versions = itertools.count()

    @property
    def namespace(self) -> str | None:
        """The namespace of calls made here: the one chosen around them, else the patch's."""
        chosen = (name for prompts, name in reversed(_chosen.get()) if prompts is self)
        return next(chosen, self._namespace)

    @contextmanager
    def chosen(self, namespace: str) -> Iterator[None]:
        """Calls made within are of `namespace`: of this thread, or of this asyncio task."""
        token = _chosen.set((*_chosen.get(), (self, namespace)))
        try:
            yield
        finally:
            _chosen.reset(token)

    def namespace_of(self, model: nn.Module) -> str:
        """A name that changes when the model visibly does, see `_model_state`. O(parameters)."""
        state = _model_state(model)
        known = self._states.get(model)
        if known is None or known[0] != state:
            known = self._states[model] = (state, next(self._versions))
        # The length in front keeps a namespace's own digits apart from the version.
        name = self.namespace or ""
        return f"{len(name)}:{name}:{known[1]}"

    def prompt(self, model: nn.Module, ids: Tensor, padding: Padding) -> Prompt:
        """The batch's prompts, of the model as it is and of the namespace of now. O(tokens)."""
        rows = [row[pad:] for row, pad in zip(_to_int32(ids), padding, strict=True)]
        return Prompt(rows, self.namespace_of(model))

    def known(self, model: nn.Module, cache: PagedCache, prompt: Prompt) -> NDArray[np.int64]:
        """How many tokens of each row are in the pool, one at least being new. O(tokens)."""
        pool = self._pool(model, cache)
        if pool is None:
            return np.zeros(len(prompt.rows), np.int64)
        return np.array([_known(pool, row, prompt.namespace) for row in prompt.rows], np.int64)

    def attach(self, model: nn.Module, cache: PagedCache, prompt: Prompt, padding: Padding) -> None:
        """Let the cache begin with what earlier calls computed, and publish what this one does.

        One that has begun so already begins again where there is more to find now.
        """
        group = cache.groups[0]
        if group.num_columns:
            if int((padding + self.known(model, cache, prompt)).min()) <= group.num_columns:
                return
            cache.reset()
        group.padding, group.prompt = padding, prompt
        pool = self._pool(model, cache)
        if pool is not None:
            _reuse(cache, self._homes[model], pool, prompt, padding)

    def _pool(self, model: nn.Module, cache: PagedCache) -> PagedPool | None:
        """Where the model's prompts are, if there are any and the cache is made like theirs."""
        home = self._homes.get(model)
        if home is None or len(home.kinds) != len(cache.paged_layers()):
            return None
        return cache.memory.find_pool(home.layout)

    def publish(self, model: nn.Module, cache: PagedCache) -> None:
        """The prompt has been computed: its full blocks may be reused. O(blocks)."""
        group, layers = cache.groups[0], cache.paged_layers()
        kinds = [layer.kind for layer in layers if layer.kind is not None]
        # Some models change as they compute, such as those with a moving rotary base.
        unchanged = group.prompt is not None and self.namespace_of(model) == group.prompt.namespace
        if unchanged and cache.is_fully_paged and len(kinds) == len(layers):
            group.commit()
            self._homes[model] = _Home(group.layout, kinds)
        else:
            group.prompt = None  # what follows is not reusable either


def reply(
    original: Callable[..., Any], prompts: PromptCache, model: Any, *args: Any, **kwargs: Any
) -> Any:
    """`GenerationMixin._sample` for an empty paged cache, whose tokens are heard and published.

    Within transformers' own decoding loop keys and values follow from the tokens, as those of a
    prompt do; so a later prompt that repeats the reply, the next turn of a chat, finds its blocks.
    What becomes of the cache afterwards nobody knows: no token is known from then on.
    """
    cache: PagedCache = kwargs["past_key_values"]
    kwargs["streamer"] = _Listener(cache, kwargs.get("streamer"))
    try:
        result = original(model, *args, **kwargs)
        if cache.groups and cache.groups[0].prompt is not None:
            prompts.publish(model, cache)
    finally:
        for group in cache.groups:
            group.prompt = None
    return result


class _Listener:
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


class _Home(NamedTuple):
    """Where a model's keys and values are: the pool's layout, and each layer's kind."""

    layout: object
    kinds: list[LayerKind]


Padding = NDArray[np.int64]


def _reuse(
    cache: PagedCache, home: _Home, pool: PagedPool, prompt: Prompt, padding: Padding
) -> None:
    # Meanwhile nobody may take what was found.
    with pool.lock:
        # A batch has one length: what the row with the least to offer has in common with the cache.
        known = [_known(pool, row, prompt.namespace) for row in prompt.rows]
        num_columns = int((padding + known).min())
        if num_columns <= int(padding.min()):
            return
        lengths = np.maximum(num_columns - padding, 0).tolist()
        sequences = _begin_known(pool, prompt, lengths)
    if sequences is None:
        return
    cache.groups[0].adopt(home.layout, sequences, num_columns)
    for layer, kind in zip(cache.paged_layers(), home.kinds, strict=True):
        layer.bind(kind)
        layer.num_columns = num_columns


def _known(pool: PagedPool, row: Int32, namespace: str) -> int:
    known = pool.manager.cached_tokens(row, namespace=namespace)
    return min(known, len(row) - 1)


def _begin_known(pool: PagedPool, prompt: Prompt, lengths: list[int]) -> list[Sequence] | None:
    """Sequences of the first `lengths` tokens of each row, which are in the pool; None if full."""
    sequences: list[Sequence] = []
    for row, length in zip(prompt.rows, lengths, strict=True):
        try:
            # One token more, because the last one never counts as known.
            sequences.append(pool.allocate(row[: length + 1], prompt.namespace))
        except OutOfBlocks:
            break
        if sequences[-1].num_cached_tokens < length:  # the room for a copy was taken from it
            break
        pool.manager.truncate(sequences[-1], length)
    else:
        return sequences
    pool.manager.free(sequences)
    return None


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
    cache: PagedCache = model_kwargs["past_key_values"]
    for group in cache.groups:
        group.reset()  # rows may be left of a batch that was cropped to nothing
    padding = _left_padding(input_ids, model_kwargs.get("attention_mask"))
    plain = padding is not None and _is_plain(model, input_ids, generation_config, model_kwargs)
    plain = plain and cache.is_fully_paged
    repeats = _repeats(input_ids, generation_config, model_kwargs) if plain else 1
    if repeats > 1:
        input_ids, padding = input_ids[::repeats], padding[::repeats]  # type: ignore[index]
        model_kwargs = _of_rows(model_kwargs, slice(None, None, repeats))
    reusable = False
    try:
        if padding is not None:
            for group in cache.groups:
                group.padding = padding
            reusable = plain and _is_reusable(model, cache, generation_config)
            positions = model_kwargs.get("position_ids")
            reusable = reusable and _are_usual(positions, input_ids, padding)
        if prompts is not None and padding is not None and reusable:
            given = (model, input_ids, generation_config, model_kwargs)
            output = _prefill_new(original, prompts, padding, *given, **kwargs)
        else:
            output = original(model, input_ids, generation_config, model_kwargs, **kwargs)
    except BaseException:
        cache.reset()
        raise
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)
        _repeat_rows(output, len(input_ids), repeats)
    return output


def _prefill_new(
    original: Prefill,
    prompts: PromptCache,
    padding: Padding,
    model: nn.Module,
    input_ids: Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    **kwargs: Any,
) -> Any:
    """Compute what is new in each row, in as many passes as are worth it."""
    cache: PagedCache = model_kwargs["past_key_values"]
    prompt = prompts.prompt(model, input_ids, padding)
    passes = waves(prompt.rows, prompts.known(model, cache, prompt))
    if len(passes) == 1:
        prompts.attach(model, cache, prompt, padding)
        _count_hits(cache.groups[0], prompt)
        output = original(model, input_ids, generation_config, model_kwargs, **kwargs)
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
        _count_hits(part.groups[0], prompt.of(rows))
        here = torch.from_numpy(rows).to(input_ids.device)
        of_rows = _of_rows(model_kwargs, (here, slice(first, None))) | {"past_key_values": part}
        outputs.append(
            original(model, input_ids[here, first:], generation_config, of_rows, **kwargs)
        )
        prompts.publish(model, part)
    order = np.argsort(np.concatenate(passes))
    cache.join(parts, order, padding)
    outputs[0].logits = torch.cat([output.logits[:, -1:] for output in outputs])[order]
    outputs[0].past_key_values = cache
    return outputs[0]


def _count_hits(group: LayerGroup, prompt: Prompt) -> None:
    counters = group.memory.counters
    counters.prefix_query_tokens += sum(map(len, prompt.rows))
    counters.prefix_hit_tokens += int(group.lengths(group.num_columns).sum())


def _of_rows(model_kwargs: dict[str, Any], rows: Any) -> dict[str, Any]:
    """The same with what is given per row for these rows (and columns) only."""
    return {
        name: value[rows] if name in _PER_ROW and value is not None else value
        for name, value in model_kwargs.items()
    }


def _is_plain(
    model: nn.Module, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
) -> bool:
    """Whether a row's keys and values follow from its ids, mask and positions alone."""
    # What a model keeps outside the cache is neither repeated nor reused with it.
    if getattr(model, "_is_stateful", False):
        return False
    # Dropout makes equal rows differ, and autocast computes in another dtype than was asked for.
    places = {tensor.device.type for tensor in (input_ids, *model.parameters())}
    if model.training or any(map(_is_autocast, places)):
        return False
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, name, False) or model_kwargs.get(name):
            return False
    given = {name for name, value in model_kwargs.items() if value is not None}
    if given - _PER_ROW - _HARMLESS:
        return False
    return all(model_kwargs[name].shape == input_ids.shape for name in given & _PER_ROW)


def _is_autocast(device_type: str) -> bool:
    # Offloaded weights are on "meta", for which torch does not answer the second question.
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _repeats(input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> int:
    """How many equal rows stand behind one another, as `generate` expands them; 1 for none."""
    repeats = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    if repeats == 1 or len(input_ids) % repeats:
        return 1
    for tensor in (input_ids, *(model_kwargs.get(name) for name in _PER_ROW)):
        if tensor is not None and not torch.equal(
            tensor[::repeats].repeat_interleave(repeats, dim=0), tensor
        ):
            return 1
    return int(repeats)


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


def _is_reusable(model: nn.Module, cache: PagedCache, generation_config: Any) -> bool:
    """Whether a prompt's beginning has the same keys and values whatever comes after it."""
    config: Any = model.config
    causal = not getattr(config, "use_bidirectional_attention", False)
    text_only = config.get_text_config(decoder=True) is config
    group = cache.groups[0]
    return (
        causal
        and text_only
        and not _rotation_moves(config)
        and len(cache.groups) == 1
        and group.window is None
        and group.num_layers is not None
        and generation_config.prefill_chunk_size is None
    )


def _rotation_moves(config: Any) -> bool:
    """Whether a key's rotation depends on how long its sequence gets (dynamic NTK, LongRoPE)."""
    settings = [getattr(config, name, None) or {} for name in ("rope_parameters", "rope_scaling")]
    settings += [nested for outer in settings for nested in outer.values() if _is_dict(nested)]
    kinds = [str(one.get("rope_type", one.get("type"))) for one in settings if _is_dict(one)]
    return any("dynamic" in kind or "longrope" in kind for kind in kinds)


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _are_usual(positions: Tensor | None, input_ids: Tensor, padding: Padding) -> bool:
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


def _model_state(model: nn.Module) -> object:
    """Changes when a weight is replaced, moved, cast or written, and when a module's hooks or plain
    settings (numbers, names, truth values: scales, active adapters) change. O(parameters).
    Weights that are offloaded count as what they are loaded from.

    A write through `.data` is seen only if it touches one of a few samples of the tensor, and code
    that computes differently for reasons of its own is not seen: `Patch.clear` is for those.
    """
    present = itertools.chain(model.parameters(), model.buffers())
    weights = [tensor for tensor in present if tensor.device.type != "meta"]
    elsewhere = list(offloaded(model))
    weights += [weight for weight in elsewhere if isinstance(weight, Tensor)]
    files = tuple(weight for weight in elsewhere if not isinstance(weight, Tensor))
    tensors = tuple(
        (id(tensor), tensor.data_ptr(), tensor.dtype, str(tensor.device), _version(tensor))
        for tensor in weights
    )
    modules = tuple(
        (
            tuple(module._forward_pre_hooks),
            tuple(module._forward_hooks),
            id(vars(module).get("_hf_hook")),
            tuple((name, repr(value)) for name, value in vars(module).items() if _plain(value)),
        )
        for module in model.modules()
    )
    attention = getattr(model.config, "_attn_implementation", None)
    return tensors, files, _sample(weights), modules, attention


def _plain(value: object, depth: int = 0) -> bool:
    """Whether `value` is a number or a name, or a small collection of those."""
    if isinstance(value, dict) and depth < 2:
        return all(_plain(item, depth + 1) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple) and depth < 2:
        return all(_plain(item, depth + 1) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _version(tensor: Tensor) -> int:
    # Inference tensors have no version; nothing can write to them outside inference mode.
    return -1 if tensor.is_inference() else tensor._version


def _sample(tensors: list[Tensor]) -> tuple[bytes, ...]:
    """A few numbers of each tensor: what is written through `.data` leaves no other trace."""
    by_device: dict[torch.device, list[Tensor]] = {}
    with torch.no_grad():
        for tensor in tensors:
            if tensor.numel() and tensor.is_contiguous():
                flat = tensor.detach().view(-1)
                few = flat[:: -(-flat.numel() // _SAMPLES)].to(torch.float64)
                by_device.setdefault(tensor.device, []).append(few)
        # As bytes: a NaN is not equal to itself.
        return tuple(torch.cat(few).cpu().numpy().tobytes() for few in by_device.values())
