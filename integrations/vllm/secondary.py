"""One of kvpager's stores as a secondary tier of vLLM's own `TieringOffloadingSpec`."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

import numpy as np

from kvpager import _validate as arguments
from kvpager.integrations.vllm.interface import (
    CacheHitSource,
    JobResult,
    Locality,
    LookupResult,
    Medium,
    OffloadingSpec,
    ReqContext,
    RequestOffloadingContext,
    SecondaryTierManager,
    TransferJob,
)
from kvpager.integrations.vllm.lower_tiers import Chunk
from kvpager.integrations.vllm.opening import current_model_config, open_lower_tiers
from kvpager.integrations.vllm.places import ABSENT, ASKED, Places, position
from kvpager.storage.tiers.urls import checked_tiers

_STORE = 0  # the number of the only store


class KvpagerSecondaryTier(SecondaryTierManager):  # type: ignore[misc]
    """Moves chunks between vLLM's host memory and a store. vLLM decides which, and when.

    A row of the host memory holds what vLLM's workers wrote. Threads ask, read and write the store;
    only `drain_jobs` and `shutdown` wait for them.
    """

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        *,
        store: str = "",
        model_id: str | None = None,
        locality: str | None = None,
        **unknown: Any,
    ) -> None:
        """Open the store of a URL for the rows of `primary_kv_view`, int8 [slots, bytes].

        `model_id` names the model in a shared store, by default with a digest of its files. Raises:
        `ValueError`, `TypeError` for a bad setting; errors of the store pass through.
        """
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        if unknown:
            name = min(unknown)
            raise ValueError(f"{name}: {tier_type} has no such setting. Use store, model_id")
        if not isinstance(store, str):
            raise TypeError(f"store={arguments.shown(store)}: expected a URL")
        checked_tiers(store)
        arguments.label("model_id", model_id)
        self.locality = None if locality is None else Locality(locality)
        config = offloading_spec.config
        copies = "one" if offloading_spec.replicated_layout else "each"
        form = "canonical" if config.canonical_layout else "direct"
        self._lower = open_lower_tiers(
            [store],
            np.asarray(primary_kv_view).view(np.uint8),
            config,
            current_model_config(),
            model_id=model_id,
            arrangement=f"vllm tiering, {form}, {copies} of the workers",
        )
        if self._lower.stores[_STORE].name == "disk":
            self.medium, self.cache_hit_source = Medium.STORAGE, CacheHitSource.DISK
        self._places = dict[str, Places]()  # by request
        self._finished = deque[JobResult]()  # threads append

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._places[req_context.req_id] = Places()
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._places.pop(req_context.req_id, None)

    def lookup(self, key: Any, req_context: ReqContext) -> LookupResult:
        place = self._places[req_context.req_id].look(key, req_context)
        if place == ASKED:
            return LookupResult.RETRY
        return LookupResult.MISS if place == ABSENT else LookupResult.HIT

    def on_schedule_end(self, context: Any) -> None:
        for places in self._places.values():
            places.ask(self._lower)

    def submit_load(self, job_metadata: TransferJob) -> None:
        job, slots = job_metadata, job_metadata.chunk_ids.tolist()
        chunks = [Chunk(key, slot, _STORE) for key, slot in zip(job.keys, slots, strict=True)]
        places = self._places.get(job.req_context.req_id)
        if places is not None:  # else the request has ended
            places.use_up(job.keys)
        self._lower.fetch(chunks, partial(self._loaded, job))

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Begin to save chunks, while at most a quarter of all rows is being saved.

        Otherwise a slow store would keep rows from vLLM's own stores and loads.
        """
        job = job_metadata
        pairs = list(zip(job.keys, job.chunk_ids.tolist(), strict=True))
        pairs.sort(key=lambda pair: position(job.req_context, pair[0]))
        chosen = pairs[: self._lower.save_room]
        is_whole = len(chosen) == len(pairs)
        if chosen:
            self._lower.save(chosen, lambda is_saved: self._saved(job, is_saved and is_whole))
        else:
            self._saved(job, is_whole)

    def _loaded(self, job: TransferJob, arrived: set[bytes]) -> None:
        """Report which chunks a load brought. A thread calls this."""
        keys = [key for key in job.keys if key in arrived]
        self._finished.append(JobResult(job.job_id, len(keys) == len(job.keys), keys))

    def _saved(self, job: TransferJob, is_saved: bool) -> None:
        self._finished.append(JobResult(job.job_id, is_saved))

    def get_finished_jobs(self) -> list[JobResult]:
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def drain_jobs(self) -> None:
        self._lower.drain()

    def shutdown(self) -> None:
        self._lower.close()
