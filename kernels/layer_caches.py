"""A layer's key and value cache, checked once for all steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvpager.kernels.args import are_plain, require_caches, require_tensors


@dataclass(frozen=True, slots=True, eq=False)
class LayerCaches:
    """A layer's key and value cache and their scales. `append_kv` documents the tensors.

    Make one object per layer and pass it to `append` and `attend` in each step. The constructor
    checks the tensors. O(1). `BlockStorage.caches` returns one.
    Raises: `ValueError`, `TypeError` for tensors that do not fit together.
    """

    key: Tensor
    value: Tensor
    scales: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.scales is None and are_plain(self.key, self.value):
            return
        require_tensors(key_cache=self.key, value_cache=self.value)
        require_caches(self.key, self.value, self.scales)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return key, value and, if there are any, key scales and value scales. O(1)."""
        return self.key, self.value, *(self.scales or ())
