"""vLLM in its own process, and in another interpreter if asked."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from kvpager._validate import parse_memory
from kvpager.bench.throughput import vllm_child
from kvpager.bench.throughput.results import Memory, Run, Served
from kvpager.bench.throughput.systems import Options, Progress, interpreter
from kvpager.bench.throughput.workload import Workload
from kvpager.errors import KVPagerError

_GIB = 1 << 30
_ROOM = 1.25  # vLLM's blocks are larger, and the last block of a request is partly empty
_LOG_SHOWN = 2000  # characters


class Vllm:
    """vLLM with its defaults, and with as much memory, as many rows and threads as the others.

    What it says goes to a file, of which the end is shown where it fails.
    """

    def __init__(
        self, folder: Path, options: Options, workload: Workload, *, eager: bool = False
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvpager-vllm-")
        self._log = Path(self._folder.name) / "log"
        python = sys.executable if options.vllm_python is None else interpreter(options.vllm_python)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, vllm_child.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=_environment(folder, options, workload),
            )
        try:
            self._send(_settings(folder, options, workload, eager))
            self.block_size: int = self._receive()["block_size"]
        except BaseException:
            self.close()
            raise
        self._block_bytes = self.block_size * _token_bytes(folder)

    def run(self, workload: Workload, progress: Progress) -> Run:
        """Serve the requests. Raises: `KVPagerError` if vLLM ends."""
        self._send([list(item) for item in workload.items])
        while "done" in (found := self._receive()):
            progress(found["done"])
        served = [Served(*each) for each in found["served"]]
        slots = found["held_blocks"] * self.block_size
        memory = None
        if slots:
            memory = Memory(found["held_blocks"] * self._block_bytes, found["live_tokens"] / slots)
        return Run(
            max(each.finished for each in served),
            served,
            memory=memory,
            swapped=0,  # vLLM only recomputes
            recomputed=int(found["preempted"]),
            hit_tokens=int(found["hit_tokens"]),
        )

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError), self._process:
            pass  # closing stdin ends the process
        self._folder.cleanup()

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        message: dict[str, Any] = json.loads(line)
        return message

    def _failure(self) -> KVPagerError:
        code = self._process.wait()
        text = self._log.read_text(encoding="utf-8", errors="replace").strip()[-_LOG_SHOWN:]
        return KVPagerError(f"vLLM ended with exit code {code}; it said, at the end:\n{text}")


def _settings(folder: Path, options: Options, workload: Workload, eager: bool) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`."""
    return {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "enforce_eager": eager,
        "max_model_len": workload.longest,
        "max_num_seqs": options.max_num_seqs,
        "enable_prefix_caching": options.prefix_cache,
        "disable_log_stats": False,  # its metrics are read
    }


def _environment(folder: Path, options: Options, workload: Workload) -> dict[str, str]:
    memory = parse_memory(options.memory)
    if memory is None:
        memory = int(workload.blocks(128) * 128 * _token_bytes(folder) * _ROOM)
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    threads = options.threads or torch.get_num_threads()
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": str(-(-memory // _GIB)),  # whole GiB
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus[:threads])) or "auto",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    # PYTHONPATH would show it the wrong versions of its requirements.
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**inherited, **settings}


def _token_bytes(folder: Path) -> int:
    """Return the KV bytes of a token in all layers, from the saved configuration."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    dtype = getattr(torch, config.get("dtype") or "float32")
    return int(2 * config["num_hidden_layers"] * heads * dim * dtype.itemsize)
