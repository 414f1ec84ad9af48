"""Models to measure with: loaded, shared, saved, and the settings around a measurement."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from kvpager.errors import BadInput


def find_device(name: str | None) -> torch.device:
    """Return the device; None: cuda if torch finds one. Raises `BadInput` if torch does not."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"device={name}: expected a name such as cpu or cuda:1.") from None
    if device.type == "meta":
        raise BadInput("device=meta: computes nothing. Choose cpu or cuda.")
    try:
        torch.empty(1, device=device).cpu()
    except (AssertionError, ImportError, NotImplementedError, RuntimeError):
        found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise BadInput(
            f"device={name}: not found by torch {torch.__version__}. "
            f"Choose from {', '.join(found)}."
        ) from None
    return device


def default_model() -> Any:
    """Return a bfloat16 Llama of 28 million random weights, the same in every call."""
    return _llama(512, num_layers=8).to(torch.bfloat16)


def small_model() -> Any:
    """Return a float32 Llama of 5 million random weights, ready for greedy decoding."""
    return _ready(_llama(256, num_layers=4))


def _llama(hidden_size: int, num_layers: int) -> Any:
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=16_384,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    return model


def _ready(model: Any) -> Any:
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model.eval()


def load(path: str | None, device: torch.device | str = "cpu") -> Any:
    """Load the model of folder `path`, or `default_model()`, for greedy decoding on `device`.

    The model has no end-of-text token, so every reply has the requested length.

    Raises: `BadInput` if the folder is missing or holds no such model.
    """
    if path is None:
        model = default_model()
    else:
        if not Path(path).expanduser().is_dir():
            raise BadInput(f"model={path}: no such folder. Make one with save_pretrained.")
        with quiet_transformers():
            model = from_pretrained(AutoModelForCausalLM, path, dtype="auto")
    return _ready(model.to(device))


def from_pretrained(kind: Any, name: str, **options: Any) -> Any:
    """Return `kind.from_pretrained` of a folder or a name. Raises `BadInput`."""
    folder = Path(name).expanduser()
    try:
        return kind.from_pretrained(str(folder) if folder.is_dir() else name, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadInput(f"model={name}: cannot be loaded: {reason}") from None


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
        with quiet_transformers():
            model.save_pretrained(folder)
        yield Path(folder)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence hints and progress bars, then restore the settings."""
    hub = getLogger("huggingface_hub")
    level, hub_level, bars = logging.get_verbosity(), hub.level, logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub.setLevel(ERROR)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Set torch's CPU threads, unless `count` is None, then restore them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
