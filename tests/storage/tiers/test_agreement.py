"""The self-test of stacks that share a store: what agrees, what does not, and what keys cover."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpager import BlockStorage
from kvpager.storage.keys import KeyContext, content_keys
from kvpager.storage.tiers.agreement import (
    PROBE_TOKENS,
    TOLERANCES,
    Agreement,
    Blocks,
    CommonLayout,
    Difference,
    agree,
    probe_prompt,
    probe_request,
    rope_obstacle,
)
from kvpager.storage.tiers.protocol import Outcomes, Saved
from tests.support.dict_store import DictStore

COMMON = CommonLayout.of(64, [(2, 8, 4), (2, 8, 8)], "float32")
COUNT = PROBE_TOKENS // 64
SPOILS: dict[str, Callable[[Any], Any]] = {
    "tokens in reverse": lambda x: x[::-1],
    "one token on": lambda x: np.roll(x, 1, axis=0),
    "the last token": lambda x: np.concatenate([x[:-1], x[:1]]),
    "heads exchanged": lambda x: x[:, ::-1],
    "halves of heads exchanged": lambda x: np.roll(x, x.shape[2] // 2, axis=2),
    "sign": lambda x: -x,
    "zeros": np.zeros_like,
    "NaN": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 7, np.nan, x),
}


def numbers(common: CommonLayout = COMMON, seed: int = 0) -> list[Any]:
    """Return random keys and values of each layer: float32 [tokens, heads, dim]."""
    choose = np.random.default_rng(seed)
    dims = [(heads, dim) for heads, *both in common.layers for dim in both]
    return [choose.standard_normal((PROBE_TOKENS, *dim)).astype(np.float32) for dim in dims]


def blocks_of(parts: Sequence[Any], common: CommonLayout = COMMON) -> Blocks:
    """Return blocks as the documentation says, by loops."""
    blocks = []
    for start in range(0, PROBE_TOKENS, common.block_size):
        block = b""
        for part in parts:
            for token in part[start : start + common.block_size]:
                block += np.ascontiguousarray(token, np.float32).tobytes()
        blocks.append(np.frombuffer(block, np.uint8))
    return np.stack(blocks)


def store_of(common: CommonLayout = COMMON) -> DictStore:
    return DictStore(common.layout.block_bytes)


def join(store: DictStore, parts: Sequence[Any], model_id: str = "m") -> Agreement:
    return agree([store], COMMON, model_id, blocks_of(parts))


# ---------------------------------------------------------------- bytes and keys


@given(
    layers=st.lists(st.tuples(*[st.integers(1, 3)] * 3), min_size=1, max_size=3).map(tuple),
    block_size=st.sampled_from([1, 2, 8]),
    dtype=st.sampled_from(list(TOLERANCES)),
)
@settings(max_examples=25)
def test_a_block_of_a_paged_storage_has_the_common_layout(
    layers: Any, block_size: int, dtype: str
) -> None:
    common = CommonLayout.of(block_size, layers, dtype)
    storage = BlockStorage(3, block_size, layers, dtype=getattr(torch, dtype))
    assert common.layout.block_bytes == storage.block_bytes
    storage.tier().normal_()
    parts = list(common.parts(storage.tier()[1:].contiguous().view(torch.uint8).numpy()))
    for layer in range(len(layers)):
        for part, cache in zip(parts[2 * layer :], storage.layer(layer), strict=False):
            assert np.array_equal(part, cache[1:].flatten(0, 1).flatten(1).float().numpy())


def test_names_of_layout_and_keys_are_those_of_all_releases() -> None:
    """Golden vectors: other stacks and earlier releases have stored blocks under these names."""
    layout = CommonLayout.of(16, [(8, 128, 128)] * 2, "bfloat16").layout
    assert layout.block_bytes == 131072
    assert layout.text == (
        "kvpager block-first 1; block_size 16; dtype bfloat16; kv_cache_dtype bfloat16; "
        "layers 8x128x128 8x128x128; rank 0 of 1"
    )
    assert probe_prompt()[:12].tolist() == [3, 10, 31, 66, 51, 50, 63, 26, 4, 59, 64, 19]
    assert probe_request()[:-1] == probe_prompt().tolist()
    [key, *_] = content_keys(probe_prompt(), 16, KeyContext(layout.text, "m", b"s" * 16))
    assert key.hex() == "aef7567fc4db4d7adc9062bd88aee143a768d865e0008a0922e1823aaf549df6"
    joined = join(store_of(), [np.zeros_like(each) for each in numbers()])
    assert joined.model == "m; agrees with 87b1494258721e7676377dfc68330cf0"


def test_a_model_without_100_tokens_can_compute_the_probe() -> None:
    assert probe_prompt().min() >= 3
    assert max(probe_request()) < 100
    assert len(set(probe_prompt().tolist())) > 30


@pytest.mark.parametrize(
    ("block_size", "dtype", "why"),
    [
        (48, "float32", "power of two"),
        (1024, "float32", "block_size=1024: expected at most 512"),
        (16, "fp8_e4m3", "keys and values are fp8_e4m3"),
    ],
)
def test_other_blocks_are_refused(block_size: int, dtype: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        CommonLayout.of(block_size, [(1, 1, 1)], dtype)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "llama3", None])
def test_keys_that_depend_on_the_length_of_a_prompt_are_refused(kind: str | None) -> None:
    config = SimpleNamespace(rope_parameters=kind and {"rope_type": kind})
    assert (rope_obstacle(config) is not None) == (kind in ("dynamic", "longrope"))
    by_layer = {
        "sliding_attention": {"rope_type": "default"},
        "full_attention": {"rope_type": kind},
    }
    others = [{"rope_parameters": by_layer}, {"rope_scaling": {"type": kind, "factor": 2.0}}]
    for each in others:  # of each kind of layer, and of code for earlier versions of transformers
        found = rope_obstacle(SimpleNamespace(**each))
        assert (found is not None) == (kind in ("dynamic", "longrope"))
    assert rope_obstacle(SimpleNamespace()) is None


# ---------------------------------------------------------------- agreement


def test_a_stack_that_computes_the_same_takes_the_reference_of_the_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, parts = store_of(), numbers()
    first = join(store, parts)
    second = join(store, [part * (1 + 5e-5) for part in parts])
    assert first.is_shared
    assert second.is_shared
    assert second.model == first.model
    assert second.difference is not None
    assert 1e-5 < second.difference.first < 1e-4
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


@pytest.mark.parametrize("part", range(4), ids=["keys", "values", "later keys", "later values"])
@pytest.mark.parametrize("spoil", SPOILS.values(), ids=list(SPOILS))
def test_a_stack_that_differs_keeps_its_blocks_apart(
    spoil: Any, part: int, caplog: pytest.LogCaptureFixture
) -> None:
    store, parts = store_of(), numbers()
    first = join(store, parts)
    kept = dict(store.blocks)
    parts[part] = spoil(parts[part])
    other = join(store, parts)
    assert not other.is_shared
    assert other.model != first.model
    assert store.blocks == kept  # the reference stays that of the first
    [record] = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert "cross_stack is off" in record.getMessage()
    assert join(store, parts).model == other.model  # its own blocks stay hits after a restart


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_the_tolerance_is_that_of_the_dtype(dtype: str, factor: float) -> None:
    allowed = TOLERANCES[dtype]
    for part in (allowed._replace(later=0), allowed._replace(first=0)):
        found = Difference(part.first * factor, part.later * factor)
        assert found.is_within(allowed) == (factor < 1)
    assert not Difference(float("nan"), 0).is_within(allowed)


def test_later_layers_may_differ_more_because_rounding_adds_up() -> None:
    parts = numbers()
    for number, is_within in ((1, False), (2, True)):
        moved = list(parts)
        moved[number] = parts[number] * (1 + 5e-4)
        found = COMMON.difference(blocks_of(moved), blocks_of(parts))
        assert found.is_within(TOLERANCES["float32"]) == is_within


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_read_as_torch_reads_it(dtype: str) -> None:
    common = CommonLayout.of(PROBE_TOKENS, [(1, 2, 2)], dtype)
    made = torch.randn(1, PROBE_TOKENS * 4).to(getattr(torch, dtype))
    parts = list(common.parts(made.view(torch.uint8).numpy()))
    assert np.array_equal(np.concatenate([each.ravel() for each in parts]), made[0].float())


# ---------------------------------------------------------------- what keys cover


def test_names_cover_model_and_layout() -> None:
    parts = numbers()
    names = {join(store_of(), parts, model).model for model in ("m", "n")}
    assert len(names) == 2
    store = store_of()
    assert join(store, parts, "m").is_shared
    other = join(store, numbers(seed=1), "n")  # another model is not compared with the first
    assert other.difference == Difference(0, 0)


def test_a_lost_reference_never_mixes_stacks_that_differ() -> None:
    store = store_of()
    first = join(store, numbers())
    store.drop(list(store.blocks))
    other = join(store, numbers(seed=1))
    assert other.is_shared  # as far as it can know
    assert other.model != first.model
    store.drop(list(store.blocks))
    assert join(store, numbers()).model == first.model


@pytest.mark.parametrize(
    ("size", "dtype"), [(16, "float32"), (512, "float32"), (64, "float16"), (1, "bfloat16")]
)
def test_stacks_with_another_block_size_or_dtype_are_told_so(
    size: int, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = CommonLayout.of(size, COMMON.layers, dtype)
    server = dict.fromkeys(join_as(other, "m").blocks, b"")  # a server has any size of value
    for model_id, is_told in (("another model", False), ("m", True)):
        caplog.clear()
        store = store_of()
        store.blocks = dict(server)
        assert join(store, numbers(), model_id).is_shared
        told = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
        assert len(told) == is_told
        assert all(f"{size} tokens in {dtype}" in each for each in told)
        assert all("64 tokens in float32" in each for each in told)


@pytest.mark.parametrize("fault", [{"fails": True}, {"answer": Saved.REFUSED}], ids=str)
def test_a_stack_whose_stores_did_not_keep_the_probe_is_told_so(
    fault: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    store = store_of()
    vars(store).update(fault)
    assert join(store, numbers()).difference is None
    told = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert len(told) == 1
    assert "no store kept the probe" in told[0]


def join_as(common: CommonLayout, model_id: str) -> DictStore:
    """Return a store with the probe of a stack of another layout."""
    store = store_of(common)
    shape = PROBE_TOKENS // common.block_size, common.layout.block_bytes
    agree([store], common, model_id, np.ones(shape, np.uint8))
    return store


def test_a_reference_that_lost_a_block_is_completed() -> None:
    store, slight = store_of(), [part * (1 + 5e-5) for part in numbers()]
    join(store, numbers())
    lost = list(store.blocks)[3]
    store.drop([lost])
    joined = join(store, slight)
    assert joined.is_shared
    assert joined.model == join(store, numbers()).model
    assert store.blocks[lost] == bytes(blocks_of(slight)[3])


class Hesitant(DictStore):
    """Admits what is offered twice, like a disk without room."""

    def save(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], deadline: float
    ) -> Outcomes:
        self.answer = Saved.SAVED if self.num_saves else Saved.REFUSED
        return super().save(keys, blocks, deadline)


def test_a_store_that_admits_second_offers_keeps_the_reference() -> None:
    store = Hesitant(COMMON.layout.block_bytes)
    join(store, numbers())
    assert len(store.blocks) == COUNT


class Overtaken(DictStore):
    """Gets the probe of another stack while this one computes."""

    def save(
        self, keys: Sequence[bytes], blocks: Sequence[memoryview], deadline: float
    ) -> Outcomes:
        for key, block in zip(keys, blocks_of(numbers(seed=1)), strict=True):
            self.blocks[key] = bytes(block)
        return np.full(len(keys), Saved.KNOWN, np.uint8)


def test_of_two_stacks_at_the_same_time_one_is_the_first() -> None:
    store = Overtaken(COMMON.layout.block_bytes)
    assert not join(store, numbers()).is_shared
    store.blocks.clear()
    assert join(store, numbers(seed=1)).is_shared


def test_the_last_store_has_the_reference_and_others_get_it() -> None:
    near, far = store_of(), store_of()
    first = join(far, numbers())
    slight = [part * (1 + 5e-5) for part in numbers()]
    join(near, slight)
    both = agree([near, far], COMMON, "m", blocks_of(slight))
    assert both.model == first.model
    empty = store_of()
    agree([empty, far], COMMON, "m", blocks_of(numbers(seed=1)))
    assert not empty.blocks  # a stack that differs gives it to none
    agree([empty, far], COMMON, "m", blocks_of(slight))
    assert empty.blocks == far.blocks


def test_a_private_store_is_not_asked() -> None:
    store, private = store_of(), store_of()
    private.is_private = True  # type: ignore[attr-defined]
    agree([private, store], COMMON, "m", blocks_of(numbers()))
    assert (private.num_saves, len(store.blocks)) == (0, COUNT)


@pytest.mark.parametrize("fault", ["fails", "refuses"])
def test_without_a_store_that_keeps_the_probe_a_stack_is_alone(fault: str) -> None:
    store = store_of()
    store.fails, store.answer = fault == "fails", Saved.REFUSED
    joined = join(store, numbers())
    assert joined.difference is None
    assert joined.is_shared
    assert joined.model == join(store_of(), numbers()).model
