"""Compares the bytes of each block that vLLM loads with those that it saved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from kvpager.integrations.vllm.manager import KvpagerOffloadingManager
from kvpager.integrations.vllm.spec import KvpagerOffloadingSpec
from kvpager.integrations.vllm.worker import KvpagerOffloadingWorker


class ByteWatch:
    """Follows all transfers of an engine in this process, by vLLM's own description of its pages.

    Attributes:
        saved: the digest of each saved block, by the key of its chunk and its place in it.
        num_compared: blocks that were loaded, and had been saved.
        wrong: those of them whose bytes were others, or that another engine saved: each with the
            digest of what was loaded.
    """

    def __init__(
        self,
        saved: dict[str, str] | None = None,
        spec: Any = KvpagerOffloadingSpec,
        manager: Any = KvpagerOffloadingManager,
    ) -> None:
        """Watch engines with classes `spec` and `manager`, or vLLM's in their place."""
        self._spec, self._manager = spec, manager
        self.saved = dict(saved or {})
        self.num_compared = 0
        self.wrong = list[tuple[str, str]]()
        self.managers = list[Any]()
        self._keys = dict[int, bytes]()  # by slot

    def install(self, spoil: bool = False) -> None:
        """Watch the engines that are made from now on. `spoil` exchanges rows in each load."""
        self._wrap_manager()
        make_worker = self._spec.get_worker
        store, load = KvpagerOffloadingWorker.submit_store, KvpagerOffloadingWorker.submit_load

        def get_worker(spec: Any, caches: Any) -> Any:
            self._caches, self._per_chunk = caches, spec.blocks_per_chunk
            return make_worker(spec, caches)

        def submit_store(worker: Any, job: int, device: Any, host: Any) -> bool:
            self.saved |= dict(self._digests(device, host))
            return store(worker, job, device, host)

        def submit_load(worker: Any, job: int, host: Any, device: Any) -> bool:
            if spoil:
                host.block_ids = np.roll(host.block_ids, 1)
            done = load(worker, job, host, device)
            if spoil:
                host.block_ids = np.roll(host.block_ids, -1)
            for name, digest in self._digests(device, host):
                self.num_compared += 1
                if self.saved.get(name) != digest:
                    self.wrong.append((name, digest))
            return done

        self._spec.get_worker = get_worker
        KvpagerOffloadingWorker.submit_store = submit_store
        KvpagerOffloadingWorker.submit_load = submit_load

    def _wrap_manager(self) -> None:
        manager = self._manager
        make, to_store, to_load = manager.__init__, manager.prepare_store, manager.prepare_load

        def init(this: Any, *args: Any, **settings: Any) -> None:
            make(this, *args, **settings)
            self.managers.append(this)

        def prepare_store(this: Any, keys: Any, context: Any) -> Any:
            output = to_store(this, keys, context)
            if output is not None:
                self._note(output.keys_to_store, output.store_spec)
            return output

        def prepare_load(this: Any, keys: Any, context: Any) -> Any:
            spec = to_load(this, keys, context)
            self._note(keys, spec)
            return spec

        manager.__init__, manager.prepare_store = init, prepare_store
        manager.prepare_load = prepare_load

    def _note(self, keys: Any, spec: Any) -> None:
        self._keys |= dict(zip(spec.block_ids.tolist(), keys, strict=True))

    def _digests(self, device: Any, host: Any) -> Iterator[tuple[str, str]]:
        """Yield the name and the digest of each block of a transfer, read from the device."""
        blocks, slots = iter(device.block_ids.tolist()), iter(host.block_ids.tolist())
        pairs = zip(device.group_sizes, device.block_indices, strict=True)
        for group, (count, first) in enumerate(pairs):
            slot = None
            for place in range(first % self._per_chunk, first % self._per_chunk + count):
                if slot is None or place % self._per_chunk == 0:
                    slot = next(slots)
                yield self._name(slot, place), self._digest(group, next(blocks))

    def _name(self, slot: int, place: int) -> str:
        return f"{self._keys[slot].hex()} {place % self._per_chunk}"

    def _digest(self, group: int, block: int) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for ref in self._caches.group_data_refs[group]:
            page = self._caches.tensors[ref.tensor_idx].tensor[block, : ref.page_size_bytes]
            digest.update(page.contiguous().numpy())
        return digest.hexdigest()
