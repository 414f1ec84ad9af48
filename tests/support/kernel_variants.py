"""Record which variants of the Triton kernels would be compiled, without a GPU and a compiler.

    python -m tests.support.kernel_variants copies    # random calls of the copy kernels
    python -m tests.support.kernel_variants engine    # random steps after the warm-up of an engine

prints one line of JSON: kernel -> number of variants (for `engine`: before and after the traffic).
Runs as a process of its own, because kernels decorated for the interpreter have no variants.
"""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

BACKEND = make_backend(GPUTarget("cuda", 90, 32))


class Recorder:
    """Records types, specialisation and constants of a launch instead of launching."""

    def __init__(self) -> None:
        self.variants: dict[str, set[str]] = defaultdict(set)
        self._binders: dict[str, Any] = {}
        recorder = self

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            recorder.note(kernel, args, options)

        jit.JITFunction.run = run  # type: ignore[method-assign]

    def note(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        name = kernel.__name__
        if name not in self._binders:
            self._binders[name] = jit.create_function_from_signature(
                kernel.signature, kernel.params, BACKEND
            )
        _, specialisation, chosen = self._binders[name](*args, **options)
        self.variants[name].add(repr((specialisation, sorted(chosen.items()))))

    def counts(self) -> dict[str, int]:
        return {name: len(found) for name, found in self.variants.items()}


def copies_called(recorder: Recorder) -> Any:
    """Append, gather, copy and allocate random sizes, from tensors at any offset."""
    from kvpager.kernels.device_allocator import DeviceAllocator
    from kvpager.kernels.gpu import allocator
    from kvpager.kernels.gpu import copies as copy_kernels
    from kvpager.storage.block_storage import BlockStorage

    chance = random.Random(3)
    storage = BlockStorage(64, 16, [(8, 64, 64)] * 2, dtype=torch.bfloat16)
    caches = storage.layer(0)
    books = DeviceAllocator(64, 16, 256, 8, device="cpu")
    for _ in range(300):
        first, count = chance.randrange(5), chance.randint(1, 300)
        key, value = torch.empty(2, count, 8, 64, dtype=torch.bfloat16)
        copy_kernels.append_kv(
            key, value, *caches, torch.empty(first + count, dtype=torch.int64)[first:]
        )
        tables = torch.empty(count, chance.randint(1, 40), dtype=torch.int32)
        lens = torch.empty(first + count, dtype=torch.int32)[first:]
        copy_kernels.gather_kv(caches[0], tables, lens, chance.randint(1, 600))
        pairs = chance.choice((chance.randint(1, 16), chance.randint(1, 600)))
        copies = torch.empty(first + pairs, 2, dtype=torch.int32)[first:]
        copy_kernels.copy_blocks(storage.tier(), copies)
        lanes = torch.empty(first + chance.randint(9, 16), dtype=torch.int32)[first:]
        allocator.step_alloc(books, lanes[:16])
        allocator.release_rows(books, lanes)
    return recorder.counts()


def engine(recorder: Recorder) -> Any:
    """Run steps of random rows after a warm-up, like an engine."""
    from kvpager.integrations.huggingface.cache.budget import Budget
    from kvpager.integrations.huggingface.runner import warm_up as warming
    from kvpager.integrations.huggingface.runner.model_info import inspect_model
    from kvpager.integrations.huggingface.runner.model_runner import ModelRunner
    from kvpager.integrations.huggingface.runner.probe import AttentionSwitch
    from kvpager.kernels import backends
    from kvpager.kernels.gpu import attention
    from kvpager.kernels.gpu import copies as copy_kernels
    from kvpager.storage.block_storage import BlockStorage
    from tests.support import tiny_models

    model = tiny_models.tiny_model("gemma3")  # with windows and without
    info, budget = inspect_model(model), Budget("64MiB", 16)
    storage = BlockStorage(600, 16, info.shapes, dtype=info.dtype)
    AttentionSwitch(model).to_paged()
    for name, kernel in (
        ("paged_attention", attention.paged_attention), ("append_kv", copy_kernels.append_kv),
        ("copy_blocks", copy_kernels.copy_blocks),
    ):  # fmt: skip
        backends.register(name, "cpu", kernel, "recorded")
    runner = ModelRunner(model, info, storage, budget, is_packed=True)
    warming.warm_up(runner, 64, 8)
    before = recorder.counts()
    chance = random.Random(5)
    for _ in range(60):
        runner.run(random_step(chance, runner, warming.step_of_rows), {})
    return {name: [before.get(name, 0), count] for name, count in recorder.counts().items()}


def random_step(chance: random.Random, runner: Any, make: Callable[..., Any]) -> Any:
    """Return decoding rows, chunked prompts, or both; some with blocks to copy first."""
    from dataclasses import replace

    longest = runner.info.max_length
    decoding = [(chance.randrange(longest), 1) for _ in range(chance.randrange(7))]
    prompts = [
        (chance.choice((0, chance.randrange(longest // 2))), chance.randint(2, 25))
        for _ in range(chance.randrange(0 if decoding else 1, 3))
    ]
    plan = make(runner, decoding + prompts)
    tables = np.array(
        [chance.sample(range(600), plan.block_tables.shape[1]) for _ in plan.request_ids]
    )
    if chance.random() < 0.5:
        plan = replace(plan, block_tables=tables.astype(np.int32))
    count = chance.choice((0, 0, 1, 5, 30))
    copies = np.array(chance.sample(range(600), 2 * count), np.int32).reshape(-1, 2)
    return replace(plan, copies=copies)


if __name__ == "__main__":
    found = {"copies": copies_called, "engine": engine}[sys.argv[1]](Recorder())
    print(json.dumps(found))
