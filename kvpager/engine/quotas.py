"""Quotas of an engine's namespaces: `engine.quotas["acme"] = "2GiB"`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from kvpager.blocks.protocol import CacheManager
from kvpager.engine.request_state import TrackedRequest
from kvpager.scheduling.request import blocks_needed


class LiveQuotas:
    """The quotas of a manager, never below the blocks that a live request may need.

    Otherwise that request could never end. The caller holds the lock of the manager. `live` maps
    ids to the live requests.
    """

    def __init__(self, manager: CacheManager, live: Mapping[Hashable, TrackedRequest]) -> None:
        self._manager = manager
        self._live = live

    def ceiling(self, namespace: str | None) -> int | None:
        """Return the maximum blocks of a namespace, or None. O(1)."""
        return self._manager.quotas.ceiling(namespace)

    def set(self, namespace: str | None, *, ceiling: int | None = None) -> None:
        """Set the maximum blocks of a namespace. O(live requests + blocks).

        Raises: `ValueError` if a live request may need more, or its requests hold more.
        """
        what = f"quota of {ceiling} blocks for namespace {namespace!r}"
        for request in (tracked.request for tracked in self._live.values()):
            if ceiling is None or request.namespace != namespace:
                continue
            need = blocks_needed(request, len(request.prompt), self._manager)
            if need > ceiling:
                raise ValueError(
                    f"{what}: request {request.request_id!r} may need {need}. "
                    "Cancel it or raise the quota."
                )
        try:
            self._manager.quotas.set(namespace, ceiling=ceiling)
        except ValueError as error:
            fix = "Wait for them, cancel some or raise the quota."
            raise ValueError(f"{what}: its requests hold more. {fix}") from error

    def drop(self, namespace: str | None) -> None:
        """Remove the quota of a namespace. O(blocks)."""
        self._manager.quotas.drop(namespace)
