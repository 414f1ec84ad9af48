"""vLLM's own scheduler over kvpager's block manager: the hits and tokens of vLLM's manager."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make vllm"),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.vllm_models import save_model

    return save_model("llama", tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("max_tokens", [2048, 96])  # 96: prompts are computed in chunks
@pytest.mark.parametrize(
    "num_blocks", [4000, 60]
)  # 60: cached blocks leave, requests are preempted
@pytest.mark.parametrize("seed", range(3))
def test_random_requests_get_the_hits_and_tokens_of_vllms_manager(
    llama: Path, num_blocks: int, max_tokens: int, seed: int
) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    from tests.support.vllm_scheduler import KvpagerScheduler
    from tests.support.vllm_serving import Serving, make_scheduler

    served = [
        Serving(make_scheduler(kind, llama, num_blocks, max_tokens), num_blocks)
        for kind in (Scheduler, KvpagerScheduler)
    ]
    theirs, ours = (each.run(seed, 120) for each in served)
    assert ours.answers == theirs.answers
    assert ours.cached == theirs.cached
    assert ours.steps == theirs.steps
    assert ours.free == theirs.free
    assert sum(ours.cached.values()) > 1000
    assert (ours.num_preempted > 0) == (num_blocks == 60)
    manager = served[1].scheduler.kv_cache_manager.manager
    manager.check()
    assert manager.num_held_blocks == 0
