"""A KV connector for vLLM that copies within the step: no copy is under way between two steps.

schedule ── find prefix ── plan loads ── plan saves, offer their keys ──▶ Transfers
worker   ── load ── forward pass ── save ──▶ Done
scheduler ◀─ unpin the rows, pass new chunks on to the stores below
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kvpager.integrations.vllm.chunks import RequestChunks, chunk_groups, device_blocks
from kvpager.integrations.vllm.connector import check_engine
from kvpager.integrations.vllm.cross_stack import CrossStack, common_layout_of
from kvpager.integrations.vllm.interface import (
    CacheHitSource,
    GPULoadStoreSpec,
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    OffloadingConnector,
    OffloadingConnectorWorker,
    OffloadingEventsTracker,
    ReqContext,
    SupportsHMA,
    build_offloading_config,
    set_current_vllm_config,
)
from kvpager.integrations.vllm.options import Options
from kvpager.integrations.vllm.page_order import page_orders
from kvpager.integrations.vllm.prefix import find_prefix
from kvpager.integrations.vllm.spec import KvpagerOffloadingSpec
from kvpager.integrations.vllm.worker import Slots
from kvpager.storage.tiers.keyed import KeySlot


@dataclass
class Transfers(KVConnectorMetadata):  # type: ignore[misc]
    """The copies of one step, for the workers: rows and blocks of the device.

    Attributes:
        step: the number of the step.
        loads: copies before the forward pass.
        saves: copies after it.
    """

    step: int
    loads: list[tuple[Slots, GPULoadStoreSpec]] = field(default_factory=list)
    saves: list[tuple[GPULoadStoreSpec, Slots]] = field(default_factory=list)


@dataclass
class Done(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """A worker's report that its copies of a step have ended."""

    step: int

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Return this report: vLLM waits for all workers of a step, so one report is enough."""
        return self


@dataclass
class _Rows:
    """The rows of host memory that a step copies. They are pinned until the step has ended."""

    loaded: list[tuple[list[bytes], ReqContext]] = field(default_factory=list)
    saved: list[KeySlot] = field(default_factory=list)


class KvpagerConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Loads before the forward pass, and saves after it, with the parts of the offloading spec.

    When a step is planned, the chunks that it computes become hits for later steps. On a GPU,
    copies run in order on the current stream.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Check the engine and its layers. Raises: as `check_engine` and the spec do."""
        super().__init__(vllm_config, role, kv_cache_config)
        check_engine(vllm_config, kv_cache_config)
        config = build_offloading_config(vllm_config, kv_cache_config)
        self._groups = chunk_groups(config, kv_cache_config)
        options = Options.of(config.extra_config)
        self._common, self._cross_stack = None, None
        if options.cross_stack:
            self._common = common_layout_of(config, vllm_config, kv_cache_config)
        with set_current_vllm_config(vllm_config):
            self._spec = KvpagerOffloadingSpec(config, self._common)
            if role == KVConnectorRole.SCHEDULER:
                self._manager = self._spec.get_manager()
                if self._common is not None:
                    assert options.model_id is not None  # `Options.of`
                    self._cross_stack = CrossStack(self._common, options.model_id, self._manager)
        if self._spec.kv_events_config.self_describing_kv_events:
            raise ValueError(
                "self_describing_kv_events: KvpagerConnector has no such events. Use offload(...) "
                "without synchronous=True."
            )
        self._events = OffloadingEventsTracker(self._spec.kv_events_config)
        self._requests: dict[str, RequestChunks] = {}
        self._transfers, self._rows = Transfers(0), _Rows()  # of the step that is planned
        self._running: dict[int, _Rows] = {}  # by step

    @property
    def requires_kv_delivery(self) -> bool:
        """False: what is not saved is computed again. O(1)."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        layout: str | None = OffloadingConnector.get_required_kvcache_layout(vllm_config)
        return layout

    # ---------------------------------------------------------------- scheduler

    def on_new_request(self, request: Any) -> None:
        names = None if self._cross_stack is None else self._cross_stack.names(request)
        chunks = RequestChunks(request, self._groups, names)
        self._requests[request.request_id] = chunks
        self._manager.on_new_request(chunks.context)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        chunks = self._requests[request.request_id]
        chunks.start = num_computed_tokens
        if request.skip_reading_prefix_cache:
            return 0, False
        most = request.num_tokens - 1  # vLLM computes at least the last token
        chunks.add_keys(most)
        look_up = partial(self._manager.lookup, req_context=chunks.context)
        end = find_prefix(self._groups, chunks.keys, look_up, num_computed_tokens, most)
        return (None if end is None else end - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if not num_external_tokens:
            return
        chunks = self._requests[request.request_id]
        keys, device = chunks.to_load(chunks.start + num_external_tokens, blocks.get_block_ids())
        self._transfers.loads.append((self._manager.prepare_load(keys, chunks.context), device))
        self._rows.loaded.append((keys, chunks.context))

    def get_external_cache_hit_sources(
        self, request: Any, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        chunks = self._requests[request.request_id]
        number = min(range(len(self._groups)), key=lambda each: self._groups[each].reach or 0)
        group, end = self._groups[number], chunks.start + num_external_tokens
        sources = Counter[CacheHitSource]()
        for index in range(chunks.start // group.tokens, end // group.tokens):
            source = self._manager.get_load_source(chunks.keys[number][index], chunks.context)
            first = max(index * group.tokens, chunks.start)
            sources[source] += (index + 1) * group.tokens - first
        return dict(sources)

    def build_connector_meta(self, scheduler_output: Any) -> Transfers:
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            self._plan_saves(self._requests[request_id], num_tokens)
        self._manager.on_schedule_end(None)
        planned, rows = self._transfers, self._rows
        self._transfers, self._rows = Transfers(planned.step + 1), _Rows()
        if planned.loads or planned.saves:
            self._running[planned.step] = rows
        return planned

    def _plan_saves(self, chunks: RequestChunks, num_scheduled: int) -> None:
        request = chunks.request
        end = request.num_computed_tokens + num_scheduled
        if self._spec.offload_prompt_only:
            end = min(end, request.num_prompt_tokens)
        new = chunks.to_save(end, lambda: self._kv_cache_manager.get_block_ids(request.request_id))
        if not (keys := [key for part in new for key in part]):
            return
        output = self._manager.prepare_store(keys, chunks.context)
        if output is None or not output.keys_to_store:
            return
        chosen = set(output.keys_to_store)
        device = device_blocks(
            [[piece for key, piece in part.items() if key in chosen] for part in new]
        )
        self._transfers.saves.append((device, output.store_spec))
        self._rows.saved += self._manager.publish(output.keys_to_store)

    def update_connector_output(self, connector_output: Any) -> None:
        done = connector_output.kv_connector_worker_meta
        if done is None:
            return
        rows = self._running.pop(done.step)
        for keys, context in rows.loaded:
            self._manager.complete_load(keys, context)
        self._manager.save(rows.saved)
        if self._cross_stack is not None:
            self._cross_stack.note_saved(rows.saved)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        chunks = self._requests.pop(request.request_id)
        self._manager.on_request_finished(chunks.context)
        return False, None

    def take_events(self) -> Iterable[Any]:
        yield from self._events.take_events(self._manager.take_events())

    def reset_cache(self) -> bool:
        """Forget all chunks in host memory. Returns False, without effect, during copies."""
        if self._running:
            return False
        self._manager.reset_cache()
        for chunks in self._requests.values():
            chunks.num_offered = [0] * len(self._groups)
        return True

    def shutdown(self) -> None:
        if self.role == KVConnectorRole.SCHEDULER:
            self._manager.shutdown()

    # ---------------------------------------------------------------- worker

    def register_kv_caches(self, kv_caches: Any) -> None:
        if self._common is not None:
            self._spec.orders = page_orders(
                self._vllm_config, self._kv_cache_config, kv_caches, self._common
            )
        # vLLM's own code describes where the bytes of a block lie.
        registered = OffloadingConnectorWorker(self._spec, self._vllm_config, self._kv_cache_config)
        registered.register_kv_caches(kv_caches)
        self._worker = registered.worker

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        for host, device in self._get_connector_metadata().loads:
            self._worker.submit_load(0, host, device)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Return at once: loads ended before the forward pass."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        """Do nothing: all layers are saved after the forward pass."""

    def wait_for_save(self) -> None:
        for device, host in self._get_connector_metadata().saves:
            self._worker.submit_store(0, device, host)
        self._worker.get_finished()  # nothing waits for these

    def build_connector_worker_meta(self) -> Done | None:
        transfers = self._get_connector_metadata()
        return Done(transfers.step) if transfers.loads or transfers.saves else None
