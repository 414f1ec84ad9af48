"""Shared by tests of the throughput command: a model, requests, a simulated clock."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from kvpager.bench.throughput.workload import Clock, Workload, synthetic
from tests.conformance.architectures import VOCAB
from tests.support import tiny_models

FIELDS = {
    "system", "requests", "repeats", "generated_tokens", "seconds", "tokens_per_s",
    "tokens_per_s_of_each_repeat", "over_kvpager", "first_token_s_median", "first_token_s_p99",
    "per_token_s_median", "kv_peak_bytes", "kv_live_share", "preempted_by_swap",
    "preempted_by_recompute", "prefix_hit_tokens", "tier_hit_tokens", "note",
}  # fmt: skip


def silent(count: int) -> None:
    """Report no progress."""


def tiny() -> Any:
    model = tiny_models.tiny_model("llama")
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model


def requests(count: int = 6, **changes: Any) -> Workload:
    options: dict[str, Any] = {"vocabulary": VOCAB, "seed": 1, **changes}
    return synthetic(count, (5, 30), 7, **options)


class FakeClock:
    """Time passes by sleeping alone."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.time += seconds

    def clock(self) -> Clock:
        return Clock(self.now, self.sleep)
