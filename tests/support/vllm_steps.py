"""vLLM's scheduler and model runner in small, around a `KvpagerConnector`."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from kvpager.storage.tiers.protocol import BlockStore
from tests.support.vllm_parts import (
    HostRows,
    caches_of,
    interface,
    model_config,
    offloading_config,
    opening,
    spec,
    synchronous,
)

PAGE = 16
HASH_TOKENS = 2
SHAPE = {"num_kv_heads": 2, "head_size": 4, "head_size_v": 4, "attention_chunk_size": None}
_names = itertools.count()


class Group(NamedTuple):
    """A group of layers: tokens of a block, and its window or None."""

    block_tokens: int = 4
    window: int | None = None

    @property
    def spec(self) -> Any:
        kind = interface.FullAttentionSpec if self.window is None else interface.SlidingWindowSpec
        made = object.__new__(kind)
        made.__dict__.update(sliding_window=self.window, extra_retained_tokens=0, **SHAPE)
        return made

    def first_block(self, num_tokens: int) -> int:
        """Return the first block that is read after `num_tokens`, by a loop over tokens."""
        if self.window is None:
            return 0
        # The next token reads itself and the `window - 1` tokens before it.
        read = [each for each in range(num_tokens) if each > num_tokens - self.window]
        return (read[0] if read else num_tokens) // self.block_tokens


def hash_of(tokens: Sequence[int]) -> bytes:
    return hashlib.sha256(bytes(tokens)).digest()


class Request(SimpleNamespace):
    """A request as vLLM's scheduler has it, and its blocks by group."""

    cache_salt: str | None = None
    lora_request: Any = None
    mm_features: Sequence[Any] = ()
    prompt_embeds: Any = None

    @property
    def all_token_ids(self) -> list[int]:
        tokens: list[int] = self.tokens
        return tokens

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def block_hashes(self) -> list[bytes]:
        ends = range(HASH_TOKENS, len(self.tokens) + 1, HASH_TOKENS)
        return [hash_of(self.tokens[:end]) for end in ends]


class Registered:
    """Stands for vLLM's code that describes the pages of the device."""

    def __init__(self, made: Any, vllm_config: Any, kv_cache_config: Any) -> None:
        self._spec = made

    def register_kv_caches(self, caches: Any) -> None:
        self.worker = self._spec.get_worker(caches)


class Engine:
    """Runs requests through a connector, and compares each loaded block with what it must hold.

    Attributes:
        num_compared: loaded blocks that had the right bytes.
    """

    def __init__(
        self,
        folder: Path,
        groups: Sequence[Group] = (Group(),),
        *,
        num_slots: int = 64,
        per_chunk: int = 1,
        stores: Sequence[BlockStore] = (),
        page_bytes: int = PAGE,
        **extra: Any,
    ) -> None:
        self.groups, self.stack = groups, ExitStack()
        self.folder = folder / f"rows-{next(_names)}"
        self.folder.mkdir()
        self.caches = caches_of([[number] for number in range(len(groups))], 64, page_bytes)
        known = [
            SimpleNamespace(
                kv_cache_spec=each.spec, is_eagle_group=False, layer_names=("layers.0",)
            )
            for each in groups
        ]
        made = [
            SimpleNamespace(
                group_id=number, tokens_per_block=each.block_tokens, layer_names=("layers.0",)
            )
            for number, each in enumerate(groups)
        ]
        if stores:
            extra = {"tiers": ["host:1MiB"], **extra}
        settings = offloading_config(
            {"host_memory": num_slots * 4096, **extra},
            groups=tuple(made),
            worker_kv_bytes_per_block=page_bytes,
            cache=SimpleNamespace(tokens_per_hash=HASH_TOKENS, blocks_per_chunk=per_chunk),
        )
        vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(
                **vars(model_config()), max_model_len=1024, hf_text_config=SimpleNamespace()
            ),
            cache_config=SimpleNamespace(enable_prefix_caching=True),
            kv_transfer_config=SimpleNamespace(),
        )
        for module, name, value in (
            (spec, "HostRows", partial(HostRows, folder=str(self.folder))),
            (opening, "open_stores", lambda tiers, layout: list(stores)),
            (synchronous, "build_offloading_config", lambda *_: settings),
            (synchronous, "OffloadingConnectorWorker", Registered),
        ):
            self.stack.enter_context(patch.object(module, name, value))
        self.scheduler, self.worker = (
            synchronous.KvpagerConnector(vllm_config, role, SimpleNamespace(kv_cache_groups=known))
            for role in (interface.KVConnectorRole.SCHEDULER, interface.KVConnectorRole.WORKER)
        )
        blocks = SimpleNamespace(get_block_ids=lambda name: self.requests[name].blocks)
        self.scheduler._kv_cache_manager = blocks
        self.worker.register_kv_caches(self.caches)
        self.manager = self.scheduler._manager
        self.requests: dict[str, Request] = {}
        self.num_compared = 0
        self._free = list(range(63, 0, -1))  # 0 is vLLM's null block

    # ------------------------------------------------------------- scheduler

    def arrive(self, tokens: Sequence[int], **settings: Any) -> Request:
        request = Request(
            request_id=f"request-{next(_names)}",
            tokens=list(tokens),
            num_prompt_tokens=len(tokens),
            num_computed_tokens=0,
            skip_reading_prefix_cache=False,
            blocks=tuple([] for _ in self.groups),
            loaded=[],
            **settings,
        )
        self.requests[request.request_id] = request
        self.scheduler.on_new_request(request)
        return request

    def match(self, request: Request, start: int = 0) -> int | None:
        found, is_async = self.scheduler.get_num_new_matched_tokens(request, start)
        assert is_async is False
        return found  # type: ignore[no-any-return]

    def admit(self, request: Request, num_external: int, start: int = 0) -> None:
        """Give a request its blocks. The device's own cache has `start` tokens of it."""
        end = start + num_external
        for number, group in enumerate(self.groups):
            size = group.block_tokens
            request.blocks[number][:] = [0] * (group.first_block(end))
            self._extend(request, number, request.num_tokens)
            for index in range(group.first_block(end), start // size):
                self._write(request, number, index)
            request.loaded += [
                (number, index) for index in range(group.first_block(end), end // size)
            ][max(start // size - group.first_block(end), 0) :]
        request.num_computed_tokens = end
        held = SimpleNamespace(get_block_ids=lambda: request.blocks)
        self.scheduler.update_state_after_alloc(request, held, num_external)

    def plan(self, scheduled: dict[str, int]) -> Any:
        output = SimpleNamespace(num_scheduled_tokens=scheduled)
        return self.scheduler.build_connector_meta(output)

    def _extend(self, request: Request, number: int, num_tokens: int) -> None:
        blocks = request.blocks[number]
        while len(blocks) * self.groups[number].block_tokens < num_tokens:
            blocks.append(self._free.pop())

    # ------------------------------------------------------------- worker

    def execute(self, planned: Any, scheduled: dict[str, int]) -> Any:
        """Load, check what was loaded, compute the scheduled tokens, save. Returns what is told."""
        assert all(device.block_ids.all() for _, device in planned.loads)  # no null block
        self.worker.bind_connector_metadata(planned)
        self.worker.start_load_kv(None)
        for name in scheduled:
            request = self.requests[name]
            for number, index in request.loaded:
                got = self.caches.tensors[number].tensor[request.blocks[number][index]].numpy()
                assert got.tobytes() == self._content(request, number, index)
                self.num_compared += 1
            request.loaded = []
            end = request.num_computed_tokens + scheduled[name]
            for number, group in enumerate(self.groups):
                first = request.num_computed_tokens // group.block_tokens
                for index in range(first, end // group.block_tokens):
                    self._write(request, number, index)
        self.worker.wait_for_save()
        told = self.worker.build_connector_worker_meta()
        self.worker.clear_connector_metadata()
        return told

    def _content(self, request: Request, number: int, index: int) -> bytes:
        end = (index + 1) * self.groups[number].block_tokens
        return hash_of([number, *request.tokens[:end]])[:PAGE]

    def _write(self, request: Request, number: int, index: int) -> None:
        content = np.frombuffer(self._content(request, number, index), np.int8)
        page = self.caches.tensors[number].tensor[request.blocks[number][index]].numpy()
        page[:] = content

    # ------------------------------------------------------------- both

    def end(self, told: Any, scheduled: dict[str, int]) -> None:
        """Advance the requests of an executed step, and free blocks before their windows."""
        self.scheduler.update_connector_output(SimpleNamespace(kv_connector_worker_meta=told))
        for name, count in scheduled.items():
            request = self.requests[name]
            request.num_computed_tokens += count
            for blocks, group in zip(request.blocks, self.groups, strict=True):
                for index in range(group.first_block(request.num_computed_tokens)):
                    if blocks[index]:
                        self._free.append(blocks[index])
                        blocks[index] = 0

    def step(self, *pairs: tuple[Request, int]) -> None:
        """Run one step for admitted requests, each with its number of tokens."""
        scheduled = {request.request_id: count for request, count in pairs}
        planned = self.plan(scheduled)
        self.end(self.execute(planned, scheduled), scheduled)

    def serve(self, tokens: Sequence[int], *, step_tokens: int = 1000, **settings: Any) -> int:
        """Run a request from its arrival to its end, saves included.

        Returns the tokens that were loaded.
        """
        request = self.arrive(tokens, **settings)
        while (found := self.match(request)) is None:
            self.step()
            self.settle()
        self.admit(request, found)
        while left := request.num_tokens - request.num_computed_tokens:
            self.step((request, min(left, step_tokens)))
        self.finish(request)
        self.settle()
        return found

    def lose(self, request: Request, group: int, chunks: Iterable[int]) -> None:
        """Let chunks of a request that was looked up leave the host memory."""
        keys = self.scheduler._requests[request.request_id].keys[group]
        slots = self.manager._tier.pin([keys[number] for number in chunks]).tolist()
        self.manager._tier.discard(slots)
        self.manager._tier.unpin(slots)

    def preempt(self, request: Request) -> None:
        for blocks in request.blocks:
            self._free += [block for block in blocks if block]
            blocks.clear()
        request.num_computed_tokens, request.loaded = 0, []

    def finish(self, request: Request) -> None:
        answer = self.scheduler.request_finished_all_groups(request, request.blocks)
        assert answer == (False, None)
        self.preempt(request)
        del self.requests[request.request_id]

    def settle(self) -> None:
        """Wait for the stores."""
        if self.manager._lower is not None:
            self.manager._lower.drain()

    def close(self) -> None:
        """End all requests; check that nothing is pinned or half written, and no block is held."""
        for request in list(self.requests.values()):
            self.finish(request)
        self.settle()
        tier = self.manager._tier
        tier.check()
        assert not any(tier._pins)
        assert not self.manager._writing
        assert not self.scheduler._running
        assert sorted(self._free) == list(range(1, 64))
        self.scheduler.shutdown()
        self.stack.close()
