"""Paged KV-cache memory for PyTorch LLM inference.

`BlockManager` decides where each token's key and value are stored, without torch. `BlockStorage`
holds the tensors and applies the plans. `patch` uses both in a transformers model, in one line.
Importing this package is cheap: each name is loaded at its first use.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvpager.blocks.manager import BlockManager
    from kvpager.blocks.sequences import SequenceHandle
    from kvpager.engine.config import EngineConfig
    from kvpager.errors import KVPagerError, OutOfBlocks
    from kvpager.integrations.huggingface.cache.paged_cache import PagedCache
    from kvpager.integrations.huggingface.engine import Engine
    from kvpager.integrations.huggingface.patching.patch import patch, unpatch
    from kvpager.plans import StepPlan
    from kvpager.scheduling.request import Request
    from kvpager.scheduling.scheduler import Scheduler
    from kvpager.storage.block_storage import BlockStorage, LayerShape

__version__ = "0.1.0"

__all__ = [
    "BlockManager",
    "BlockStorage",
    "Engine",
    "EngineConfig",
    "KVPagerError",
    "LayerShape",
    "OutOfBlocks",
    "PagedCache",
    "Request",
    "Scheduler",
    "SequenceHandle",
    "StepPlan",
    "patch",
    "unpatch",
]

_HOME = {
    "BlockManager": "kvpager.blocks.manager",
    "BlockStorage": "kvpager.storage.block_storage",
    "Engine": "kvpager.integrations.huggingface.engine",
    "EngineConfig": "kvpager.engine.config",
    "KVPagerError": "kvpager.errors",
    "LayerShape": "kvpager.storage.block_storage",
    "OutOfBlocks": "kvpager.errors",
    "PagedCache": "kvpager.integrations.huggingface.cache.paged_cache",
    "Request": "kvpager.scheduling.request",
    "Scheduler": "kvpager.scheduling.scheduler",
    "SequenceHandle": "kvpager.blocks.sequences",
    "StepPlan": "kvpager.plans",
    "patch": "kvpager.integrations.huggingface.patching.patch",
    "unpatch": "kvpager.integrations.huggingface.patching.patch",
}

# Hidden from type checkers, which would accept any misspelt name otherwise.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Load the module of a public name at its first use. O(1) afterwards."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        try:
            value = getattr(import_module(_HOME[name]), name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "transformers":
                raise
            raise ImportError(
                f"kvpager.{name} needs transformers, which is not installed: "
                "pip install 'kvpager[transformers]'"
            ) from error
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
