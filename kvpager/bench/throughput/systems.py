"""The systems that can be compared, by name, and what they have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from kvpager import _validate as arguments
from kvpager.bench.throughput.results import Run
from kvpager.bench.throughput.workload import Workload

Progress = Callable[[int], object]  # is told how many more requests are done

SYSTEMS = {
    "kvpager": "kvpager's Engine",
    "kvpager-compiled": "kvpager's Engine, compiled with frozen weights",
    "generate": "transformers' generate, all requests in one padded batch",
    "generate-rows": "transformers' generate, padded batches of --batch-size requests",
    "generate_batch": "transformers' continuous batching, as behind generate_batch",
    "vllm": "vLLM as it comes",
    "vllm-eager": "vLLM with enforce_eager=True",
}
_VLLM = ("vllm", "vllm-eager")


class System(Protocol):
    """What serves requests. Made ready by its construction, which may take long."""

    def run(self, workload: Workload, progress: Progress) -> Run:
        """Serve the requests, each from when it is due. Nothing of an earlier run is known."""

    def close(self) -> None:
        """Give back what it holds. Idempotent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What systems are given. Those that have no such thing leave it alone.

    Args:
        memory: bytes of the pool of keys and values; None: what all requests together could need.
        host_memory: bytes of host memory to swap to.
        block_size: token slots of a block of kvpager's; others have their own default.
        max_num_seqs: the most rows at a time.
        max_batch_tokens: the most tokens of a step of kvpager and of `generate_batch`.
        prefix_cache: reuse what prompts have in common.
        batch_size: requests per padded batch of `generate-rows`.
        threads: of each system; None leaves torch's setting.
        vllm_python: an interpreter that can import vLLM, or the folder of its environment.
        engine: further arguments of `Engine`.
    """

    memory: int | str | None = None
    host_memory: int | str | None = None
    block_size: int = 16
    max_num_seqs: int = 256
    max_batch_tokens: int = 1024
    prefix_cache: bool = True
    batch_size: int | None = None
    threads: int | None = None
    vllm_python: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse what makes no sense. Raises `ValueError`, `TypeError`."""
        arguments.parse_memory(self.memory)
        arguments.parse_memory(self.host_memory, "host_memory")
        arguments.block_size(self.block_size)
        arguments.count("max_num_seqs", self.max_num_seqs, at_least=1)
        arguments.count("max_batch_tokens", self.max_batch_tokens, at_least=1)
        for name in ("batch_size", "threads"):
            value = getattr(self, name)
            if value is not None:
                arguments.count(name, value, at_least=1)
        if self.vllm_python is not None:
            interpreter(self.vllm_python)


def interpreter(path: str) -> str:
    """The Python that `path` names: the file itself, or the one in an environment's folder."""
    given = Path(path).expanduser()
    found = given / "bin" / "python" if given.is_dir() else given
    if not found.is_file():
        raise ValueError(f"vllm_python={path}: no interpreter and no environment.")
    return str(found.absolute())


def usual(options: Options, *, compiled: bool = False) -> list[str]:
    """The systems that there are here, where nobody says which. O(1)."""
    chosen = ["kvpager", "generate", "generate_batch"]
    if compiled:
        chosen.insert(1, "kvpager-compiled")
    if options.batch_size is not None:
        chosen.insert(chosen.index("generate") + 1, "generate-rows")
    if options.vllm_python is not None or find_spec("vllm") is not None:
        chosen += _VLLM
    return chosen


def check_names(names: Sequence[str], options: Options) -> list[str]:
    """`names`, each once. Raises `ValueError` for one that is unknown or cannot run here."""
    for name in names:
        if name not in SYSTEMS:
            raise ValueError(f"systems={name}: expected names from {', '.join(SYSTEMS)}.")
        if name == "generate-rows" and options.batch_size is None:
            raise ValueError("systems=generate-rows: set batch_size.")
        if name in _VLLM and options.vllm_python is None and find_spec("vllm") is None:
            raise ValueError(
                f"systems={name}: vLLM is not installed. Set vllm_python to its interpreter."
            )
    if not names:
        raise ValueError(f"systems: none given. Choose from {', '.join(SYSTEMS)}.")
    return list(dict.fromkeys(names))
