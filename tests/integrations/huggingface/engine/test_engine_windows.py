"""Engines of models with windows: the tokens of `generate`, and no block behind a window."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from kvpager import Engine
from kvpager.blocks.groups.manager import GroupedManager
from kvpager.engine.config import Forward
from kvpager.scheduling.preemption import PreemptionCosts
from tests.conformance.architectures import WINDOW
from tests.support import tiny_models

MODELS = ["mistral", "gemma3", "gpt_oss", "llama4"]
BLOCK = 4
GREEDY: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
OPTIONS: dict[str, Any] = {"memory": "4MiB", "block_size": BLOCK, "max_batch_tokens": 16}
# llama 4 hides tokens by chunk, which a line of rows cannot express.
WAYS = [
    (name, forward)
    for name in MODELS
    for forward in ("auto", "per_sequence")
    if (name, forward) != ("llama4", "auto")
]

pytestmark = [
    pytest.mark.skipif(not tiny_models.is_known("llama4"), reason="needs a later transformers"),
    pytest.mark.filterwarnings("ignore:.*RoPE scaling factor.*"),
]


def prompts() -> list[list[int]]:
    """Prompts shorter and longer than the window; the last two begin like others."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (40, 5, 23, 61, 9)]
    return [*found, [*found[3][:50], 7, 8, 9], [*found[0], 4]]


@functools.cache
def model(name: str) -> Any:
    return tiny_models.tiny_model(name)


@functools.cache
def alone(name: str) -> list[list[int]]:
    """Return the tokens that the model's own `generate` adds to each prompt."""
    found = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        tokens = model(name).generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
        found.append(tokens[0, len(prompt) :].tolist())
    return found


def manager_of(engine: Engine) -> GroupedManager:
    manager = engine._core.scheduler.manager
    assert isinstance(manager, GroupedManager)
    return manager


def assert_empty(engine: Engine) -> None:
    manager = manager_of(engine)
    manager.check()
    assert manager.num_held_blocks == 0
    engine.clear_prefix_cache()
    assert manager.num_free_blocks == manager.num_blocks


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize(("name", "forward"), WAYS)
def test_tokens_are_those_of_generate_beyond_the_window(
    name: str, forward: Forward, prefix_cache: bool
) -> None:
    options = OPTIONS | {"forward": forward, "prefix_cache": prefix_cache}
    with Engine(model(name), **options) as engine:
        assert engine.is_packed == (forward == "auto")
        assert [output.token_ids for output in engine.generate(prompts(), **GREEDY)] == alone(name)
        before = engine.stats().scheduler.total_reused_tokens
        assert [output.token_ids for output in engine.generate(prompts(), **GREEDY)] == alone(name)
        assert (engine.stats().scheduler.total_reused_tokens - before > 100) == prefix_cache
        assert_empty(engine)


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("way", ["swap", "recompute"])
@pytest.mark.parametrize("name", MODELS)
def test_preempted_requests_have_the_tokens_of_generate(name: str, way: str) -> None:
    costs = PreemptionCosts(seconds_per_block=0.0 if way == "swap" else float("inf"))
    with Engine(model(name), **OPTIONS) as probe:
        num_blocks = manager_of(probe).queries.blocks_for(61 + 20)
        memory = 2 * num_blocks * probe.block_bytes
    host = {"host_memory": "4MiB"} if way == "swap" else {}
    with Engine(model(name), **OPTIONS | {"memory": memory, "costs": costs}, **host) as engine:
        assert [output.token_ids for output in engine.generate(prompts(), **GREEDY)] == alone(name)
        stats = engine.stats().scheduler
        assert stats.total_preempted_by_swap + stats.total_preempted_by_recompute > 0
        assert (stats.total_preempted_by_swap > 0) == (way == "swap")
        assert_empty(engine)


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("name", MODELS)
def test_samples_of_a_prompt_share_it_and_part(name: str) -> None:
    options = {"max_new_tokens": 24, "do_sample": True, "num_return_sequences": 2, "seed": 3}
    with Engine(model(name), **OPTIONS) as engine:
        [first] = engine.generate([prompts()[3]], **options, eos_token_id=None)
        [again] = engine.generate([prompts()[3]], **options, eos_token_id=None)
        assert first.samples == again.samples
        assert first.samples[0] != first.samples[1]
        assert_empty(engine)


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("name", MODELS)
def test_a_cancelled_request_leaves_no_block(name: str) -> None:
    with Engine(model(name), **OPTIONS) as engine:
        stream = engine.submit(prompts()[3], **GREEDY | {"max_new_tokens": 500})
        next(iter(stream))
        stream.cancel()
        [output] = engine.generate([prompts()[0]], **GREEDY)
        assert output.token_ids == alone(name)[0]
        assert_empty(engine)


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_a_layer_holds_its_window_and_two_blocks(name: str) -> None:
    held: list[int] = []

    def note(_: Any) -> None:
        manager = manager_of(engine)
        tables = manager._state.rows
        for group, window in enumerate(manager.windows):
            if window is not None:
                rows = [row for row in tables.live_rows() if tables.prompt(row).group == group]
                held.extend(len(tables.device_blocks(row)) for row in rows)

    with Engine(model(name), **OPTIONS, on_step=note) as engine:
        engine.generate([prompts()[1]], **GREEDY | {"max_new_tokens": 120})
    assert held
    assert max(held) <= WINDOW // BLOCK + 2
