"""The systems by name, their common options and protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kvpager.bench.options import option

if TYPE_CHECKING:
    from kvpager.bench.throughput.results import Run
    from kvpager.bench.throughput.workload import Workload
    from kvpager.engine.config import EngineConfig

Progress = Callable[[int], object]  # called with the number of newly finished requests

SYSTEMS = (
    "kvpager",
    "kvpager-compiled",
    "generate",
    "generate-rows",
    "generate_batch",
    "vllm",
    "vllm-eager",
)
_VLLM = ("vllm", "vllm-eager")


class System(Protocol):
    """A system that serves requests. Construction prepares it and may take minutes."""

    def run(self, workload: Workload, progress: Progress) -> Run:
        """Serve each request from its arrival time, with nothing cached from earlier runs."""

    def close(self) -> None:
        """Release all memory and processes. Idempotent."""


_HARDWARE, _MEMORY, _TIERS = "Model and hardware", "Memory and batching", "Tiers of kvpager"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of all systems. A system ignores options that it lacks."""

    threads: int | None = option(
        _HARDWARE, "CPU threads per system.", "N", shown="torch's own choice"
    )
    batch_size: int | None = option(
        "Systems", "Add generate-rows: padded batches of this many requests.", "ROWS"
    )
    vllm_python: str | None = option(
        "Systems", "Python interpreter or environment with vLLM.", "PATH"
    )
    memory: int | str | None = option(
        _MEMORY,
        "KV cache of kvpager and vLLM, such as 64MiB.",
        "SIZE",
        shown="room for all requests at once",
    )
    host_memory: int | str | None = option(
        _MEMORY, "Host memory that kvpager swaps to.", "SIZE", shown="none"
    )
    block_size: int = option(_MEMORY, "Tokens per block of kvpager, a power of two.", "TOKENS", 16)
    max_num_seqs: int = option(_MEMORY, "Maximum concurrent sequences.", "N", 256)
    max_batch_tokens: int = option(
        _MEMORY, "Maximum tokens per step of kvpager and generate_batch.", "TOKENS", 1024
    )
    prefix_cache: bool = option(_MEMORY, "Reuse the KV of shared prefixes.", default=True)
    tiers: list[str] | None = option(
        _TIERS,
        "Store for prompts that leave the device, such as host:4GiB; repeatable, the fastest "
        "first. Each run has a namespace of its own.",
        "URL",
        shown="none",
    )
    secret_file: str | None = option(
        _TIERS, "Encrypt what stores get with the secret in this file.", "FILE", shown="a digest"
    )
    engine: dict[str, Any] = field(default_factory=dict)  # further settings of kvpager's engine

    def with_engine(self, **settings: Any) -> Options:
        """Return the options with further settings of kvpager's engine. O(settings)."""
        return replace(self, engine=self.engine | settings)

    def engine_config(self) -> EngineConfig:
        """Return the settings of kvpager's engine. O(1).

        Raises: `ValueError`, `TypeError` for settings that do not fit; `OSError` for a secret that
        cannot be read; `ModuleNotFoundError` for a missing extra.
        """
        from kvpager.engine.config import EngineConfig
        from kvpager.storage.tiers.seals import Encrypted

        seal = None
        if self.secret_file is not None:
            if not self.tiers:
                raise ValueError(f"secret_file={self.secret_file}: of use with tiers only.")
            seal = Encrypted(Path(self.secret_file).read_bytes())
        names = "memory", "host_memory", "block_size", "max_num_seqs", "max_batch_tokens"
        own = {name: getattr(self, name) for name in (*names, "prefix_cache")}
        return EngineConfig(**own | {"tiers": self.tiers or (), "seal": seal} | self.engine)

    def check(self) -> None:
        """Check every option. Raises: as `engine_config`."""
        from kvpager import _validate as arguments

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
        self.engine_config()


def interpreter(path: str) -> str:
    """Return the interpreter at `path`, a file or the folder of an environment."""
    given = Path(path).expanduser()
    found = given / "bin" / "python" if given.is_dir() else given
    if not found.is_file():
        raise ValueError(f"vllm_python={path}: no interpreter and no environment.")
    return str(found.absolute())


def usual(options: Options, *, compiled: bool = False) -> list[str]:
    """Return the systems to measure by default: those installed. O(1)."""
    chosen = ["kvpager", "generate", "generate_batch"]
    if compiled:
        chosen.insert(1, "kvpager-compiled")
    if options.batch_size is not None:
        chosen.insert(chosen.index("generate") + 1, "generate-rows")
    if options.vllm_python is not None or find_spec("vllm") is not None:
        chosen += _VLLM
    return chosen


def check_names(names: Sequence[str], options: Options) -> list[str]:
    """Return `names` without repeats. Raises `ValueError` for an unknown or missing system."""
    for name in names:
        if name not in SYSTEMS:
            raise ValueError(f"systems={name}: expected names from {', '.join(SYSTEMS)}.")
        if name == "generate-rows" and options.batch_size is None:
            raise ValueError("systems=generate-rows: set batch_size.")
        if name in _VLLM and options.vllm_python is None and find_spec("vllm") is None:
            raise ValueError(
                f"systems={name}: vLLM is not installed. Set vllm_python to its interpreter."
            )
    if options.tiers and {"kvpager", "kvpager-compiled"} <= {*names}:
        raise ValueError("tiers: kvpager and kvpager-compiled cannot share them. Measure one.")
    if not names:
        raise ValueError(f"systems: none given. Choose from {', '.join(SYSTEMS)}.")
    return list(dict.fromkeys(names))
