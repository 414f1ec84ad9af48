"""Probe which forward pass a model computes correctly: packed, or one for each sequence."""

from __future__ import annotations

import copy
import logging
import os
import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from kvpager._atomic import Uninterrupted, new_lock
from kvpager.engine.config import Forward
from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.attention import functions as attention
from kvpager.integrations.huggingface.attention.packed import CannotPack
from kvpager.integrations.huggingface.cache.budget import Budget
from kvpager.integrations.huggingface.releases import CACHE_NAMES
from kvpager.integrations.huggingface.runner.model_info import ModelInfo, plain_cache
from kvpager.integrations.huggingface.runner.model_runner import ModelRunner, trial_plan
from kvpager.storage.block_storage import BlockStorage

logger = logging.getLogger("kvpager")

# Largest relative difference in norm between logits of a probe and of `generate`: rounding.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_16_BITS = 0.05
_BLOCK_SIZE = 4  # small, so that the rows of the probe take more than one block


class _Found(NamedTuple):
    """The settings that a model had before its first engine."""

    attention: str
    was_training: bool
    users: list[object]

    def restore(self, model: Any) -> None:
        """Restore the settings of `model`. O(modules)."""
        if model.config._attn_implementation != self.attention:
            model.set_attn_implementation(self.attention)
        model.train(self.was_training)


_lock = new_lock()
_uninterrupted = Uninterrupted(_lock)
_found: weakref.WeakKeyDictionary[Any, _Found] = weakref.WeakKeyDictionary()


def _leave_behind() -> None:
    """Restore the models of the parent's engines in a forked process, where no engine runs."""
    for model, found in list(_found.items()):
        found.restore(model)
    _found.clear()


os.register_at_fork(after_in_child=_leave_behind)


class AttentionSwitch:
    """The evaluation mode and the attention of a model while engines use it."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def acquire(self) -> None:
        """Set evaluation mode. The first user saves the model's settings for `release`."""
        model = self._model
        with _lock, _uninterrupted:
            found = _found.get(model)
            if found is None:
                found = _Found(model.config._attn_implementation, model.training, [])
                _found[model] = found
            found.users.append(self)
        self._original = found.attention
        model.eval()

    def to_paged(self) -> None:
        """Choose the attention that reads blocks in place, if the model lets users choose."""
        attention.register()
        try:
            self._model.set_attn_implementation(attention.NAME)
        except ValueError:
            logger.info("%s does not let users choose its attention", type(self._model).__name__)

    def to_original(self) -> None:
        """Choose the model's original attention."""
        if self._model.config._attn_implementation != self._original:
            self._model.set_attn_implementation(self._original)

    def release(self) -> None:
        """Restore the model's settings if no other engine uses it. Idempotent."""
        with _lock:
            found = _found.get(self._model)
            if found is None or self not in found.users:
                return
            found.users.remove(self)
            if found.users:
                return
            del _found[self._model]
        found.restore(self._model)


def choose_forward(
    model: Any, info: ModelInfo, budget: Budget, switch: AttentionSwitch, forward: Forward
) -> bool:
    """Return True for packed passes, False for one pass per sequence. Sets the attention.

    `forward` requires one mode; `"auto"` prefers packed passes. Runs a few short passes.
    Raises: `KVPagerError` if no mode that `forward` allows reproduces the model's own logits.
    """
    name = type(model).__name__
    switch.to_paged()
    if forward != "per_sequence" and _is_right(model, info, budget, is_packed=True):
        return True
    if forward == "packed":
        raise KVPagerError(
            f"forward='packed': {name} computes other logits for packed rows. "
            "Pass forward='auto' or 'per_sequence'."
        )
    if not _is_right(model, info, budget, is_packed=False):
        switch.to_original()
        if not _is_right(model, info, budget, is_packed=False):
            raise KVPagerError(
                f"{name} cannot be batched continuously: with a cache of blocks, it computes other "
                "logits than in generate(). Use model.generate()."
            )
    return False


def _is_right(model: Any, info: ModelInfo, budget: Budget, *, is_packed: bool) -> bool:
    """Return True if each row's logits equal those of `generate`; False if the model raises."""
    if is_packed and not info.may_be_packed:
        return False
    try:
        return _gives_the_same(model, info, budget, is_packed=is_packed)
    except CannotPack:
        return False
    except Exception as error:  # the model uses its cache in a custom way
        name, how = type(model).__name__, "packed" if is_packed else "per_sequence"
        logger.info("%s does not work with a cache of blocks (%s): %r", name, how, error)
        return False


@torch.inference_mode()
def _gives_the_same(model: Any, info: ModelInfo, budget: Budget, *, is_packed: bool) -> bool:
    """Compare two rows of different lengths, in a prefill step and a decoding step."""
    prompts = [_some_ids(model, info, 5, 0), _some_ids(model, info, 8, 1)]
    groups = len(info.windows)
    firsts = 4 * np.arange(groups, dtype=np.int32)
    tables = np.array([[3, 0], [1, 2]], np.int32) + firsts[:, None, None]
    storage = BlockStorage(
        4 * groups, _BLOCK_SIZE, info.shapes, dtype=info.dtype, device=info.device
    )
    runner = ModelRunner(model, info, storage, budget, is_packed=is_packed)
    before = np.zeros(2, np.int32)
    for counts in (np.array([len(prompt) - 1 for prompt in prompts]), np.array([1, 1])):
        plan = trial_plan(prompts, before, counts, tables, storage, groups)
        logits = runner.run(plan, dict(enumerate(prompts)))
        before = before + counts.astype(np.int32)
    for prompt, found in zip(prompts, logits, strict=True):
        alone = _alone(model, info, prompt)
        difference = (found.float() - alone).norm() / alone.norm()
        if not difference <= _TOLERANCE.get(info.dtype, _TOLERANCE_16_BITS):  # a NaN too
            return False
    return True


def _alone(model: Any, info: ModelInfo, prompt: list[int]) -> Tensor:
    """Return the logits after `prompt` that the model's `generate` computes.

    Computes the last token over transformers' own cache.
    """
    ids = torch.tensor([prompt], device=info.device)
    if info.is_encoder_decoder:
        return _decoded_alone(model, info, ids)
    plain = copy.copy(model)  # shares all weights, without the user's settings
    plain.generation_config = GenerationConfig(
        max_new_tokens=2,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )

    def last(_: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, ids[0, -1:], 0.0)

    options: dict[str, Any] = {}
    if info.cache_name == CACHE_NAMES[0]:  # `generate` refuses an argument that `forward` lacks
        options[CACHE_NAMES[0]] = plain_cache(model)
    output = plain.generate(
        ids[:, :-1],
        attention_mask=torch.ones_like(ids[:, :-1]),
        logits_processor=LogitsProcessorList([last]),
        **options,
    )
    logits: Tensor = output.logits[1][0].float()
    return logits


def _decoded_alone(model: Any, info: ModelInfo, ids: Tensor) -> Tensor:
    """Return a decoder's logits after `ids`, to which `generate` would prepend a start token."""
    options: dict[str, Any] = {
        info.cache_name: EncoderDecoderCache(plain_cache(model), DynamicCache()),
        "encoder_outputs": model.get_encoder()(input_ids=ids),
    }
    for part in (ids[:, :-1], ids[:, -1:]):
        output = model(decoder_input_ids=part, use_cache=True, **options)
    logits: Tensor = output.logits[0, -1].float()
    return logits


def _some_ids(model: Any, info: ModelInfo, count: int, seed: int) -> list[int]:
    # Only tokens that a model can choose: some models have further embeddings for images.
    text = model.config.get_text_config(decoder=True)
    most = min(info.vocabulary, getattr(text, "vocab_size", None) or info.vocabulary)
    ids: list[int] = np.random.default_rng(seed).integers(0, most, count).tolist()
    return ids
