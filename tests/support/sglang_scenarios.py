"""Runs an engine of SGLang through the situations of a server, and prints what it answered.

    python -m tests.support.sglang_scenarios MODEL --offload '{"tiers": "host:64MiB"}'

Prints one line of JSON: for each scenario the tokens of the replies, and the tokens of each prompt
that were cached: on the device, in SGLang's host memory, in kvpager's stores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
PREFIX, PAGE, DEVICE_TOKENS = 512, 16, 2048


def tokens(seed: int, count: int) -> list[int]:
    choices = random.Random(seed)
    return [choices.randrange(3, 2047) for _ in range(count)]


class Driver:
    """One engine of SGLang, and the scenarios."""

    def __init__(self, model: str, **settings: Any) -> None:
        import sglang

        self.engine = sglang.Engine(
            **{
                "model_path": model,
                "skip_tokenizer_init": True,
                "device": "cpu",
                "dtype": "float32",
                "attention_backend": "torch_native",
                "grammar_backend": "none",
                "disable_cuda_graph": True,
                "disable_overlap_schedule": True,
                "mem_fraction_static": 0.3,
                "max_total_tokens": DEVICE_TOKENS,
                "context_length": 4096,
                "page_size": PAGE,
                "log_level": "warning",
                "sleep_on_idle": True,
                **settings,
            }
        )

    def ask(self, prompts: Sequence[list[int]], count: int = 8, **more: Any) -> dict[str, Any]:
        settings = {"max_new_tokens": count, "temperature": 0, "ignore_eos": True}
        replies = self.engine.generate(input_ids=list(prompts), sampling_params=settings, **more)
        cached = [reply["meta_info"].get("cached_tokens_details") or {} for reply in replies]
        return {
            "answers": [reply["output_ids"] for reply in replies],
            "cached": [[each.get(k, 0) for k in ("device", "host", "storage")] for each in cached],
        }

    def forget(self) -> None:
        """Empty the device and SGLang's host memory, when all pages are saved."""
        for _ in range(600):
            if self.engine.flush_cache().success:
                return
            time.sleep(0.1)  # SGLang has no call that waits for its transfers
        raise TimeoutError("SGLang does not become idle")

    def reset(self) -> list[dict[str, Any]]:
        """Ask for a prefix when it is new, when it is on the device, and when it is gone."""
        prefix, asked = tokens(1, PREFIX), []
        for seed in (2, 3, 4):
            asked.append(self.ask([prefix + tokens(seed, 40)]))
            if seed != 2:
                self.forget()
        return asked

    def overflow(self) -> list[dict[str, Any]]:
        """Ask for a prefix that others pushed out of the device and of host memory."""
        asked = [self.ask([tokens(5, PREFIX)])]
        for seed in range(10, 18):
            self.ask([tokens(seed, 700)], 1)
        return [*asked, self.ask([tokens(5, PREFIX) + tokens(6, 40)])]

    def salts(self) -> list[dict[str, Any]]:
        asked = []
        for salt in ("alice", "bob", "alice"):
            asked.append(self.ask([tokens(20, PREFIX) + tokens(21, 8)], cache_salt=[salt]))
            self.forget()
        return asked

    def together(self) -> list[dict[str, Any]]:
        """Ask for prompts of one prefix at once, twice: new, and after all is gone."""
        prompts = [tokens(30, 256) + tokens(seed, 64) for seed in range(31, 36)]
        first = self.ask(prompts, 16)
        self.forget()
        return [first, self.ask(prompts, 16)]

    def turns(self) -> list[dict[str, Any]]:
        history, asked = tokens(40, 200), []
        for turn in range(4):
            asked.append(self.ask([history], 16))
            history = history + asked[-1]["answers"][0] + tokens(41 + turn, 50)
            if turn % 2:
                self.forget()
        return asked

    def aborts(self) -> list[dict[str, Any]]:
        """Abort a request before its first token and after others; only stores have its prompt."""
        prefix = tokens(60, PREFIX)
        first = self.ask([prefix + tokens(61, 40)])
        for count in range(4):
            self.forget()
            self.engine.loop.run_until_complete(
                self._abort(f"abort-{count}", prefix + tokens(62 + count, 40), count)
            )
        self.forget()
        return [first, self.ask([prefix + tokens(61, 40)])]

    async def _abort(self, name: str, prompt: list[int], count: int) -> None:
        """Abort a request after `count` of its 64 tokens."""
        manager = self.engine.tokenizer_manager
        settings = {"max_new_tokens": 64, "temperature": 0, "ignore_eos": True}
        replies = await self.engine.async_generate(
            input_ids=prompt, sampling_params=settings, stream=True, rid=name
        )
        reply = asyncio.ensure_future(anext(replies))
        while name not in manager.rid_to_state:
            await asyncio.sleep(0)
        for _ in range(count):
            await reply
            reply = asyncio.ensure_future(anext(replies))
        manager.abort_request(name)
        with contextlib.suppress(StopAsyncIteration):
            while True:
                ended = (await reply)["meta_info"]
                reply = asyncio.ensure_future(anext(replies))
        assert ended["finish_reason"]["type"] == "abort", ended


SCENARIOS = ("reset", "overflow", "salts", "together", "turns", "aborts")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--offload", type=json.loads, help="arguments of kvpager's `offload`")
    parser.add_argument("--bytes", type=Path, help="compare the bytes of pages, noted in this file")
    parser.add_argument("--spoil", action="store_true", help="exchange pages in loads")
    parser.add_argument("--only", default=",".join(SCENARIOS))
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    settings = {} if arguments.offload is None else offloaded(arguments)
    driver = Driver(arguments.model, **settings)
    answers = {name: getattr(driver, name)() for name in arguments.only.split(",")}
    driver.engine.shutdown()
    print(json.dumps(answers))


def offloaded(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the engine."""
    from kvpager.integrations.sglang import offload
    from tests.support import sglang_bytes

    settings = {"hicache_ratio": 1.2, "hicache_io_backend": "direct", **arguments.offload}
    made = offload(**settings)
    if arguments.bytes is not None:
        os.environ[sglang_bytes.FILE] = str(arguments.bytes)
        if arguments.spoil:
            os.environ[sglang_bytes.SPOIL] = "1"
        name = "hicache_storage_backend_extra_config"
        watched = {"module_path": sglang_bytes.__name__, "class_name": "WatchedHiCache"}
        made[name] = json.dumps({**json.loads(made[name]), **watched})
    return made


if __name__ == "__main__":
    main()
