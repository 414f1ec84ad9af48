"""vLLM as a separate program, in an interpreter without kvpager.

The protocol is JSON lines. The first line of stdin has the arguments of `vllm.LLM`. Every further
line is a list of requests. The program answers on stdout with `{"done": n}` as requests finish,
then with the result. vLLM's own output goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

_METRICS_EVERY = 0.1  # seconds; a look takes some milliseconds


class Served:
    """A model that vLLM serves."""

    def __init__(self, settings: dict[str, Any], answer: Callable[[Any], None]) -> None:
        import vllm
        from vllm.sampling_params import RequestOutputKind

        self._answer = answer
        self._params, self._kind = vllm.SamplingParams, RequestOutputKind.DELTA
        self._llm = vllm.LLM(**settings)
        self._engine = self._llm.llm_engine
        config = self._engine.vllm_config.cache_config
        self.num_blocks = int(config.num_gpu_blocks)
        self.block_size = int(config.block_size)

    def replay(self, items: list[list[Any]]) -> dict[str, Any]:
        """Serve requests `[arrival, prompt, new tokens]` from their arrival times."""
        self._llm.reset_prefix_cache()
        before = self._counts()
        self._tokens: list[list[int]] = [[] for _ in items]
        self._first = [0.0] * len(items)
        self._last = [0.0] * len(items)
        self._busiest: tuple[float, int] = (0.0, 0)
        self._start = time.perf_counter()
        self._serve(items)
        after = self._counts()
        share, live = self._busiest
        arrivals = [item[0] for item in items]
        return {
            "served": list(zip(arrivals, self._first, self._last, self._tokens, strict=True)),
            "held_blocks": round(share * self.num_blocks),
            "live_tokens": live,
            "preempted": after["vllm:num_preemptions"] - before["vllm:num_preemptions"],
            "hit_tokens": after["vllm:prefix_cache_hits"] - before["vllm:prefix_cache_hits"],
        }

    def _serve(self, items: list[list[Any]]) -> None:
        num_submitted, looked = 0, 0.0
        while num_submitted < len(items) or self._engine.has_unfinished_requests():
            now = time.perf_counter() - self._start
            while num_submitted < len(items) and items[num_submitted][0] <= now:
                self._submit(num_submitted, items[num_submitted])
                num_submitted += 1
            if not self._engine.has_unfinished_requests():
                time.sleep(items[num_submitted][0] - now)
                continue
            done = 0
            for output in self._engine.step():
                done += self._note(output)
            if done:
                self._answer({"done": done})
            if time.perf_counter() - looked > _METRICS_EVERY:
                looked = time.perf_counter()
                self._look(items[:num_submitted])

    def _submit(self, number: int, item: list[Any]) -> None:
        params = self._params(
            temperature=0.0,
            max_tokens=item[2],
            ignore_eos=True,
            detokenize=False,
            output_kind=self._kind,
        )
        self._engine.add_request(str(number), {"prompt_token_ids": item[1]}, params)

    def _note(self, output: Any) -> bool:
        """Record a step's output of a request; return True if the request is done."""
        number, now = int(output.request_id), time.perf_counter() - self._start
        new = list(output.outputs[0].token_ids)
        if new:
            if not self._tokens[number]:
                self._first[number] = now
            self._tokens[number] += new
            self._last[number] = now
        return bool(output.finished)

    def _look(self, items: list[list[Any]]) -> None:
        """Record the peak. Metrics and tokens may be a step apart."""
        share = self._counts()["vllm:kv_cache_usage_perc"]
        if share > self._busiest[0]:
            going = [
                len(item[1]) + len(tokens)
                for item, tokens in zip(items, self._tokens, strict=False)
                if tokens and len(tokens) < item[2]
            ]
            self._busiest = share, sum(going)

    def _counts(self) -> dict[str, float]:
        return {
            metric.name: metric.value
            for metric in self._llm.get_metrics()
            if hasattr(metric, "value") and metric.name in _COUNTS
        }


_COUNTS = ("vllm:num_preemptions", "vllm:prefix_cache_hits", "vllm:kv_cache_usage_perc")


def main() -> None:
    """Serve until stdin ends."""
    # vLLM and its children print to stdout. The parent has to read answers only.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    incoming = map(json.loads, sys.stdin)
    served = Served(next(incoming), answer)
    answer({"block_size": served.block_size})
    for items in incoming:
        answer(served.replay(items))


if __name__ == "__main__":
    # Modules of this folder have common names; vLLM must not import them.
    sys.path.pop(0)
    main()
