"""Make `.venv-sglang`, in which SGLang runs on a CPU over the packages of `.venv-vllm`.

    .venv/bin/python -m tests.environments.sglang

SGLang's wheel asks for kernels of GPUs, another torch and an older transformers. Small models run
without and with the newer ones: `tests/support/sglang_on_cpu` replaces what is missing. vLLM's
environment has all but a few of the other packages, so it is made first, if it is not there.
"""

from __future__ import annotations

from tests.environments import vllm
from tests.environments.engines import ROOT, environment, packages, pip

NAME, SGLANG = ".venv-sglang", "sglang==0.5.23"
_MISSING = ("gguf", "ipython", "orjson")  # what SGLang imports on a CPU and vLLM does not need


def make() -> None:
    """Make the environment, unless it is there and complete."""
    vllm.make()
    path = [
        f"import site; site.addsitedir({str(packages(ROOT / vllm.NAME))!r})",
        str(ROOT / "tests" / "support" / "sglang_on_cpu"),
        "import sglang_on_cpu",  # in each process, which SGLang spawns
    ]
    with environment(NAME, SGLANG, path) as python:
        if python is not None:
            pip(python, "install", *_MISSING)
            pip(python, "install", "--no-deps", SGLANG)


if __name__ == "__main__":
    make()
