"""Runs an engine of vLLM through the situations of a server, and prints what it answered.

    python -m tests.support.vllm_scenarios MODEL --offload '{"host_memory": "64MiB"}'

Prints one line of JSON: for each scenario the tokens and the numbers of cached tokens; what
kvpager's tiers hold in the end; and how many loaded blocks had the bytes that were saved.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
PREFIX = 1024  # tokens


def tokens(seed: int, count: int) -> list[int]:
    choices = random.Random(seed)
    return [choices.randrange(3, 2047) for _ in range(count)]


class Driver:
    """One engine of vLLM, and the scenarios.

    `answers` are the tokens of each reply; `cached` the cached tokens of each prompt.
    """

    def __init__(
        self,
        model: str,
        num_blocks: int,
        *,
        max_len: int = 2048,
        block_size: int = 32,
        dtype: str = "float32",
        **settings: Any,
    ) -> None:
        from vllm import LLM

        self.num_blocks, self.block_size = num_blocks, block_size
        self._adapters = Path(model).parent
        self.llm = LLM(
            model,
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=max_len,
            enforce_eager=True,
            block_size=self.block_size,
            num_gpu_blocks_override=num_blocks,
            max_num_seqs=16,
            max_num_batched_tokens=2048,
            disable_log_stats=False,
            **settings,
        )
        self.prefix = tokens(1, PREFIX)
        self.num_preempted = 0
        if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
            self._count_preemptions(self.llm.llm_engine.engine_core.engine_core.scheduler)

    def _count_preemptions(self, scheduler: Any) -> None:
        preempt = scheduler._preempt_request

        def counted(*args: Any, **settings: Any) -> Any:
            self.num_preempted += 1
            return preempt(*args, **settings)

        scheduler._preempt_request = counted

    def ask(
        self, prompts: Sequence[list[int]], count: int = 16, lora: Any = None, **extra: Any
    ) -> dict[str, Any]:
        asked = [{"prompt_token_ids": prompt, **extra} for prompt in prompts]
        outputs = self.llm.generate(asked, self.sampling(count), use_tqdm=False, lora_request=lora)
        return {
            "answers": [list(output.outputs[0].token_ids) for output in outputs],
            "cached": [output.num_cached_tokens for output in outputs],
        }

    def sampling(self, count: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(max_tokens=count, ignore_eos=True, temperature=0, detokenize=False)

    def settle(self) -> None:
        """Run a step more: vLLM begins its saves one step late."""
        self.ask([tokens(99, 40)], 4)

    def forget(self, host: bool = False) -> None:
        """Empty the prefix cache of the device, and with `host` the host memory."""
        self.settle()
        assert self.llm.reset_prefix_cache(reset_connector=host)

    # ------------------------------------------------------------- scenarios

    def cold_warm_reset(self) -> list[dict[str, Any]]:
        cold = self.ask([self.prefix + tokens(2, 40)])
        warm = self.ask([self.prefix + tokens(3, 40)])
        self.forget()
        return [cold, warm, self.ask([self.prefix + tokens(4, 40)])]

    def overflow(self) -> list[dict[str, Any]]:
        for number in range(self.num_blocks * self.block_size // 1000 + 2):
            self.ask([tokens(100 + number, 1000)], 1)
        return [self.ask([self.prefix + tokens(6, 40)])]

    def preemption(self) -> list[dict[str, Any]]:
        """Ask for more than fits on the device, so that requests are preempted."""
        each = self.num_blocks * self.block_size // 10
        return [self.ask([tokens(300 + number, each - 60) for number in range(10)], 96)]

    def salts(self) -> list[dict[str, Any]]:
        answers = []
        for salt in ("alice", "bob", "alice"):
            answers.append(self.ask([tokens(7, 600)], 8, cache_salt=salt))
            self.forget()
        return answers

    def salts_in_stores(self) -> list[dict[str, Any]]:
        """The same, when only the stores have the prompts."""
        answers = []
        for salt in ("alice", "bob", "alice"):
            answers.append(self.ask([tokens(7, 600)], 8, cache_salt=salt))
            self.forget(host=True)
        return answers

    def aborts(self) -> list[dict[str, Any]]:
        """Abort requests before their first step, during it, and after."""
        self.forget()
        engine, answers = self.llm.llm_engine, {}
        for number in range(6):
            prompt = {"prompt_token_ids": self.prefix + tokens(400 + number, 40)}
            engine.add_request(f"abort-{number}", prompt, self.sampling(24))
        engine.abort_request(["abort-0"])
        engine.step()
        engine.abort_request(["abort-1", "abort-2"])
        engine.step()
        engine.abort_request(["abort-3"])
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished and output.outputs[0].finish_reason == "length":
                    answers[output.request_id] = list(output.outputs[0].token_ids)
        return [{"answers": [answers[name] for name in sorted(answers)], "cached": []}]

    def stages(self) -> list[dict[str, Any]]:
        """Abort a request after each number of steps; only stores have its prompt."""
        cold = self.ask([self.prefix + tokens(5, 40)])
        engine = self.llm.llm_engine
        for steps in range(8):
            self.forget(host=True)
            prompt = {"prompt_token_ids": self.prefix + tokens(500 + steps, 40)}
            engine.add_request(f"stage-{steps}", prompt, self.sampling(24))
            for _ in range(steps):
                engine.step()
            engine.abort_request([f"stage-{steps}"])
            while engine.has_unfinished_requests():
                engine.step()
        self.forget(host=True)
        return [cold, self.ask([self.prefix + tokens(5, 40)])]

    def adapters(self) -> list[dict[str, Any]]:
        """Ask one prompt with two adapters and without, each twice; the device forgets."""
        from vllm.lora.request import LoRARequest

        requests = {
            name: LoRARequest(name, number, str(self._adapters / name))
            for number, name in enumerate(("lora-a", "lora-b"), 1)
        }
        answers = []
        for name in (None, "lora-a", "lora-b", "lora-a", None, "lora-b"):
            answers.append(self.ask([tokens(8, 600)], 12, requests.get(name or "")))
            self.forget()
        return answers

    def turns(self) -> list[dict[str, Any]]:
        """Hold a conversation; every second turn the device has lost it."""
        answers, history = [], tokens(600, 200)
        for turn in range(5):
            answers.append(self.ask([history], 24))
            history = history + answers[-1]["answers"][0] + tokens(610 + turn, 50)
            if turn % 2:
                self.forget()
        return answers

    def prefix_again(self) -> list[dict[str, Any]]:
        """Ask for the prefix in an engine that never computed it."""
        answers = [self.ask([self.prefix + tokens(4, 40)])]
        self.settle()
        return answers

    def other_prefix(self) -> list[dict[str, Any]]:
        answers = [self.ask([tokens(11, 805)])]
        self.settle()
        return answers

    def run(self, names: Sequence[str]) -> dict[str, Any]:
        results: dict[str, Any] = {}
        for name in names:
            scenario: Callable[[], Any] = getattr(self, name)
            results[name] = scenario()
        return results


SCENARIOS = ("cold_warm_reset", "overflow", "preemption", "salts", "aborts", "turns")


def device_state(llm: Any) -> dict[str, int]:
    """Return how many blocks of the device are free, and how many there are."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    return {"free": pool.get_num_free_blocks(), "blocks": pool.num_gpu_blocks}


def host_state(manager: Any) -> dict[str, int]:
    """Return what kvpager's tier holds, after a check that its books agree."""
    if manager._lower is not None:
        manager._lower.drain()
    tier = manager._tier
    tier.check()
    return {
        "pinned": sum(tier._pins),
        "writing": len(manager._writing) + tier.num_slots - tier.num_ready - len(tier._free),
        "chunks": tier.num_ready,
        "slots": tier.num_slots,
    }


def host_state_of(manager: Any) -> dict[str, int]:
    """Return `host_state`, or what vLLM's own tiering manager holds."""
    if not hasattr(manager, "primary_tier"):
        return host_state(manager)
    from tests.support.vllm_tiering import num_held

    manager.reset_cache()  # waits for transfers
    return {"pinned": num_held(manager), "writing": len(manager._jobs)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--offload", type=json.loads, help="settings of kvpager, as JSON")
    parser.add_argument("--tiering", type=json.loads, help="settings of vLLM's tiers, as JSON")
    parser.add_argument("--scheduler", help="a class of schedulers, in place of vLLM's")
    parser.add_argument("--blocks", type=int, default=160)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--engine", type=json.loads, default={}, help="settings of vLLM, as JSON")
    parser.add_argument(
        "--scenarios", default=",".join(SCENARIOS), help="their names; - reads them from stdin"
    )
    parser.add_argument("--spoil", action="store_true", help="exchange rows in each load")
    parser.add_argument(
        "--digests", type=Path, help="the digests of saved blocks, read and written"
    )
    return parser.parse_args()


def watched(args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Return the settings of an engine with tiers, and the watch over its bytes."""
    if args.offload is None and args.tiering is None:
        return {}, None
    from kvpager.integrations.vllm import offload
    from tests.support.vllm_bytes import ByteWatch

    known = {}
    if args.digests and args.digests.exists():
        known = json.loads(args.digests.read_text())
    if args.tiering is None:
        config, watch = offload(**args.offload), ByteWatch(known)
    else:
        from tests.support.vllm_tiering import CpuTieringSpec, TieringOffloadingManager, tiering

        config = tiering(args.tiering)
        watch = ByteWatch(known, CpuTieringSpec, TieringOffloadingManager)
    watch.install(args.spoil)
    return {"kv_transfer_config": config}, watch


def main() -> None:
    args = arguments()
    os.environ.update(
        {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    )
    is_here = os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    settings, watch = watched(args)
    if args.scheduler is not None:
        settings["scheduler_cls"] = args.scheduler
    driver = Driver(args.model, args.blocks, block_size=args.block_size, **settings, **args.engine)
    results: dict[str, Any] = {"answers": {}}
    if args.scenarios == "-":
        for line in sys.stdin:
            [answers] = driver.run([line.strip()]).values()
            print(json.dumps(answers), flush=True)
    else:
        results["answers"] = driver.run(args.scenarios.split(","))
    if is_here:
        driver.settle()
        results["device"] = device_state(driver.llm)
        results["preempted"] = driver.num_preempted
    if watch is not None and is_here:
        results["host"] = [host_state_of(manager) for manager in watch.managers]
        results["compared"], results["wrong"] = watch.num_compared, watch.wrong
        if args.digests:
            args.digests.write_text(json.dumps(watch.saved))
    driver.llm.llm_engine.engine_core.shutdown()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
