"""Runs one engine of vLLM with its own attention and with kvpager's, in turns.

    python -m tests.support.vllm_attention_runs MODEL --block-size 32 --window-errors 1 -1

Prints one line of JSON: the tokens of each batch of prompts by each attention, the code of each
layer, and how many steps mixed prompts with decodes. An engine in a process of its own, as
`VLLM_ENABLE_V1_MULTIPROCESSING=1` makes it, has kvpager's turn only.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.vllm_scenarios import ENVIRONMENT, tokens

ROOT = Path(__file__).resolve().parents[2]
RAGGED = [tokens(100 + number, 20 + 37 * number % 600) for number in range(14)]
SHARED = [tokens(1, 300) + tokens(200 + number, 30 + 11 * number) for number in range(8)]
BATCHES = {"ragged": RAGGED, "shared": SHARED}


def plugin_path(folder: Path) -> str:
    """Write the entry points of the project as an installed package has them; return PYTHONPATH."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / "kvpager_of_tests-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvpager-of-tests\nVersion: 0\n")
    groups = "\n".join(
        f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in names.items())
        for group, names in project["entry-points"].items()
    )
    (info / "entry_points.txt").write_text(groups + "\n")
    return os.pathsep.join((str(folder), str(ROOT)))


def make_engine(model: str, *, block_size: int, dtype: str = "float32", **settings: Any) -> Any:
    from vllm import LLM

    chosen = {"max_model_len": 1024, "max_num_seqs": 32, "enforce_eager": True, **settings}
    return LLM(model, skip_tokenizer_init=True, dtype=dtype, block_size=block_size, **chosen)


def ask(llm: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=count, ignore_eos=True, temperature=0, detokenize=False)
    asked: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(asked, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


class Switch:
    """Lets vLLM's code or kvpager's serve all layers of an engine in this process."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        self.impls = [layer.impl for layer in layers.values() if hasattr(layer, "impl")]

    def use(self, which: str) -> None:
        """Empty the pages: the one code cannot read those of the other."""
        assert self._llm.reset_prefix_cache()
        for impl in self.impls:
            impl.reason = None if which == "kvpager" else "the test"

    def shift_windows(self, by: int) -> None:
        for impl in self.impls:
            if impl.sliding_window > 0:
                impl.sliding_window += by


def count_mixed_steps(impls: list[Any]) -> Iterator[int]:
    """Count the calls of the first layer whose rows have one query and more."""
    mixed, impl = 0, impls[0]
    forward = impl.forward

    def counted(*args: Any, **settings: Any) -> Any:
        nonlocal mixed
        metadata = settings["attn_metadata"] if "attn_metadata" in settings else args[5]
        if metadata is not None:
            mixed += len(set((metadata.query_start_loc.diff() > 1).tolist())) == 2
        return forward(*args, **settings)

    impl.forward = counted
    while True:
        yield mixed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--batched-tokens", type=int, default=256)
    parser.add_argument("--count", type=int, default=16, help="tokens of each reply")
    parser.add_argument("--window-errors", type=int, nargs="*", default=(), help="more turns")
    args = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    llm = make_engine(
        args.model, block_size=args.block_size, max_num_batched_tokens=args.batched_tokens
    )
    found: dict[str, Any] = {}
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
        switch = Switch(llm)
        found["layers"] = [[type(impl).__name__, impl.reason] for impl in switch.impls]
        mixed = count_mixed_steps(switch.impls)
        next(mixed)
        for turn in ("vllm", "kvpager"):
            switch.use(turn)
            found[turn] = {name: ask(llm, BATCHES[name], args.count) for name in BATCHES}
        for error in args.window_errors:
            switch.use("kvpager")
            switch.shift_windows(error)
            found[f"window {error:+}"] = {"ragged": ask(llm, RAGGED, args.count)}
            switch.shift_windows(-error)
        found["mixed"] = next(mixed)
    else:
        found["kvpager"] = {name: ask(llm, BATCHES[name], args.count) for name in BATCHES}
    llm.llm_engine.engine_core.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
