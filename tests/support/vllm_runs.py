"""Runs the scenarios of `vllm_scenarios` in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = {"llama": 160, "gemma": 400, "deepseek": 320, "mamba": 64}


def command(model: Path, *arguments: str) -> list[str]:
    """Return the command that runs scenarios with a model of `vllm_models`."""
    program = [sys.executable, "-W", "ignore", "-m", "tests.support.vllm_scenarios", str(model)]
    return [*program, "--blocks", str(BLOCKS[model.name]), *arguments]


def run(model: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """Return what the scenarios found."""
    result = subprocess.run(
        command(model, *arguments),
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def offloaded(model: Path, *arguments: str, environment: Any = None, **settings: Any) -> Any:
    """Run the scenarios with kvpager's tiers. `settings` are those of `offload`."""
    return run(model, "--offload", json.dumps(settings), *arguments, **(environment or {}))


def refused(model: Path, *arguments: str) -> str:
    """Return the errors of an engine that does not start."""
    result = subprocess.run(command(model, *arguments), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode, result.stdout
    return result.stderr


class Served:
    """An engine in its own process, which runs a scenario when it is asked to."""

    def __init__(self, model: Path, *arguments: str, **environment: str) -> None:
        self._process = subprocess.Popen(
            command(model, *arguments, "--scenarios", "-"),
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, scenario: str) -> dict[str, Any]:
        """Run a scenario. Returns its name and its answers."""
        assert self._process.stdin is not None
        print(scenario, file=self._process.stdin, flush=True)
        return {scenario: self._answer()}

    def end(self) -> dict[str, Any]:
        """Stop the engine. Returns what it found."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        found: dict[str, Any] = self._answer()
        assert self._process.wait(60) == 0
        return found

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # vLLM prints, too
            if line.startswith(("[{", "{")):
                return json.loads(line)
        raise AssertionError("the engine ended")


def tokens(answers: dict[str, Any], name: str) -> list[Any]:
    return [each["answers"] for each in answers[name]]


def cached(answers: dict[str, Any], name: str) -> list[Any]:
    return [each["cached"][0] for each in answers[name]]


def check(found: dict[str, Any], alone: dict[str, Any], at_least: int = 100) -> None:
    """The tokens are those of vLLM alone, loaded bytes those that were saved, nothing is held."""
    for name in found["answers"]:
        assert tokens(found["answers"], name) == tokens(alone, name), name
    assert found["compared"] > at_least
    assert found["wrong"] == []
    assert found["device"]["free"] == found["device"]["blocks"] - 1  # all but the null block
    [host] = found["host"]
    assert (host["pinned"], host["writing"]) == (0, 0)
