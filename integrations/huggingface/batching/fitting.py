"""Which way to compute rows a model is right with: tried, since nothing else tells."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface import attention
from kvpager.integrations.huggingface.batching.anatomy import Anatomy, plain_cache
from kvpager.integrations.huggingface.batching.runner import Runner, trial_plan
from kvpager.integrations.huggingface.memory import PagedMemory
from kvpager.integrations.huggingface.packed import CannotPack
from kvpager.storage import BlockStorage

logger = logging.getLogger("kvpager")

# How far logits of a packed pass may be from those of single ones, by their norm: rounding.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_16_BITS = 0.05
_BLOCK_SIZE = 4  # of the trial: rows of more than one block


class _Found(NamedTuple):
    """A model as it was before the first engine."""

    attention: str
    was_training: bool
    users: list[object]


_lock = threading.Lock()
_found: weakref.WeakKeyDictionary[Any, _Found] = weakref.WeakKeyDictionary()


class ModelSwitch:
    """A model in evaluation mode, with an attention that may be ours, while engines use it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        with _lock:
            found = _found.get(model)
            if found is None:
                found = _Found(model.config._attn_implementation, model.training, [])
                _found[model] = found
            found.users.append(self)
        self._original = found.attention
        model.eval()

    def to_ours(self) -> None:
        """Have the model call the attention that reads blocks in place, where it lets us choose."""
        attention.register()
        try:
            self._model.set_attn_implementation(attention.NAME)
        except ValueError:
            logger.info("%s has no attention to choose", type(self._model).__name__)

    def to_original(self) -> None:
        """Have it call what it did."""
        if self._model.config._attn_implementation != self._original:
            self._model.set_attn_implementation(self._original)

    def release(self) -> None:
        """The last to release leaves the model as the first one found it. Idempotent."""
        with _lock:
            found = _found.get(self._model)
            if found is None or self not in found.users:
                return
            found.users.remove(self)
            if found.users:
                return
            del _found[self._model]
        self.to_original()
        self._model.train(found.was_training)


def fit(
    model: Any, anatomy: Anatomy, memory: PagedMemory, switch: ModelSwitch, packed: bool | None
) -> bool:
    """Whether `model` may compute rows in one line; leaves the attention that is right with it.

    `packed` asks for one way, None takes the best there is. A few short passes.
    Raises: `KVPagerError` where no way is right.
    """
    name = type(model).__name__
    switch.to_ours()
    if packed is not False and _is_right(model, anatomy, memory, is_packed=True):
        return True
    if packed:
        raise KVPagerError(
            f"{name} computes rows differently in one line of tokens; leave packed=None, and it "
            "computes them one by one"
        )
    if not _is_right(model, anatomy, memory, is_packed=False):
        switch.to_original()
        if not _is_right(model, anatomy, memory, is_packed=False):
            raise KVPagerError(
                f"{name} cannot be batched continuously: a sequence comes out differently when "
                "another is computed between its tokens; use generate() for it"
            )
    return False


@torch.inference_mode()
def _is_right(model: Any, anatomy: Anatomy, memory: PagedMemory, *, is_packed: bool) -> bool:
    """Whether rows come out as the model computes each by itself.

    Two rows of unlike lengths, a step of many tokens and one of single ones.
    """
    if is_packed and not anatomy.may_be_packed:
        return False
    prompts = [_some_ids(anatomy, 5, 0), _some_ids(anatomy, 8, 1)]
    tables = np.array([[3, 0], [1, 2]], np.int32)
    storage = BlockStorage(
        4,
        _BLOCK_SIZE,
        [layer.shape for layer in anatomy.layers],
        dtype=anatomy.dtype,
        device=anatomy.device,
    )
    runner = Runner(model, anatomy, storage, memory, is_packed=is_packed)
    before = np.zeros(2, np.int32)
    try:
        for counts in (np.array([len(prompt) - 1 for prompt in prompts]), np.array([1, 1])):
            plan = trial_plan(prompts, before, counts, tables, storage)
            logits = runner.run(plan, dict(enumerate(prompts)))
            before = before + counts.astype(np.int32)
    except CannotPack:
        return False
    for prompt, found in zip(prompts, logits, strict=True):
        alone = _alone(model, anatomy, prompt)
        difference = (found.float() - alone).norm() / alone.norm()
        if not difference <= _TOLERANCE.get(anatomy.dtype, _TOLERANCE_16_BITS):  # a NaN too
            return False
    return True


def _alone(model: Any, anatomy: Anatomy, prompt: list[int]) -> Tensor:
    """The logits after `prompt`, its last token computed over transformers' own cache."""
    ids = torch.tensor([prompt], device=anatomy.device)
    cache: Any = plain_cache(model)
    options: dict[str, Any] = {}
    if anatomy.is_encoder_decoder:
        cache = EncoderDecoderCache(cache, DynamicCache())
        options["encoder_outputs"] = model.get_encoder()(input_ids=ids)
    name = "decoder_input_ids" if anatomy.is_encoder_decoder else "input_ids"
    for start, stop in ((0, len(prompt) - 1), (len(prompt) - 1, len(prompt))):
        if not anatomy.is_encoder_decoder:  # as `generate` has it
            said = {
                "attention_mask": torch.ones_like(ids[:, :stop]),
                "position_ids": torch.arange(start, stop, device=ids.device)[None],
            }
            options = {key: said[key] for key in said.keys() & anatomy.arguments}
        part = {name: ids[:, start:stop]}
        options[anatomy.cache_name] = cache
        output = model(**part, use_cache=True, **options)
    logits: Tensor = output.logits[0, -1].float()
    return logits


def _some_ids(anatomy: Anatomy, count: int, seed: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, anatomy.vocabulary, count).tolist()
    return ids
