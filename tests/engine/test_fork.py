"""Forks: a forked process cannot use engines of its parent, but can make its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
from tests.support.forks import in_a_fork, refuses
from tests.support.toy_runner import ToyEngine, expected

def check():
    refuses(engine.ask, [5])
    refuses(engine.stats)
    refuses(engine.clear_prefix_cache)
    refuses(engine.cancel, "running")
    refuses(engine.pause().__enter__)
    refuses(engine.__enter__)
    refuses(engine.quotas.__setitem__, "acme", 3)
    refuses(engine.quotas.__delitem__, "other")
    refuses(running.result)
    refuses(list, running)
    refuses(running.listen, print)
    assert running.done and not engine.is_open
    assert ended.result().token_ids == expected([5, 6, 7], 20)
    running.cancel()
    engine.close()
    engine.__exit__(None, None, None)
    with ToyEngine() as own:
        assert own.ask([5, 6, 7], 20).result().token_ids == expected([5, 6, 7], 20)

engine = ToyEngine()
engine.quotas["other"] = 3
ended = engine.ask([5, 6, 7], 20)
ended.result()
# A lock that a thread holds during a fork is held forever in the child.
with engine.pause():
    running = engine.ask([5, 6, 7], 20, request_id="running")
    with engine._lock, running._channel._changed:
        in_a_fork(check)
    in_a_fork(check)
assert running.result().token_ids == expected([5, 6, 7], 20)
engine.close()
"""


def test_a_fork_refuses_engines_of_its_parent() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr


def test_an_open_engine_ends_with_its_program() -> None:
    program = """
from tests.support.toy_runner import ToyEngine
engine = ToyEngine(512)
stream = engine.ask([5], 1500)
next(iter(stream))
print("the end")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "the end\n", "")
