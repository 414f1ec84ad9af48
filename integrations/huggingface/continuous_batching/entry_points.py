"""Replace transformers' entry points for continuous batching, for models that a patch serves."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from transformers.generation.configuration_utils import ContinuousBatchingConfig

from kvpager.integrations.huggingface.continuous_batching.manager import PagedBatchingManager
from kvpager.integrations.huggingface.continuous_batching.options import warn_once
from kvpager.integrations.huggingface.continuous_batching.requests import Padded

logger = logging.getLogger("kvpager")

_KEPT = "_cached_continuous_batching_manager"


# Returns the `Patch` that serves a model, or None.
FindPatch = Callable[[Any], Any]


def entry_points(find: FindPatch) -> dict[str, Callable[..., Any]]:
    """Return a function to call around each method of `ContinuousMixin` that needs one, by name.

    The other methods call these two.
    """
    return {
        "init_continuous_batching": functools.partial(_init, find),
        "generate_batch": functools.partial(_generate_batch, find),
    }


def _init(find: FindPatch, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    serving = find(args[0])
    if serving is None:
        return original(*args, **kwargs)
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    return _manager(given.pop("self"), serving, **given)


def _generate_batch(
    find: FindPatch, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    if find(args[0]) is None:
        return original(*args, **kwargs)
    bound = inspect.signature(original).bind(*args, **kwargs)
    given, options = bound.arguments, bound.arguments.get("kwargs", {})
    _warn_of_ignored(args[0], given.get("generation_config"), options)
    masks = options.get("attention_mask")
    if masks is not None:
        rows = zip(given["inputs"], masks, strict=True)
        given["inputs"] = [Padded(row, mask) for row, mask in rows]
    outer = _calls.managers
    made: list[PagedBatchingManager] = []
    try:
        _calls.managers = made
        return original(*bound.args, **bound.kwargs)
    except BaseException as error:
        if not isinstance(error, Exception):
            _abandon(made)
        raise
    finally:
        _calls.managers = outer
        for manager in made:
            manager.ends_with_call = False


class _Calls(threading.local):
    """The call of `generate_batch` on this thread."""

    managers: list[PagedBatchingManager] | None = None  # that the innermost call made


_calls = _Calls()


def _abandon(managers: list[PagedBatchingManager]) -> None:
    """End the sessions of an interrupted call, and drop their outputs."""
    for manager in managers:
        manager.end_now()
        manager.join(time.perf_counter())
        manager.output_router.forget()


def _warn_of_ignored(model: Any, config: Any, options: dict[str, Any]) -> None:
    """Warn of keywords that `generate_batch` accepts, but does not read."""
    config = model.generation_config if config is None else config
    for name, value in options.items():
        # `generate` passes its settings twice: here, and in the config.
        is_known = value is getattr(config, name, options) or name == "max_new_tokens"
        if not is_known and name not in ("input_ids", "attention_mask"):
            warn_once(f"{name} of generate_batch", "set it in the generation_config")


def _manager(
    model: Any,
    serving: Any,
    generation_config: Any = None,
    continuous_batching_config: Any = None,
    workload_hints: Any = None,
    **further: Any,
) -> PagedBatchingManager:
    for name in further:
        warn_once(f"{name} of init_continuous_batching", "the argument is unknown")
    kept = getattr(model, _KEPT, None)
    if not isinstance(kept, PagedBatchingManager) or kept not in serving.managers:
        kept = None
    if kept is not None and kept.process.is_current:
        _warn_of_another(kept, generation_config, continuous_batching_config)
        kept.hint(workload_hints)
        _note_call(kept)
        return kept
    config = model.generation_config if generation_config is None else generation_config
    if continuous_batching_config is None:
        continuous_batching_config = getattr(config, "continuous_batching_config", None)
    manager = PagedBatchingManager(
        model,
        config,
        continuous_batching_config or ContinuousBatchingConfig(),
        workload_hints,
        serving,
    )
    _note_call(manager)
    serving.managers.add(manager)
    return manager


def _note_call(manager: PagedBatchingManager) -> None:
    if _calls.managers is not None:
        manager.ends_with_call = True
        _calls.managers.append(manager)


def _warn_of_another(kept: PagedBatchingManager, generation: Any, batching: Any) -> None:
    known = kept.generation_config, kept.continuous_batching_config
    for given, config in zip((generation, batching), known, strict=True):
        if given is not None and given is not config:
            logger.warning(
                "%s ignored: the model keeps a manager with another one. Call "
                "destroy_cached_continuous_batching_manager() first.",
                type(config).__name__,
            )


def release_managers(managers: Iterable[PagedBatchingManager]) -> None:
    """Drop the managers that models keep from an undone patch. Sessions continue. O(managers)."""
    for manager in list(managers):
        if getattr(manager.model, _KEPT, None) is manager:
            delattr(manager.model, _KEPT)
            if not manager.is_running():
                manager.destroy()
