"""Compares the bytes of each page that SGLang loads with those that it saved.

SGLang makes the storage in a process of its own, so what was seen goes into a file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kvpager.integrations.sglang.hicache import KvpagerHiCache

FILE, SPOIL = "KVPAGER_TEST_BYTES", "KVPAGER_TEST_SPOIL"


class WatchedHiCache(KvpagerHiCache):  # type: ignore[misc]
    """Digests pages by SGLang's own description of its host memory.

    The file has `saved`, a digest for each key; `compared`, the number of loaded pages that had
    been saved; `wrong`, the keys of those that had other bytes. `SPOIL` exchanges pages in loads.
    """

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        super().__init__(storage_config, kwargs)
        self._file = Path(os.environ[FILE])
        self._seen = {"saved": {}, "compared": 0, "wrong": []}
        if self._file.exists():
            self._seen["saved"] = json.loads(self._file.read_text())["saved"]

    def batch_set_v1(self, keys: Any, host_indices: Any, extra_info: Any = None) -> list[bool]:
        self._seen["saved"] |= dict(zip(keys, self._digests(host_indices), strict=True))
        done: list[bool] = super().batch_set_v1(keys, host_indices, extra_info)
        self._write()
        return done

    def batch_get_v1(self, keys: Any, host_indices: Any, extra_info: Any = None) -> list[bool]:
        size = self.mem_pool_host.page_size
        into = torch.roll(host_indices, size) if SPOIL in os.environ else host_indices
        loaded: list[bool] = super().batch_get_v1(keys, into, extra_info)
        for key, is_loaded, digest in zip(keys, loaded, self._digests(host_indices), strict=True):
            if is_loaded:
                self._seen["compared"] += 1
                if self._seen["saved"].get(key) != digest:
                    self._seen["wrong"].append(key)
        self._write()
        return loaded

    def _digests(self, host_indices: Any) -> Iterator[str]:
        for first in host_indices[:: self.mem_pool_host.page_size].tolist():
            page = self.mem_pool_host.get_data_page(first).view(torch.uint8).numpy()
            yield hashlib.sha256(page.tobytes()).hexdigest()

    def _write(self) -> None:
        path = self._file.with_suffix(f".{os.getpid()}-{id(self)}")
        path.write_text(json.dumps(self._seen))
        path.rename(self._file)
