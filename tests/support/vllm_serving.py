"""vLLM's scheduler without a model: random requests, whose tokens follow from what blocks hold.

The state of a token is a hash of its id and of the state before it, written to its slot. The next
token is a hash of all states that the block table shows. So a wrong block gives wrong tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch

BLOCK_SIZE = 16
VOCABULARY = 2000


@dataclass
class Record:
    """What a run showed: of each step the tokens of each request, and who was preempted."""

    steps: list[tuple[dict[str, int], list[str]]] = field(default_factory=list)
    cached: dict[str, int] = field(default_factory=dict)  # at the first start
    answers: dict[str, list[int]] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)  # blocks, after each step
    num_preempted: int = 0


def make_scheduler(kind: type, model: Path, num_blocks: int, max_tokens: int) -> Any:
    """Return a scheduler of vLLM for a pool of `num_blocks`."""
    from vllm.config import (
        CacheConfig,
        DeviceConfig,
        ModelConfig,
        SchedulerConfig,
        VllmConfig,
    )
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    cache = CacheConfig(block_size=BLOCK_SIZE)
    cache.num_gpu_blocks, cache.enable_prefix_caching = num_blocks, True
    config = VllmConfig(
        model_config=ModelConfig(
            str(model), skip_tokenizer_init=True, dtype="float32", max_model_len=1024
        ),
        scheduler_config=SchedulerConfig(
            max_num_seqs=8,
            max_num_batched_tokens=max_tokens,
            max_model_len=1024,
            is_encoder_decoder=False,
            async_scheduling=False,
        ),
        cache_config=cache,
        device_config=DeviceConfig("cpu"),
    )
    spec = FullAttentionSpec(BLOCK_SIZE, num_kv_heads=1, head_size=64, dtype=torch.float32)
    pool = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    return kind(
        vllm_config=config,
        kv_cache_config=pool,
        log_stats=False,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
    )


class Serving:
    """Serves random requests with one scheduler."""

    def __init__(self, scheduler: Any, num_blocks: int) -> None:
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self.scheduler = scheduler
        self.slots = np.full(num_blocks * BLOCK_SIZE, -1, np.int64)
        self.record = Record()

    def run(self, seed: int, num_requests: int) -> Record:
        """Let requests arrive, end and be aborted at random; return what happened."""
        source, waiting, live = random.Random(seed), num_requests, list[str]()
        roots = [[source.randrange(VOCABULARY) for _ in range(150)] for _ in range(4)]
        while waiting or self.scheduler.has_unfinished_requests():
            for _ in range(min(waiting, source.choice((0, 0, 1, 3)))):
                live.append(self._add(source, roots, num_requests - waiting))
                waiting -= 1
            if live and source.random() < 0.02:
                self._abort(live.pop(source.randrange(len(live))))
            self._step()
        return self.record

    def _add(self, source: random.Random, roots: list[list[int]], number: int) -> str:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        root = source.choice(roots)[: source.randrange(1, 150)]
        rest = [source.randrange(VOCABULARY) for _ in range(source.randrange(1, 60))]
        name = f"request-{number}"
        request = Request(
            request_id=name,
            prompt_token_ids=root + rest,
            sampling_params=SamplingParams(max_tokens=source.randrange(1, 60), ignore_eos=True),
            pooling_params=None,
            cache_salt=source.choice((None, None, "alice", "bob")),
            block_hasher=self._hasher,
            arrival_time=float(number),
        )
        self.scheduler.add_request(request)
        return name

    def _abort(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def _step(self) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        planned = self.scheduler.schedule()
        record, names = self.record, list(planned.num_scheduled_tokens)
        preempted = sorted(planned.preempted_req_ids or ())
        record.num_preempted += len(preempted)
        record.steps.append((dict(planned.num_scheduled_tokens), preempted))
        computed = {each.req_id: each.num_computed_tokens for each in planned.scheduled_new_reqs}
        record.cached |= computed
        again = planned.scheduled_cached_reqs
        computed |= dict(zip(again.req_ids, again.num_computed_tokens, strict=True))
        sampled = [self._compute(name, computed[name], planned) for name in names]
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        self.scheduler.update_from_output(planned, output)
        record.free.append(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def _compute(self, name: str, start: int, planned: Any) -> list[int]:
        """Write the states of the new tokens of a request; return its next token, if it is time."""
        request = self.scheduler.requests[name]
        stop = start + planned.num_scheduled_tokens[name]
        (table,) = self.scheduler.kv_cache_manager.get_block_ids(name)
        places = np.arange(stop)
        slots = np.array(table)[places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE
        state = int(self.slots[slots[start - 1]]) if start else 7
        for place in range(start, stop):
            state = crc32(request.all_token_ids[place].to_bytes(4, "little"), state)
            self.slots[slots[place]] = state
        assert (self.slots[slots] >= 0).all(), "an unwritten slot is read"
        if stop < request.num_tokens:
            return []
        token = crc32(self.slots[slots].tobytes()) % VOCABULARY
        self.record.answers.setdefault(name, []).append(token)
        return [token]
