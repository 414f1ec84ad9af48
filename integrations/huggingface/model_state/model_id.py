"""Name a model by its content: the same name in all processes and on all machines.

    model_id(model)     # "sha256:5f0c..."

The name is a digest of the bytes of all weights and buffers, the settings of all modules and
configurations, and the versions of the libraries that define them. So a model that is edited,
merged, quantised or has another LoRA adapter active has another name. Paths, devices and the
attention implementation do not count. A model that runs code of other libraries, or of the user,
has no such name.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.model_state.called_functions import (
    CalledFunctions,
    global_hooks,
)
from kvpager.integrations.huggingface.model_state.contents import is_library, module_of

_PIECE_BYTES = 64 << 20
_THREADS_MAX = 8
_BAR_AFTER_S = 3.0
_DEPTH_MAX = 64
_PLAIN = (Tensor, nn.Parameter)
_CODE = (types.FunctionType, types.BuiltinFunctionType, type)
# Attributes that do not change the results of a model.
_TORCH_READ = {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"}
_TORCH_OWN = vars(nn.Module()).keys() - _TORCH_READ
_OF_LOADING = {"name_or_path", "hf_device_map", "warnings_issued", "_is_hf_initialized", "device"}
_OF_LOADING |= {"generation_config", "all_tied_weights_keys", "hf_quantizer"}
_OF_CONFIG = {"transformers_version", "architectures", "dtype", "id2label", "label2id"}


class _NoName(Exception):
    """A model has no name by content. The message says why."""


def model_id(model: nn.Module) -> str:
    """Return the name of `model` by its content. O(bytes of the weights).

    Shows a progress bar if it takes longer than 3 seconds. Raises: `KVPagerError` for a model that
    runs code of other libraries, or whose weights cannot be read.
    """
    reader = _Reader()
    try:
        _refuse_foreign(model)
        libraries = {module_of(type(module)).partition(".")[0] for module in model.modules()}
        # torch's own modules compute the same in all versions, up to rounding.
        versions = [(name, sys.modules[name].__version__) for name in sorted(libraries - {"torch"})]
        digest = sha256(ascii((versions, reader.read(model))).encode())
        for piece in _digests(reader.tensors):
            digest.update(piece)
    except _NoName as error:
        raise KVPagerError(
            f"model_id=None: {type(model).__name__} cannot be named by its content: {error}. "
            "Pass model_id='name@revision', the same on all machines, and another one for other "
            "weights or code."
        ) from None
    return f"sha256:{digest.hexdigest()}"


def _refuse_foreign(model: nn.Module) -> None:
    """Refuse functions that do not belong to a known library."""
    kinds = {type(module) for module in model.modules()}
    names = {str(getattr(model.config, "_attn_implementation", None))}
    for function in [*CalledFunctions(kinds, names).foreign, *global_hooks()]:
        if not is_library(module_of(function)):
            raise _NoName(f"it calls {_name(function)}")


class _Reader:
    """Reads objects as nested tuples of numbers and texts; collects their tensors."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._met: dict[int, tuple[int, object]] = {}  # keeps the objects alive, and so their ids

    def read(self, value: Any, depth: int = 0) -> object:
        """Return what `value` holds. Raises: `_NoName`."""
        if depth > _DEPTH_MAX:
            raise _NoName(f"a {type(value).__name__} is nested too deeply")
        if isinstance(value, Enum):
            return type(value).__qualname__, value.name
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            return value
        if isinstance(value, torch.dtype | range | type(Ellipsis)):
            return str(value)
        if isinstance(value, torch.device):
            return "device"
        if isinstance(value, dict):
            items = ((self.read(key, depth + 1), item) for key, item in value.items())
            ordered = sorted(items, key=lambda pair: ascii(pair[0]))
            return "dict", *((key, self.read(item, depth + 1)) for key, item in ordered)
        if isinstance(value, list | tuple | deque):
            return "list", *(self.read(item, depth + 1) for item in value)
        if isinstance(value, set | frozenset):
            return "set", *sorted((self.read(item, depth + 1) for item in value), key=ascii)
        return self._object(value, depth)

    def _object(self, value: Any, depth: int) -> object:
        if id(value) in self._met:
            return "met", self._met[id(value)][0]
        if isinstance(value, Tensor | nn.Module | PreTrainedConfig):
            self._met[id(value)] = len(self._met), value
        if isinstance(value, Tensor):
            return self._tensor(value, depth)
        if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
            return "array", str(value.dtype), value.shape, value.tobytes()
        if isinstance(value, functools.partial):
            return "partial", self.read([value.func, value.args, value.keywords], depth + 1)
        if isinstance(value, types.MethodType):
            return "method", self.read([value.__func__, value.__self__], depth + 1)
        if not is_library(module_of(value)):
            raise _NoName(f"it holds {_name(value)}")
        if isinstance(value, _CODE):
            return _name(value)
        has_settings = isinstance(value, nn.Module | PreTrainedConfig | types.SimpleNamespace)
        settings = self.read(_settings(value), depth + 1) if has_settings else None
        return _name(type(value)), settings

    def _tensor(self, tensor: Tensor, depth: int) -> object:
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            parts = [self.read(getattr(tensor, name), depth + 1) for name in names]
            return _name(type(tensor)), *zip(names, parts, strict=True)
        if type(tensor) not in _PLAIN and vars(tensor):
            raise _NoName(f"a {type(tensor).__name__} may hold more than numbers")
        if tensor.is_meta:
            raise _NoName("some of its weights are not in memory")
        self.tensors.append(tensor)
        return "tensor", len(self.tensors), str(tensor.dtype), tuple(tensor.shape)


def _settings(value: Any) -> dict[str, Any]:
    """Return the attributes of an object that may change the results of a model."""
    fields = dict(vars(value))
    if isinstance(value, PreTrainedConfig):
        return {name: fields[name] for name in fields.keys() - _OF_CONFIG if name[0] != "_"}
    if isinstance(value, nn.Module):
        fields = {name: fields[name] for name in fields.keys() - _TORCH_OWN - _OF_LOADING}
    if isinstance(value, PreTrainedModel):  # its private attributes are of use in loading
        fields = {name: fields[name] for name in fields if name[0] != "_" or name in _TORCH_READ}
    return fields


def _name(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{module_of(value)}.{named.__qualname__}"


def _digests(tensors: list[Tensor]) -> Iterator[bytes]:
    """Yield digests of the bytes of all tensors, in order."""
    pieces = [piece for tensor in tensors for piece in _pieces(tensor)]
    bar = tqdm(
        total=sum(piece.nbytes for piece in pieces),
        desc="digest of the model",
        unit="B",
        unit_scale=True,
        delay=_BAR_AFTER_S,
        leave=False,
    )
    workers = min(_THREADS_MAX, os.cpu_count() or 1)
    with bar, ThreadPoolExecutor(workers, "kvpager-model-id") as pool:
        for piece, digest in zip(pieces, pool.map(_digest, pieces), strict=True):
            bar.update(piece.nbytes)
            yield digest


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    try:
        flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)
    except RuntimeError as error:  # sparse, nested, quantised by torch itself
        raise _NoName(f"a tensor cannot be read: {error}") from None
    return flat.split(_PIECE_BYTES) if len(flat) else ()


def _digest(piece: Tensor) -> bytes:
    return sha256(piece.cpu().numpy().data).digest()
