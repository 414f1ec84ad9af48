"""Generation over rows of a stand-in GPU, where touching what is not mapped ends the process."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from transformers import BloomConfig, BloomForCausalLM

import kvpager
from kvpager.integrations.huggingface.cache import budget
from kvpager.modes import mode_named, virtual_gpu
from kvpager.modes.virtual import VirtualRows
from kvpager.modes.virtual_gpu import VirtualOnGpu
from kvpager.storage import block_storage
from tests.support.fake_cuda import PAGE, FakeDevice, FakeDriver

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    """Let "virtual" map blocks of a fake GPU. Each read of a layer queues work that seldom ends."""
    device = FakeDevice(FakeDriver())
    read = VirtualRows.caches

    def mode(name: str, device: Any = "cpu") -> Any:
        on_gpu = name == "virtual"
        return VirtualOnGpu(torch.device("cuda:0")) if on_gpu else mode_named(name, device)

    def caches(self: Any, layer: int) -> Any:
        places = np.flatnonzero(self._mapped.ravel() >= 0)
        device.driver.launch(self._range._address + place * PAGE for place in places.tolist())
        return read(self, layer)

    monkeypatch.setattr(virtual_gpu, "cuda_device", lambda index: device)
    monkeypatch.setattr(block_storage, "mode_named", mode)
    monkeypatch.setattr(budget, "mode_named", mode)
    monkeypatch.setattr(VirtualRows, "caches", caches)
    yield device
    gc.collect()
    assert device.driver.left() == (0, 0, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["greedy", "beams", "samples"],
)
def test_tokens_are_those_of_transformers(gpu: FakeDevice, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    # 1 KiB per token: four tokens are a page of the stand-in.
    model = BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=32, n_layer=4, n_head=4)).eval()
    ids = torch.randint(4, 99, (2, 11))
    options = {"max_new_tokens": 14, "eos_token_id": None, **options}

    def generate() -> torch.Tensor:
        torch.manual_seed(1)
        tokens: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return tokens

    expected = generate()
    with kvpager.patch(model, mode="virtual", block_size=4) as patch:
        assert torch.equal(generate(), expected)
        assert torch.equal(generate(), expected)
        stats = patch.stats()
    assert (stats.gathers, stats.in_place_reads > 0) == (0, True)
    assert {"Create", "Map", "Unmap", "SetAccess"} <= set(gpu.driver.names())
