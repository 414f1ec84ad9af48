"""Prompts that are saved before the end of their requests is reported."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import NamedTuple

from kvpager.plans import Int32
from kvpager.scheduling.scheduler import Scheduler
from kvpager.storage.tiers.prompt_saving import PromptSave
from kvpager.storage.tiers.tiering import Tiering


class _End(NamedTuple):
    """The end of a request, to be reported when its prompt is saved."""

    prompt: PromptSave
    until: float
    report: Callable[[], None]


class PromptSaves:
    """Saves prompts, and reports the ends of their requests when stores have answered.

    Call all methods under the engine's lock.

    Args:
        scheduler: knows whose prefixes a request may share.
        tiering: saves the blocks.
        wait_s: how long an end waits for the stores, in seconds.
    """

    def __init__(self, scheduler: Scheduler, tiering: Tiering, wait_s: float) -> None:
        self._scheduler = scheduler
        self._tiering = tiering
        self._wait_s = wait_s
        self._live: dict[Hashable, PromptSave] = {}
        self._ended: list[_End] = []

    @property
    def is_waiting(self) -> bool:
        """True if an end is not reported yet. O(1)."""
        return bool(self._ended)

    @property
    def has_blocks(self) -> bool:
        """True if a prompt has blocks to copy. O(prompts)."""
        return any(not prompt.is_copied for prompt in self._prompts())

    def _prompts(self) -> list[PromptSave]:
        return [*self._live.values(), *(end.prompt for end in self._ended)]

    def begin(self, request_id: Hashable, prompt: Int32) -> None:
        """Save the prompt of a live request, whose last token is computed. O(1)."""
        namespace, lora = self._scheduler.identity(request_id)
        self._live[request_id] = PromptSave(prompt, {"namespace": namespace, "lora": lora})

    def end(self, request_id: Hashable, report: Callable[[], None], *, may_wait: bool) -> None:
        """Call `report` at the end of a request, or when its prompt is saved. O(1)."""
        prompt = self._live.pop(request_id, None)
        if prompt is None or not may_wait:
            report()
        else:
            self._ended.append(_End(prompt, time.monotonic() + self._wait_s, report))

    def copy(self) -> None:
        """Copy the blocks that are left, as many as staging has room for. O(bytes)."""
        for prompt in self._prompts():
            if not prompt.is_copied:
                self._tiering.prompts.save(prompt)

    def report(self) -> None:
        """Report the ends whose prompts are saved, and those that waited too long. O(ends)."""
        now, ended, self._ended = time.monotonic(), self._ended, []
        for end in ended:
            if end.prompt.is_done or now >= end.until:
                end.report()
            else:
                self._ended.append(end)

    def give_up(self) -> None:
        """Save no more, and report all ends. O(prompts)."""
        self._live.clear()
        ended, self._ended = self._ended, []
        for end in ended:
            end.report()
