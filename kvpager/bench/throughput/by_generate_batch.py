"""transformers' own continuous batching, as behind `generate_batch`, with arrival times."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from kvpager.bench.models import share_weights
from kvpager.bench.throughput.results import Run, Served
from kvpager.bench.throughput.systems import Options, Progress
from kvpager.bench.throughput.workload import PERFORMANCE, Clock, Workload, arrivals
from kvpager.errors import KVPagerError

_SPARE_BLOCKS = 8
_PATIENCE = 1.0  # seconds between checks that the manager's thread is alive


class ContinuousBatches:
    """One manager per run, made and warmed up before the first request arrives."""

    def __init__(self, model: Any, options: Options, clock: Clock = PERFORMANCE) -> None:
        self._model, self._clock, self._options = share_weights(model), clock, options

    @torch.no_grad()
    def run(self, workload: Workload, progress: Progress) -> Run:
        """Serve the requests. Raises: `KVPagerError` if a request fails or the thread ends."""
        found: dict[str, Any] = {}
        with self._manager(workload) as manager:
            start = self._clock.now()
            for number, item in arrivals(workload, start, self._clock):
                manager.add_request(
                    item.prompt,
                    request_id=str(number),
                    max_new_tokens=item.new_tokens,
                    record_timestamps=True,
                )
            while len(found) < len(workload.items):
                output = manager.get_result(timeout=_PATIENCE)
                if output is not None and output.is_finished():
                    _refuse_failed(output)
                    found[output.request_id] = output
                    progress(1)
                elif output is None and not manager.is_running():
                    raise KVPagerError("transformers' continuous batching ended unexpectedly")
        served = []
        for number, item in enumerate(workload.items):
            output = found[str(number)]
            times = [time - start for time in output.timestamps]
            served.append(Served(item.arrival, times[0], times[-1], output.generated_tokens))
        return Run(max(each.finished for each in served), served)

    def close(self) -> None:
        """Do nothing: a manager ends with its run."""

    def _config(self, workload: Workload) -> ContinuousBatchingConfig:
        config = ContinuousBatchingConfig(allow_block_sharing=self._options.prefix_cache)
        # By default it takes most of the machine's memory, and half a minute to do so; older ones
        # take it for the tokens of a step where these are left open.
        config.max_batch_tokens = self._options.max_batch_tokens
        # `block_size` before 5.18.
        page_size: Any = getattr(config, "page_size", None) or config.block_size
        config.num_blocks = workload.blocks(page_size) + _SPARE_BLOCKS
        return config

    @contextmanager
    def _manager(self, workload: Workload) -> Iterator[Any]:
        items = workload.items
        hints = WorkloadHints(
            max_prompt_length=max(len(item.prompt) for item in items),
            max_generated_length=max(item.new_tokens for item in items),
            num_requests=len(items),
        )
        # The manager logs its sizes at every start.
        talkative = logging.getLogger("ContinuousBatchingLogger")
        level = talkative.level
        talkative.setLevel(logging.ERROR)
        try:
            with self._model.continuous_batching_context_manager(
                generation_config=GenerationConfig(do_sample=False, pad_token_id=0),
                continuous_batching_config=self._config(workload),
                workload_hints=hints,
                timeout=5,
            ) as manager:
                yield manager
        finally:
            talkative.setLevel(level)


def _refuse_failed(output: Any) -> None:
    if output.error is not None:
        raise KVPagerError(f"transformers' continuous batching: {output.error}")
