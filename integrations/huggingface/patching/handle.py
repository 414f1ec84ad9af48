"""The handle that `patch` returns, and the lookup of the patch that serves a model."""

from __future__ import annotations

import functools
import weakref
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from transformers import GenerationMixin

from kvpager import _validate as arguments
from kvpager._atomic import Uninterrupted, new_lock
from kvpager.blocks.quotas import NamespaceQuotas
from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.cache.budget import Budget
from kvpager.integrations.huggingface.cache.memory import PagedMemory
from kvpager.integrations.huggingface.continuous_batching.entry_points import release_managers
from kvpager.integrations.huggingface.continuous_batching.manager import PagedBatchingManager
from kvpager.integrations.huggingface.patching.report import PatchStats, report
from kvpager.integrations.huggingface.patching.undo import restore_all
from kvpager.integrations.huggingface.prefix.prompt_cache import PromptCache
from kvpager.integrations.huggingface.prefix.prompt_tiers import PromptTiers
from kvpager.storage.tiers.controls import TierControls

lock = new_lock()
uninterrupted = Uninterrupted(lock)
active: list[Patch] = []  # in the order they were made; the last one that covers a model serves it


class Patch:
    """An active patch of one model or of every model. `patch` makes it, `undo` ends it."""

    def __init__(
        self, model: nn.Module | None, memory: PagedMemory, prompts: PromptCache | None
    ) -> None:
        self.memory = memory
        self.prompts = prompts
        self.managers: weakref.WeakSet[PagedBatchingManager] = weakref.WeakSet()
        self._covers_all = model is None
        self._model = None if model is None else weakref.ref(model)
        self._served = "every model" if model is None else type(model).__name__
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._configs: list[Any] = []
        if model is not None:
            self._models.update(m for m in model.modules() if isinstance(m, GenerationMixin))
            configs = [m.config for m in model.modules() if hasattr(m, "config")]
            self._configs = list({id(config): config for config in configs}.values())

    def __repr__(self) -> str:
        state = "active" if self.is_active else "undone"
        return f"<Patch of {self._served}: {state}, {self.memory.options()}>"

    def covers(self, model: nn.Module) -> bool:
        """Return True if this patch serves `model`. O(1)."""
        return self._covers_all or model in self._models

    def is_of(self, model: nn.Module | None) -> bool:
        """Return True if `patch` was called with just this model; None is every model. O(1)."""
        own = None if self._model is None else self._model()
        return self._covers_all if model is None else own is model

    def was_made_for(self, model: nn.Module | None) -> bool:
        """Return True if `patch` was called for this model, or for one inside it or around it.

        None means every model. O(modules).
        """
        if model is None or self._covers_all:
            return model is None and self._covers_all
        return any(module in self._models for module in model.modules())

    def covers_config(self, config: Any) -> bool:
        """Return True if this patch serves caches made for `config`. O(model's configurations)."""
        return self._covers_all or any(config is known for known in self._configs)

    @property
    def is_active(self) -> bool:
        """Return True until the patch is undone. O(patches)."""
        return self in active

    @property
    def tiers(self) -> TierControls:
        """The patch's tiers: `patch.tiers.forget("acme")`. Raises: `KVPagerError` if none."""
        if self.prompt_tiers is None:
            raise KVPagerError(
                "this patch has no tiers. Pass patch(model, prefix_cache=True, tiers=...)."
            )
        return TierControls(self.prompt_tiers)

    @property
    def prompt_tiers(self) -> PromptTiers | None:
        """Return the stores that keep its prompts; None without any. O(1)."""
        return None if self.prompts is None else self.prompts.tiers

    def stats(self) -> PatchStats:
        """Return current counts, and totals since the patch was made. O(blocks)."""
        return PatchStats.of(self.memory)

    def namespace(self, name: str) -> AbstractContextManager[None]:
        """Let calls inside the `with` block share prompts with namespace `name` only. O(1).

            with patch.namespace("acme"):
                model.generate(...)

        Applies to calls of this thread, or of this asyncio task. Raises: `KVPagerError` without
        `prefix_cache`; `TypeError` if `name` is not a string.
        """
        if name is None:
            raise TypeError("namespace=None: expected a str. Pass the name of a namespace.")
        arguments.label("namespace", name)
        self._refuse_without_prompts(f"namespace {name!r}")
        return self.memory.namespaces.chosen(name)

    @property
    def quotas(self) -> NamespaceQuotas:
        """Return the quotas: the most blocks of each namespace, for running calls and kept prompts.

            patch.quotas["acme"] = "2GiB"      # or a number of blocks

        A call counts even if its prompts are not kept. A cache and its copies count in the
        namespace of the call that wrote its first token. A quota applies to each pool separately:
        layers of another number, shape or window have a pool of their own. A `PagedCache` that the
        user makes has no quotas. A session of continuous batching takes the quotas at its start.
        Raises: `KVPagerError` without `prefix_cache`.
        """
        self._refuse_without_prompts("quotas")
        return self.memory.quotas

    def _refuse_without_prompts(self, what: str) -> None:
        if self.prompts is None:
            raise KVPagerError(
                f"{what}: no prompts are kept between calls. Pass patch(prefix_cache=True)."
            )

    def report(self) -> str:
        """Return a text on the paged layers, the blocks in use and the memory saved. O(blocks)."""
        for manager in list(self.managers):
            manager.note_doubt()
        lines = [report(self.memory, self.stats())]
        return "\n".join(lines if self.prompt_tiers is None else lines + self.prompt_tiers.report())

    def clear_prefix_cache(self) -> None:
        """Free cached prefixes, and all memory that no live cache needs. O(cached blocks).

        Tiers are not used any more, since their blocks may be those of a changed model, too.
        """
        if self.prompt_tiers is not None:
            self.prompt_tiers.turn_off("the prefix cache was cleared")
        self.memory.clear_prefix_cache()

    def undo(self) -> None:
        """Restore transformers. Caches that were made under the patch keep working. O(managers).

        With tiers, saves the idle blocks, for at most 5 seconds, and closes the stores. Does
        nothing if the patch was undone before.
        """
        try:
            if self.is_active and self.prompt_tiers is not None:
                # While the model is as it was when its blocks were made.
                self.prompt_tiers.save_last()
        finally:
            self._undo()

    def _undo(self) -> None:
        with lock, uninterrupted:
            if self not in active:
                return
            active.remove(self)
            if not active:
                restore_all()
        release_managers(self.managers)
        if self.prompt_tiers is not None:
            self.prompt_tiers.close()
        self.memory.clear_prefix_cache()
        if self.memory.recorder is not None:
            with self.memory.lock:
                self.memory.recorder.close()

    def __enter__(self) -> Patch:
        if not self.is_active:
            raise KVPagerError("this patch was undone already; make a new one with patch()")
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch_for(model: Any, *, wanted: bool = False) -> Patch | None:
    """Return the patch that serves `model`, or None. O(patches).

    If the caller asks for paging by name (`wanted`), an unserved model gets the default patch.
    """
    found = next((made for made in reversed(active) if made.covers(model)), None)
    if found is None and wanted and active:
        return _default_patch()
    return found


@functools.cache
def _default_patch() -> Patch:
    """Return a patch with the default options, for models that no patch was made for."""
    return Patch(None, PagedMemory(Budget(None, 16)), None)
