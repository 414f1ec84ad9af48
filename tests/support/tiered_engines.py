"""Engines over tiers, for tests and for processes of their own."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpager import Engine
from kvpager.engine.stream import Output
from kvpager.integrations.huggingface.runner import tiers as opening
from kvpager.scheduling.preemption import PreemptionCosts
from kvpager.storage.keys import content_keys
from kvpager.storage.tiers.protocol import StoreStats
from kvpager.storage.tiers.tiering import Tiering
from tests.support.tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[2]
NUM_BLOCKS, NUM_CACHED = 6, 96  # of a prompt of 100 tokens, in blocks of 16
DEAR = PreemptionCosts(seconds_per_token=100.0)  # every fetch is worth it


def prompt(number: int = 0) -> list[int]:
    source = random.Random(number)
    return [source.randrange(3, 128) for _ in range(100)]


def llama() -> Any:
    """A model whose tokens depend on every block of a prompt."""
    return tiny_model("llama")


def edited() -> Any:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0, 0] += 0.5
    return model


def adapted(seed: int = 0) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    model = llama()
    torch.manual_seed(seed)
    return peft.get_peft_model(model, config)


# Models and settings whose blocks are not those of `llama`.
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "weights": (edited, {}),
    "adapter": (adapted, {}),
    "dtype": (lambda: llama().to(torch.bfloat16), {}),
    "block size": (llama, {"block_size": 32}),
    "format": (llama, {"kv_cache_dtype": "int8"}),
}


@contextlib.contextmanager
def patient_tiering() -> Iterator[None]:
    """Engines and patches made in it have fetches as long as a busy machine needs.

    Their staging is small, because the system takes long to provide what these prompts never fill.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "Tiering", functools.partial(Tiering, max_wait_s=60.0))
        patch.setattr(opening, "_STAGING_BYTES", 4 << 20)
        yield


@contextlib.contextmanager
def engine_over(model: Any, tiers: Any, **options: Any) -> Iterator[Engine]:
    """An engine whose fetches take as long as a busy machine needs."""
    with patient_tiering():
        engine = Engine(model, **{"memory": "4MiB", "tiers": tiers, "costs": DEAR} | options)
    with engine:
        yield engine


def flip_bits(folder: Path) -> None:
    """Damage every block of a disk store that is closed."""
    for segment in folder.glob("*"):
        content = bytearray(segment.read_bytes())
        if len(content) > 1 << 20:
            content[8::4096] = bytes(byte ^ 4 for byte in content[8::4096])
            segment.write_bytes(content)


def ask(engine: Engine, number: int = 0, **labels: Any) -> Output:
    stream = engine.submit(prompt(number), max_new_tokens=8, do_sample=False, **labels)
    return stream.result(120)


def tiering_of(engine: Engine) -> Tiering:
    fetching = engine._core._fetching
    assert fetching is not None
    return fetching._tiering


def store_stats(engine: Engine) -> StoreStats:
    """Return the counts of the engine's first store."""
    tiering = engine.stats().tiers
    assert tiering is not None
    return tiering.tiers[0].store


def keys_of(engine: Engine, number: int = 0) -> list[bytes]:
    """Return the content keys of a prompt without a namespace."""
    context = tiering_of(engine).context_of(None, None)
    return content_keys(prompt(number), engine.config.block_size, context)


def evict_found_blocks(engine: Engine, number: int = 0, *, first: int) -> None:
    """Let blocks of a prompt, from block `first` on, leave the store between find and load."""
    [store] = tiering_of(engine).stores
    keys, find = keys_of(engine, number), store.find

    def find_and_evict(wanted: Any) -> int:
        found = find(wanted)
        store.drop(keys[first:])
        return found

    store.find = find_and_evict  # type: ignore[method-assign]


def without_tiers(model: Any, number: int = 0, **options: Any) -> list[int]:
    options.pop("model_id", None)
    with Engine(model, memory="4MiB", **options) as engine:
        return ask(engine, number).token_ids


def in_a_process(function: str, *arguments: Any) -> Any:
    """Call a function "module:name" in a process of its own, whose hashes are random."""
    module, _, name = function.partition(":")
    code = f"import json; from {module} import {name}; print(json.dumps({name}(*{arguments!r})))"
    environment = {"PYTHONHASHSEED": "random", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])
