"""transformers' `generate`: requests wait for a full batch, and rows for the longest row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from kvpager.bench.models import share_weights
from kvpager.bench.throughput.results import Memory, Run, Served
from kvpager.bench.throughput.systems import Progress
from kvpager.bench.throughput.workload import PERFORMANCE, Clock, Item, Workload, arrivals
from kvpager.integrations.huggingface.releases import cache_of

PAD = 0


class PaddedBatches:
    """Left-padded batches of `rows` requests in order of arrival; None: one batch of all.

    A request is done at its own last token, even if its batch continues for other rows.
    """

    def __init__(self, model: Any, rows: int | None, clock: Clock = PERFORMANCE) -> None:
        self._model, self._rows, self._clock = share_weights(model), rows, clock

    def run(self, workload: Workload, progress: Progress) -> Run:
        """Serve the requests."""
        start = self._clock.now()
        served: list[Served] = []
        memory: list[Memory] = []
        for items in self._batches(workload, start):
            stamps, tokens, used = self._generate(items)
            for row, item in enumerate(items):
                first, last = stamps[0] - start, stamps[item.new_tokens - 1] - start
                served.append(Served(item.arrival, first, last, tokens[row]))
            memory.append(used)
            progress(len(items))
        return Run(
            max(each.finished for each in served),
            served,
            memory=max(memory),
            swapped=0,
            recomputed=0,
            hit_tokens=0,
        )

    def close(self) -> None:
        """Do nothing: a batch ends with its call."""

    def _batches(self, workload: Workload, start: float) -> Iterator[list[Item]]:
        """Yield each batch when its last request has arrived."""
        rows = self._rows or len(workload.items)
        batch: list[Item] = []
        for number, item in arrivals(workload, start, self._clock):
            batch.append(item)
            if len(batch) == rows or number + 1 == len(workload.items):
                yield batch
                batch = []

    def _generate(self, items: list[Item]) -> tuple[list[float], list[list[int]], Memory]:
        """Return the time of each token, the tokens, and the memory of the final cache."""
        width = max(len(item.prompt) for item in items)
        stamps = _Stamps(self._clock)
        ids = [[PAD] * (width - len(item.prompt)) + item.prompt for item in items]
        mask = [[0] * (width - len(item.prompt)) + [1] * len(item.prompt) for item in items]
        device = self._model.device
        result = self._model.generate(
            torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max(item.new_tokens for item in items),
            logits_processor=LogitsProcessorList([stamps]),
            return_dict_in_generate=True,
        )
        rows = result.sequences[:, width:].tolist()
        tokens = [row[: item.new_tokens] for row, item in zip(rows, items, strict=True)]
        return stamps.times, tokens, _memory(cache_of(result), items)


def _memory(cache: Any, items: list[Item]) -> Memory:
    """Return the memory of a batch's final cache, its peak. O(layers + rows)."""
    layers = [layer for layer in cache.layers if torch.is_tensor(layer.keys)]
    held_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    columns = max(layer.keys.shape[2] for layer in layers)
    longest = max(item.new_tokens for item in items)
    # The last token's key and value are never computed: nothing follows it.
    live = sum(len(item.prompt) + longest - 1 for item in items if item.new_tokens == longest)
    return Memory(held_bytes, live / (columns * len(items)))


class _Stamps(LogitsProcessor):
    """A logits processor that records the time of each token and changes nothing."""

    def __init__(self, clock: Clock) -> None:
        self.times: list[float] = []
        self._clock = clock

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.times.append(self._clock.now())
        return scores
