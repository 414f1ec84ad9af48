"""The model that all systems serve: one set of weights, in memory and on disk."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM


def default_model() -> Any:
    """Return a bfloat16 Llama of 28 million random weights, the same in every call."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=16_384,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16)


def load(path: str | None, device: str | None = None) -> Any:
    """Load the model of folder `path`, or `default_model()`, for greedy decoding on `device`.

    The model has no end-of-text token, so every reply has the requested length.

    Raises: `ValueError` if the folder is missing or holds no such model.
    """
    if path is None:
        model = default_model()
    else:
        if not Path(path).expanduser().is_dir():
            raise ValueError(f"model={path}: no such folder. Make one with save_pretrained.")
        try:
            with _without_bars():
                model = AutoModelForCausalLM.from_pretrained(
                    str(Path(path).expanduser()), dtype="auto"
                )
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"model={path}: cannot be loaded: {reason}") from None
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model.to(device or "cpu").eval()


def share_weights(model: Any) -> Any:
    """Return a model that shares the weights but has its own settings. O(modules)."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def vocabulary(model: Any) -> int:
    """Return the size of the vocabulary. O(1)."""
    return int(model.config.get_text_config().vocab_size)


def max_length(model: Any) -> int | None:
    """Return the maximum tokens of a sequence; None if unbounded. O(1)."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


@contextlib.contextmanager
def saved(model: Any, path: str | None) -> Iterator[Path]:
    """Yield the model's folder. A generated model is saved to a temporary folder."""
    if path is not None:
        yield Path(path).expanduser()
        return
    with tempfile.TemporaryDirectory(prefix="kvpager-model-") as folder:
        with _without_bars():
            model.save_pretrained(folder)
        yield Path(folder)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Hide transformers' progress bars."""
    had_bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            transformers.utils.logging.enable_progress_bar()
