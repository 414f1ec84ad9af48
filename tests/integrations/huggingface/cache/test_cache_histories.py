"""Any history of a paged cache leaves what a `DynamicCache` holds."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

from tests.support.cache_name import passing

transformers = pytest.importorskip("transformers")


hypothesis = pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers.cache_utils import DynamicCache, DynamicLayer  # noqa: E402

import kvpager  # noqa: E402
from tests.support import tiny_models  # noqa: E402
from tests.support.cache_calls import model_named  # noqa: E402

WINDOW = 6
LAYERS = [None, WINDOW, None, WINDOW]
PAGE_BYTES = 4096  # of the system; a mapped block is at least one in each group of layers
TOKEN_BYTES = len(LAYERS) * 2 * (4 + 4) * 4  # 2 heads of 4, keys and values in float32
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["append"] * 4
            + ["reorder", "select", "mask", "repeat", "crop", "reset", "copy", "hold", "record"]
        ),
        st.integers(0, 2**16),
    ),
    min_size=1,
    max_size=25,
)


def _config() -> Any:
    kinds = ["full_attention" if window is None else "sliding_attention" for window in LAYERS]
    return transformers.Gemma3TextConfig(
        num_hidden_layers=len(LAYERS), layer_types=kinds, sliding_window=WINDOW
    )


def _contents(layer: Any) -> tuple[Any, Any]:
    if layer.keys is None or layer.get_seq_length() == 0:
        return None, None
    keys, values = torch.cat([layer.keys]), torch.cat([layer.values])  # mapped, if they can be
    # While the past is recorded, `keys` may show any part of it.
    if layer.is_sliding:
        keys, values = keys[:, :, -WINDOW + 1 :], values[:, :, -WINDOW + 1 :]
    return keys, values


def _assert_equal_caches(paged: Any, plain: Any) -> None:
    for index, (mine, theirs) in enumerate(zip(paged.layers, plain.layers, strict=True)):
        assert mine.get_seq_length() == theirs.get_seq_length()
        assert paged.get_mask_sizes(3, index) == plain.get_mask_sizes(3, index)
        for found, expected in zip(_contents(mine), _contents(theirs), strict=True):
            assert (found is None) == (expected is None)
            assert found is None or torch.equal(found, expected)


def _apply(operation: str, chance: random.Random, caches: list[Any], held: list[Any]) -> None:
    plain = caches[-1]
    keys = plain.layers[0].keys if plain.layers else None
    rows = 0 if keys is None or keys.dim() != 4 else len(keys)
    if operation == "append":
        shape = (rows or chance.randint(1, 3), 2, chance.randint(1, 9), 4)
        generator = torch.Generator().manual_seed(chance.randrange(2**31))
        for index in range(len(LAYERS)):
            key, value = torch.randn(2, *shape, generator=generator)
            visible = plain.get_mask_sizes(shape[2], index)[0] if plain.layers else shape[2]
            results = [cache.update(key, value, index) for cache in caches]
            for found, expected in zip(*results, strict=True):
                # While the past is recorded, older ones return more than their mask shows.
                assert torch.equal(torch.clone(found), expected[:, :, -visible:])
    elif operation == "reset":
        for cache in caches:
            cache.reset()
        if plain.layers and plain.layers[0].keys is not None:
            # Older ones leave zeros where tokens were: compare with what newer ones do.
            window = hasattr(plain.layers[1], "sliding_window")
            caches[-1] = DynamicCache(config=_config()) if window else DynamicCache()
            if window and plain.layers[1].record_past:
                caches[-1].activate_past_recording()
            if not window:
                caches[-1].layers[:] = [DynamicLayer() for _ in plain.layers]
    elif operation == "record":
        for cache in caches:
            cache.activate_past_recording()
    elif not plain.get_seq_length():
        return
    elif operation == "reorder":
        indices = torch.tensor([chance.randrange(rows) for _ in range(rows)])
        for cache in caches:
            cache.reorder_cache(indices)
    elif operation == "select":
        indices = torch.tensor([chance.randrange(rows) for _ in range(chance.randint(1, rows))])
        for cache in caches:
            cache.batch_select_indices(indices)
    elif operation == "mask":
        mask = torch.tensor([chance.random() < 0.6 for _ in range(rows)])
        mask[chance.randrange(rows)] = True
        for cache in caches:
            cache.batch_select_indices(mask)
    elif operation == "repeat" and rows <= 4:
        repeats = chance.randint(1, 3)
        for cache in caches:
            cache.batch_repeat_interleave(repeats)
    elif operation == "crop":
        _crop(chance.randint(0, plain.get_seq_length()), caches)
    elif operation == "copy":
        held.append(tuple(caches))
        caches[:] = [copy.deepcopy(cache) for cache in caches]
    elif operation == "hold":
        layer = chance.randrange(len(LAYERS))
        keys = caches[0].layers[layer].keys
        # Views of blocks, if these are mapped. Only before the keys are gathered.
        columns = keys.transpose(1, 2)[:, chance.randrange(keys.shape[2]) :]
        held += [(columns, torch.clone(columns)), (keys, torch.clone(keys))]


def _crop(count: int, caches: list[Any]) -> None:
    plain = caches[-1]
    sliding = plain.layers[1]
    beyond = sliding.get_seq_length() >= WINDOW
    # transformers' own crop loses what it still needs where the recorded past is too short.
    short = sliding.keys.shape[2] - count < min(WINDOW - 1, plain.get_seq_length() - count)
    if beyond and not sliding.record_past:
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            caches[0].crop(-count)
    elif not (beyond and short):
        for cache in caches:
            cache.crop(-count)


def _assert_unharmed(held: list[Any]) -> None:
    for first, second in held:
        if isinstance(first, torch.Tensor):
            assert torch.equal(torch.clone(first), second)
        else:
            _assert_equal_caches(first, second)


@settings(max_examples=60)
@given(
    operations=OPERATIONS,
    block_size=st.sampled_from([1, 4, 16]),
    memory_of_tokens=st.sampled_from([None, 1, 16, 64]),
    mode=st.sampled_from(["paged", "virtual"]),
)
def test_any_history_leaves_what_a_dynamic_cache_holds(
    operations: list[tuple[str, int]], block_size: int, memory_of_tokens: int | None, mode: Any
) -> None:
    # Where there is too little memory, rows live in host memory.
    token_bytes = TOKEN_BYTES if mode == "paged" else 2 * max(PAGE_BYTES // block_size, TOKEN_BYTES)
    bound = memory_of_tokens and memory_of_tokens * token_bytes
    paged = kvpager.PagedCache(
        _config(), block_size=block_size, memory=bound, host_memory=bound and "1GB", mode=mode
    )
    memory = paged.memory
    caches: list[Any] = [paged, DynamicCache(config=_config())]
    del paged
    held: list[Any] = []
    for operation, seed in operations:
        _apply(operation, random.Random(seed), caches, held)
        _assert_equal_caches(*caches)
        for pool in [*memory.pools(), *(memory.host.pools() if memory.host else [])]:
            pool.settle()
            pool.manager.check()
            del pool
    _assert_unharmed(held)
    caches.clear()
    held.clear()
    assert memory.reserved_bytes == 0
    assert memory.host is None or memory.host.reserved_bytes == 0


@settings(max_examples=40)
@given(operations=OPERATIONS)
def test_any_history_of_a_cache_without_configuration(operations: list[tuple[str, int]]) -> None:
    caches: list[Any] = [kvpager.PagedCache(), DynamicCache()]
    held: list[Any] = []
    for operation, seed in operations:
        if operation in ("record", "hold"):
            continue
        if not caches[-1].layers and operation in ("reset", "copy"):
            continue
        chance = random.Random(seed)
        if operation == "crop":
            if caches[-1].layers:
                count = chance.randint(0, caches[-1].get_seq_length())
                for cache in caches:
                    cache.crop(-count)
        else:
            _apply(operation, chance, caches, held)
        _assert_equal_caches(*caches)
    _assert_unharmed(held)


def test_crop_takes_negative_numbers_only() -> None:
    plain = DynamicCache()
    plain.update(*torch.zeros(2, 1, 2, 9, 4), 0)
    try:
        plain.crop(3)
    except ValueError:
        pass
    else:
        pytest.skip("this transformers crops to a positive length")
    cache = kvpager.PagedCache()
    cache.update(*torch.zeros(2, 1, 2, 9, 4), 0)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_cache_cropped_to_nothing_shows_empty_keys_and_values(name: str) -> None:
    shown = []
    for paged in (False, True):
        model = model_named(name)
        cache = kvpager.PagedCache(model.config) if paged else DynamicCache(config=model.config)
        with torch.no_grad():
            model(**tiny_models.prompts([5, 5]), **passing(cache))
        cache.crop(-cache.get_seq_length())
        shown.append([(layer.keys + 0, layer.values + 0) for layer in cache.layers])
    torch.testing.assert_close(shown[1], shown[0])


def test_crop_to_a_length_works_where_transformers_knows_it() -> None:
    caches: list[Any] = [kvpager.PagedCache(), DynamicCache()]
    for cache in caches:
        cache.update(*torch.ones(2, 1, 2, 9, 4), 0)
    try:
        caches[1].crop(3)
    except ValueError:
        pytest.skip("this transformers takes negative numbers only")
    caches[0].crop(3)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 3


def test_a_failed_crop_changes_nothing() -> None:
    cache = kvpager.PagedCache(_config())
    for index in range(4):
        cache.update(*torch.randn(2, 1, 2, 9, 4), index)
    before = [_contents(layer) for layer in cache.layers]
    with pytest.raises(RuntimeError):
        cache.crop(-2)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(
            torch.clone(layer.keys)[:, :, -WINDOW + 1 :]
            if layer.is_sliding
            else torch.clone(layer.keys),
            keys,
        )
        assert torch.equal(_contents(layer)[1], values)


def test_another_number_of_rows_is_an_error_that_changes_nothing() -> None:
    cache = kvpager.PagedCache()
    cache.update(*torch.zeros(2, 2, 2, 9, 4), 0)
    with pytest.raises(ValueError, match="rows"):
        cache.update(*torch.zeros(2, 3, 2, 1, 4), 0)
    assert cache.get_seq_length() == 9


def test_an_index_beyond_the_batch_is_an_error() -> None:
    cache = kvpager.PagedCache()
    cache.update(*torch.zeros(2, 2, 2, 9, 4), 0)
    for indices in (torch.tensor([0, 2]), torch.tensor([5])):
        with pytest.raises(IndexError):
            cache.batch_select_indices(indices)
        with pytest.raises((IndexError, ValueError)):
            cache.reorder_cache(indices)
    assert cache.get_seq_length() == 9
    cache.memory.pools()[0].manager.check()


def test_a_model_is_no_configuration() -> None:
    with pytest.raises(TypeError, match=r"model\.config"):
        kvpager.PagedCache(model_named("llama"))


@pytest.mark.parametrize("seed", range(24))
def test_any_history_of_mapped_blocks_leaves_tensors_as_they_were(seed: int) -> None:
    chance = random.Random(seed)
    block_size = chance.choice([1, 4, 16])
    paged = kvpager.PagedCache(_config(), block_size=block_size, mode="virtual")
    caches: list[Any] = [paged, DynamicCache(config=_config())]
    held: list[Any] = []
    kinds = ["append"] * 4 + ["reorder", "select", "mask", "repeat", "crop", "reset", "copy"]
    for operation in ["append", *chance.choices([*kinds, "hold", "record"], k=15)]:
        _apply(operation, random.Random(chance.randrange(1_000)), caches, held)
        _assert_equal_caches(*caches)
    _assert_unharmed(held)
