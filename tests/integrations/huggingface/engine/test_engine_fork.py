"""A forked process cannot use its parent's engines, says so at once, and can make its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

BEFORE = """
from tests.support import tiny_models
from tests.support.forks import in_a_fork, refuses
import kvpager
from kvpager import Engine
from transformers import GenerationConfig

model = tiny_models.tiny_model("llama").train()
attention = model.config._attn_implementation
settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
"""

ENGINE = """
engine = Engine(model, memory="4MiB")
ended = engine.submit([5, 6, 7], **settings)
expected = ended.result().token_ids

def check():
    refuses(engine.submit, [5])
    refuses(engine.generate, [[5], [6]])
    refuses(engine.stats)
    refuses(engine.clear_prefix_cache)
    refuses(engine.cancel, "running")
    refuses(engine.pause().__enter__)
    refuses(engine.__enter__)
    refuses(running.result)
    refuses(list, running)
    refuses(running.listen, print)
    assert running.done
    assert ended.result().token_ids == expected
    running.cancel()
    engine.close()
    engine.__exit__(None, None, None)
    assert model.training and model.config._attn_implementation == attention
    with Engine(model, memory="4MiB") as own:
        assert own.submit([5, 6, 7], **settings).result().token_ids == expected
    assert model.training and model.config._attn_implementation == attention

# Locks that a thread holds as the process forks are held for ever in the child.
with engine.pause():
    running = engine.submit([5, 6, 7], request_id="running", **settings)
    with engine._core._lock, running._channel._changed:
        in_a_fork(check)
    in_a_fork(check, True)
assert running.result().token_ids == expected
assert engine.submit([5, 6, 7], **settings).result().token_ids == expected
engine.close()
assert model.training
"""

MANAGER = """
with kvpager.patch(model, memory="4MiB"):
    config = GenerationConfig(**settings)
    manager = model.init_continuous_batching(config)
    manager.start()

    def check():
        for call in (manager.warmup, manager.start, manager.get_result, manager.pause):
            refuses(call)
        refuses(manager.add_request, [5])
        refuses(manager.add_requests, [[5]])
        refuses(manager.cancel_request, "running")
        refuses(list, manager)
        assert not manager.is_running()
        manager.stop()
        manager.join(0.0)
        manager.destroy()
        (output,) = model.generate_batch([[5, 6, 7]], config).values()
        assert len(output.generated_tokens) == 20

    with manager.pause():
        manager.add_request([5, 6, 7], request_id="running")
        with manager._changed, manager._control:
            in_a_fork(check)
    assert len(manager.get_result("running", timeout=60).generated_tokens) == 20
    manager.stop()

    model.generate_batch([[5, 6, 7]], config, persistent_manager=True)
    in_a_fork(lambda: model.generate_batch([[5, 6, 7]], config))
    (output,) = model.generate_batch([[5, 6, 7]], config).values()
    assert len(output.generated_tokens) == 20
    model.destroy_cached_continuous_batching_manager()
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [ENGINE, MANAGER], ids=["engine", "manager"])
def test_a_fork_refuses_calls_and_the_parent_continues(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEFORE + script],
        cwd=Path(__file__).resolve().parents[4],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
