"""Lets the published wheel of SGLang run on a CPU, HiCache included. For tests only.

SGLang's kernels are published for GPUs only, and its copies between a device and host memory use
CUDA. This module replaces them by copies of torch, on import, in each process of the environment
that `tests/environments/sglang.py` makes: SGLang spawns its processes.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_ABSENT = ("sgl_kernel", "sgl_kernel.kvcacheio")
_ABSENT_TORCHVISION = tuple(
    f"torchvision{name}"
    for name in ("", ".io", ".transforms", ".transforms.functional", ".transforms.v2",
                 ".transforms.v2.functional")
)  # fmt: skip


class _Absent(ModuleType):
    """A module that SGLang imports names from, and never calls on a CPU."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {"__getattr__": lambda _, __: 0})
        setattr(self, name, value)
        return value


def _before_sglang() -> None:
    import torch
    import transformers  # noqa: F401
    from transformers.utils import import_utils

    import_utils.is_torchvision_available()  # keeps the answer: it is not
    for name in (*_ABSENT, *_ABSENT_TORCHVISION):
        sys.modules[name] = module = _Absent(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    cpu: Any = torch.cpu
    cpu.Event, cpu.Stream = _Event, _Stream
    cpu.current_stream = lambda *_: _Stream()
    cpu.stream = lambda _: contextlib.nullcontext()


class _Event:
    """An event of a device whose work has ended when its call returns."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> _Event:
        return _Event()


def _transfer_kv_direct(
    *, src_layers: Any, dst_layers: Any, src_indices: Any, dst_indices: Any, page_size: int
) -> None:
    """Copy tokens between layers [tokens, heads, dim]."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def _to_pages(
    *, src_ptrs: Any, dst_ptrs: Any, src_indices: Any, dst_indices: Any, page_size: int
) -> None:
    """Copy tokens of layers, keys before values, to pages [pages, layers, page, heads, dim]."""
    pages, places = dst_indices // page_size, dst_indices % page_size
    num_layers = len(src_ptrs) // 2
    for number, layer in enumerate(src_ptrs):
        target = dst_ptrs[number // num_layers][:, number % num_layers]
        target[pages, places] = layer[src_indices]


def _from_pages(
    *,
    src_ptrs: Any,
    dst_ptrs: Any,
    src_indices: Any,
    dst_indices: Any,
    layer_id: int,
    page_size: int,
) -> None:
    """Copy tokens of one layer, its keys and values, from pages."""
    pages, places = src_indices // page_size, src_indices % page_size
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        target[dst_indices] = source[pages, layer_id, places]


def _after_mha(module: Any) -> None:
    module.transfer_kv_direct = _transfer_kv_direct
    module.transfer_kv_all_layer_direct_lf_pf = _to_pages
    module.transfer_kv_per_layer_direct_pf_lf = _from_pages


def _after_common(module: Any) -> None:
    module._cuda_host_register = lambda *_, **__: None


_BEFORE: dict[str, Callable[[], None]] = {"sglang": _before_sglang}
_AFTER: dict[str, Callable[[Any], None]] = {
    "sglang.srt.mem_cache.pool_host.common": _after_common,
    "sglang.srt.mem_cache.pool_host.mha": _after_mha,
}


class _Hooks(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> Any:
        before, after = _BEFORE.pop(name, None), _AFTER.pop(name, None)
        if before is None and after is None:
            return None
        spec: Any = find_spec(name)
        if spec is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            if before is not None:
                before()
            run(module)
            if after is not None:
                after(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Hooks())
