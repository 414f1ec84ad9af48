"""Two processes, each with a shard of every block and a store: what one lacks is computed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvpager.errors import RequestCancelled, RequestFailed
from tests.support.toy_ranks import FollowerProcess, LeadingEngine
from tests.support.toy_runner import expected
from tests.support.toy_tiers import BLOCK_BYTES

PROMPT = list(range(40))


@pytest.fixture(scope="module")
def process() -> Iterator[FollowerProcess]:
    follower = FollowerProcess()
    yield follower
    follower.close()


def tokens_of(engine: LeadingEngine, prompt: list[int]) -> tuple[int, dict[str, int]]:
    """Ask for a reply, which must be right; return how many tokens of the prompt were cached."""
    output = engine.ask(prompt).result(60)
    assert output.token_ids == expected(prompt, 8, num_ranks=2)
    return output.num_cached_tokens, output.cached_tokens_by_tier


def fill(engine: LeadingEngine) -> None:
    """Ask for the prompt, and then for others until its blocks have left both devices."""
    for seed in range(5):
        tokens_of(engine, [seed, *PROMPT[:30]])
        engine.settle()


def test_an_evicted_prompt_is_found_on_both_ranks(process: FollowerProcess, tmp_path: Path) -> None:
    with LeadingEngine(process, tmp_path, 14) as engine:
        fill(engine)
        assert tokens_of(engine, [0, *PROMPT[:30]]) == (28, {"disk": 28})
        counts = engine.settle()
        assert (counts["used"], counts["hits"]) == (0, 7)


def test_both_ranks_find_a_prompt_after_a_restart(process: FollowerProcess, tmp_path: Path) -> None:
    with LeadingEngine(process, tmp_path) as engine:
        assert tokens_of(engine, PROMPT) == (0, {})  # the end of the engine saves its blocks
    with LeadingEngine(process, tmp_path) as engine:
        assert tokens_of(engine, PROMPT) == (36, {"disk": 36})


@pytest.mark.parametrize("fault", [None, "lose", "flip"])
def test_a_warmed_prompt_is_on_both_ranks_or_on_none(
    fault: str | None, process: FollowerProcess, tmp_path: Path
) -> None:
    with LeadingEngine(process, tmp_path, 14) as engine:
        fill(engine)
        if fault is not None:
            process.tell(fault)
        prompt, num_tokens = [0, *PROMPT[:30]], 28 if fault is None else 0
        assert engine.tiers is not None
        assert engine.tiers.warm([prompt]) == num_tokens
        assert tokens_of(engine, prompt) == (num_tokens, {})
        assert engine.settle()["used"] == 0


@pytest.mark.parametrize("fault", ["lose", "flip", "shorten"])
def test_what_a_follower_lost_is_computed_and_saved_again(
    fault: str, process: FollowerProcess, tmp_path: Path
) -> None:
    with LeadingEngine(process, tmp_path, 14) as engine:
        fill(engine)
        process.tell(fault)
        assert tokens_of(engine, [0, *PROMPT[:30]]) == (0, {})
        counts = engine.settle()
        assert (counts["used"], counts["hits"]) == (0, 0)
        assert (counts["bad"] > 0) == (fault != "lose")
        for seed in range(5, 8):
            tokens_of(engine, [seed, *PROMPT[:30]])
            engine.settle()
        assert tokens_of(engine, [0, *PROMPT[:30]]) == (28, {"disk": 28})


def test_a_follower_with_little_staging_fetches_the_front(
    process: FollowerProcess, tmp_path: Path
) -> None:
    with LeadingEngine(process, tmp_path) as engine:
        tokens_of(engine, PROMPT)
    with LeadingEngine(process, tmp_path, follower_slots=3) as engine:
        assert tokens_of(engine, PROMPT) == (12, {"disk": 12})
        assert engine.settle()["used"] == 0


def test_blocks_are_loaded_over_several_steps(process: FollowerProcess, tmp_path: Path) -> None:
    with LeadingEngine(process, tmp_path) as engine:
        tokens_of(engine, PROMPT)
    with LeadingEngine(process, tmp_path, step_bytes_max=2 * BLOCK_BYTES) as engine:
        assert tokens_of(engine, PROMPT) == (36, {"disk": 36})
        assert engine.settle()["used"] == 0


def test_a_cancelled_fetch_leaves_nothing_in_staging(
    process: FollowerProcess, tmp_path: Path
) -> None:
    with LeadingEngine(process, tmp_path) as engine:
        tokens_of(engine, PROMPT)
    with LeadingEngine(process, tmp_path) as engine:
        process.tell("shut")
        stream = engine.ask(PROMPT)
        tokens_of(engine, [7, *PROMPT])  # others run meanwhile
        stream.cancel()
        with pytest.raises(RequestCancelled):
            stream.result(60)
        process.tell("open")
        assert engine.settle()["used"] == 0
        assert tokens_of(engine, PROMPT) == (36, {"disk": 36})


def test_a_follower_that_answers_late_costs_one_deadline(
    process: FollowerProcess, tmp_path: Path
) -> None:
    with LeadingEngine(process, tmp_path) as engine:
        tokens_of(engine, PROMPT)
    with LeadingEngine(process, tmp_path, max_wait_s=0.05) as engine:
        process.tell("shut")
        assert tokens_of(engine, PROMPT) == (0, {})
        process.tell("open")
        assert engine.settle()["used"] == 0


def test_a_failed_step_drops_what_followers_may_not_have_loaded(
    process: FollowerProcess, tmp_path: Path
) -> None:
    with LeadingEngine(process, tmp_path) as engine:
        tokens_of(engine, PROMPT)
    with LeadingEngine(process, tmp_path) as engine:
        run = engine.runner.run

        def run_unless_loading(plan: Any, prompts: Any) -> list[int]:
            if len(plan):
                engine.runner.run = run  # type: ignore[method-assign]
                raise OSError("the connection broke before the plan was sent")
            return run(plan, prompts)

        engine.runner.run = run_unless_loading  # type: ignore[method-assign]
        with pytest.raises(RequestFailed):
            engine.ask(PROMPT).result(60)
        assert tokens_of(engine, PROMPT) == (0, {})
        assert tokens_of(engine, PROMPT) == (39, {})


def test_a_forgotten_namespace_leaves_the_stores_of_all_ranks(
    process: FollowerProcess, tmp_path: Path
) -> None:
    with LeadingEngine(process, tmp_path) as engine:
        for name in ("a", "b"):
            engine.ask(PROMPT, namespace=name).result(60)
        assert engine.settle()["blocks"] == 22
        assert engine.tiers is not None
        assert engine.tiers.forget("a") == 11
        assert engine.settle()["blocks"] == 11
        assert engine.ask(PROMPT, namespace="b").result(60).num_cached_tokens == 39


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 20))]
)
def test_traffic_and_faults_at_random_give_the_same_tokens(
    seed: int, process: FollowerProcess, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    fronts = [[chance.randrange(1000) for _ in range(24)] for _ in range(6)]
    slots = chance.randrange(2, 30), chance.randrange(2, 30)
    with LeadingEngine(process, tmp_path, 24, slots=slots[0], follower_slots=slots[1]) as engine:
        for _ in range(6):
            asked = []
            for _ in range(12):
                prompt = [*chance.choice(fronts)[: chance.randrange(1, 25)], chance.randrange(9)]
                stream = engine.ask(
                    prompt, 4, namespace=chance.choice([None, "a"]), n=chance.choice([1, 1, 2])
                )
                if chance.random() < 0.2:
                    stream.cancel()
                asked.append((prompt, stream))
            for prompt, stream in asked:
                with contextlib.suppress(RequestCancelled):
                    for number, sample in enumerate(stream.result(60).samples):
                        assert sample.token_ids == expected(prompt, 4, number, num_ranks=2)
            process.tell(chance.choice(["lose_some", "lose", "flip", "settle"]))
        engine.check_idle()
        assert engine.settle()["used"] == 0
