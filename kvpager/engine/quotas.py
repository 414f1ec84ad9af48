"""Quotas of an engine's namespaces: `engine.quotas["acme"] = "2GiB"`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from kvpager.engine.request_state import TrackedRequest
from kvpager.scheduling.request import Request, blocks_needed, lora_of_version
from kvpager.scheduling.scheduler import Scheduler


class LiveQuotas:
    """The quotas of a scheduler's manager, never below the blocks that a live request may need.

    Otherwise that request could never end. The caller holds the lock of the scheduler. `live` maps
    ids to the live requests.
    """

    def __init__(self, scheduler: Scheduler, live: Mapping[Hashable, TrackedRequest]) -> None:
        self._scheduler, self._manager = scheduler, scheduler.manager
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
            num_retained = self._num_retained(request)
            if need > ceiling - num_retained:
                beside = f" beside {num_retained} of retained prompts" if num_retained else ""
                raise ValueError(
                    f"{what}: request {request.request_id!r} may need {need}{beside}. "
                    "Cancel it or raise the quota."
                )
        try:
            self._manager.quotas.set(namespace, ceiling=ceiling)
        except ValueError as error:
            fix = "Wait for them, cancel some or raise the quota."
            raise ValueError(
                f"{what}: its requests and retained prompts hold more. {fix}"
            ) from error

    def _num_retained(self, request: Request) -> int:
        """Return how many retained blocks of its namespace a request does not share."""
        scheduler = self._scheduler
        lora = lora_of_version(request.lora, scheduler.cache_version)
        prompt = request.prompt if scheduler.prefix_cache else None
        withheld = self._manager.queries.withheld(prompt, request.namespace, lora)
        return withheld.own + (request.n - 1 if withheld.pinned else 0)

    def drop(self, namespace: str | None) -> None:
        """Remove the quota of a namespace. O(blocks)."""
        self._manager.quotas.drop(namespace)
