"""A model, its patch, and a manager of continuous batching."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

transformers = pytest.importorskip("transformers")

from transformers import PreTrainedModel  # noqa: E402

import kvpager  # noqa: E402
from kvpager.integrations.huggingface import Patch  # noqa: E402
from kvpager.integrations.huggingface.continuous_batching.manager import PagedBatchingManager  # noqa: E402
from tests.support import tiny_models  # noqa: E402
from tests.support.batching_calls import settings  # noqa: E402


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_models.tiny_model("llama")


@pytest.fixture
def patch(llama: PreTrainedModel) -> Iterator[Patch]:
    with kvpager.patch(llama, memory="1MiB") as made:
        yield made
    assert llama.config._attn_implementation == "sdpa"
    assert not hasattr(llama, "_cached_continuous_batching_manager")


@pytest.fixture
def manager(llama: PreTrainedModel, patch: Patch) -> Iterator[PagedBatchingManager]:
    made = llama.init_continuous_batching(settings())
    yield made
    made.destroy()
