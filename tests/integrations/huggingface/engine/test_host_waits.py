"""No layer makes the host wait for the device: a step's attention is planned from host arrays.

The device is a fake one (`fake_devices.py`) that records every operation that makes the host wait.
It runs the GPU code for attention, plans included; the plain torch reference replaces the launches.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.cache_name import cache_of, passing

transformers = pytest.importorskip("transformers")
pytest.importorskip("triton")

import kvpager  # noqa: E402
from kvpager.integrations.huggingface.cache.budget import Budget  # noqa: E402
from kvpager.integrations.huggingface.runner.model_info import inspect_model  # noqa: E402
from kvpager.integrations.huggingface.runner.model_runner import ModelRunner, trial_plan  # noqa: E402
from kvpager.integrations.huggingface.runner.probe import AttentionSwitch  # noqa: E402
from kvpager.kernels import backends, reference  # noqa: E402
from kvpager.kernels.gpu import attention  # noqa: E402
from kvpager.storage.block_storage import BlockStorage  # noqa: E402
from tests.support import tiny_models  # noqa: E402
from tests.support.fake_devices import fake_devices, on_wrapped_tensors, waits  # noqa: E402

DEVICE = torch.device("maia", 0)
BLOCK = 16


class Planned:
    """The GPU code for attention on a fake device; it notes the plan of each call."""

    def __init__(self) -> None:
        self.plans: list[Any] = []

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, args: Any, plan: Any, *layer: Any
    ) -> Tensor:
        attention._check_plan(plan, query, key, args)
        self.plans.append(plan)
        output: Tensor = on_wrapped_tensors(reference.paged_attention)(
            query, key, value, args, *layer
        )
        return output


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Iterator[Planned]:
    watched = Planned()
    monkeypatch.setattr(attention, "attend", watched.attend)
    kernels = {
        "paged_attention": attention.paged_attention,
        "append_kv": on_wrapped_tensors(reference.append_kv),
        "gather_kv": on_wrapped_tensors(reference.gather_kv),
        "copy_blocks": on_wrapped_tensors(reference.copy_blocks),
    }
    for name, kernel in kernels.items():
        monkeypatch.setitem(backends._registered, (name, DEVICE.type), (kernel, "on a fake device"))
    with fake_devices():
        yield watched


def on_fake_device(model: Any) -> Any:
    """Copy a model to the fake device."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = parameter.detach().to(DEVICE)
                module._parameters[name] = nn.Parameter(moved, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(DEVICE)
    return model


# Rows of a step: tokens that are in the cache already, and new ones.
STEPS = {
    "decode": [(20, 1), (33, 1), (5, 1)],
    "mixed": [(20, 1), (0, 18), (5, 1), (16, 7)],
    "prefill": [(0, 30), (0, 9)],
}


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "per sequence"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_step_of_an_engine_waits_for_nothing(
    name: str, step: str, is_packed: bool, planned: Planned
) -> None:
    model = on_fake_device(tiny_models.tiny_model(name))
    info, budget = inspect_model(model), Budget("1MiB", BLOCK)
    storage = BlockStorage(32, BLOCK, info.shapes, dtype=info.dtype, device=DEVICE)
    switch = AttentionSwitch(model)
    switch.to_paged()
    try:
        runner = ModelRunner(model, info, storage, budget, is_packed=is_packed)
        starts, counts = (np.array(each, np.int32) for each in zip(*STEPS[step], strict=True))
        tables = np.arange(4 * len(starts), dtype=np.int32).reshape(-1, 4)
        prompts = [list(range(3, 3 + start + count)) for start, count in STEPS[step]]
        plan = trial_plan(prompts, starts, counts, tables, storage, len(info.windows))
        runner.run(plan, {})
        planned.plans.clear()
        with waits() as found:
            runner.run(plan, {})
    finally:
        switch.release()
    passes = 1 if is_packed else len(starts)
    kinds = {layer.window for layer in info.layers}
    # Row by row, transformers looks at the padding mask of each pass, for each kind of layer.
    assert len(found) <= (0 if is_packed else passes * len(kinds)), found
    assert len(planned.plans) == passes * len(info.layers)
    assert len({id(plan) for plan in planned.plans}) <= passes * len(info.windows)


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("queries", [1, 5], ids=["decode", "several queries"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_forward_pass_of_a_patched_model_waits_for_nothing(
    name: str, queries: int, planned: Planned
) -> None:
    model = on_fake_device(tiny_models.tiny_model(name))
    num_layers = model.config.num_hidden_layers

    def step(cache: Any, count: int) -> Any:
        ids = torch.full((2, count), 7, device=DEVICE)
        return cache_of(model(ids, **passing(cache), use_cache=True))

    with kvpager.patch(model), torch.no_grad():
        cache = step(None, 11)
        for _ in range(BLOCK):  # blocks fill up on the way
            planned.plans.clear()
            with waits() as found:
                cache = step(cache, queries)
            assert found == []
            assert len(planned.plans) == num_layers
            assert len({id(plan) for plan in planned.plans}) <= len(cache.groups)


def test_rows_in_host_memory_are_planned_from_what_is_there(planned: Planned) -> None:
    model = on_fake_device(tiny_models.tiny_model("llama"))
    ids = torch.full((3, 40), 7, device=DEVICE)
    with kvpager.patch(model, memory="20KiB", host_memory="1MiB") as patch, torch.no_grad():
        cache = cache_of(model(ids, use_cache=True))
        assert patch.stats().peak_host_held_bytes > 0
        planned.plans.clear()
        model(ids[:, :1], **passing(cache), use_cache=True)
    rows = [plan.num_rows for plan in planned.plans]
    assert sum(rows) == 3 * model.config.num_hidden_layers
    assert len({id(plan) for plan in planned.plans}) <= 2
