"""What every test stands on: no network, few threads, and GPU tests only where there is a GPU."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Read when torch and transformers are first imported, and inherited by subprocesses.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The tensors of the tests are small: several threads would only wait for each other, which takes
# ten times as long on a busy machine. Tests of threads set their number themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# Triton decides when it decorates a kernel whether that will be compiled or interpreted.
if not _has_gpu():
    os.environ["TRITON_INTERPRET"] = "1"

try:
    import hypothesis
except ImportError:  # a GPU machine needs torch and pytest only
    pass
else:
    # A slow machine is no failure: no test asserts on time.
    hypothesis.settings.register_profile(
        "kvpager",
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
        print_blob=True,
    )
    hypothesis.settings.load_profile("kvpager")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes in one thread, whatever the test before left, and as before afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_raises() -> Iterator[None]:
    """Handle SIGINT as Python does, also where a shell started the tests in the background."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_sessionstart() -> None:
    """Build the native kernels before any test looks at what a program prints."""
    import torch

    from kvpager.kernels import backends

    backends.select("append_kv", torch.device("cpu"))


@pytest.fixture(autouse=True, scope="module")
def earlier_objects_are_frozen() -> None:
    """Leave the objects of imported modules out of garbage collections: there are millions.

    Tests import more of transformers as they run, so each file begins with this.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # extension modules look for leaks as the interpreter ends


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Under `-m gpu`, import only files that hold GPU tests: the others may need more packages."""
    if config.option.markexpr != "gpu" or not collection_path.name.startswith("test_"):
        return None
    return True if "mark.gpu" not in collection_path.read_text(encoding="utf-8") else None


@pytest.hookimpl(tryfirst=True)  # before pytest looks at what `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark most cases of large tests slow; skip GPU tests where torch finds no GPU."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("mostly_slow"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for of_test in cases.values():
        marker = of_test[0].get_closest_marker("mostly_slow")
        assert marker is not None
        quick = marker.kwargs["quick"]
        # Spread over all cases, so that each parameter has several of its values.
        chosen = {len(of_test) * (2 * i + 1) // (2 * quick) for i in range(quick)}
        for number, item in enumerate(of_test):
            if number not in chosen:
                item.add_marker(pytest.mark.slow)
    _skip_gpu_items(items)


def _skip_gpu_items(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason=f"torch {torch.__version__} finds no GPU on this machine")
        for item in gpu_items:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_llama() -> PreTrainedModel:
    """The bundled model in float32. Shared by all tests: undo whatever you patch."""
    transformers = pytest.importorskip("transformers")
    import torch

    from kvpager.testing import tiny_llama_path

    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_llama_path(), dtype=torch.float32
    )
    return model.eval()
