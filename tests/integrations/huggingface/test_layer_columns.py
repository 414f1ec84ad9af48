"""Layers that hold other columns than the rest: the same tokens as unpatched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")


peft = pytest.importorskip("peft")

from transformers import PreTrainedModel  # noqa: E402
from transformers.cache_utils import DynamicCache  # noqa: E402

import kvpager  # noqa: E402
from kvpager.integrations.huggingface.releases import cache_of, with_cache  # noqa: E402
from tests.support import tiny_models  # noqa: E402
from tests.support.wrapped_models import PATCHES, check_pools, tokens  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def seen(lengths: list[int]) -> dict[str, torch.Tensor]:
    adapt = tiny_models.ARCHITECTURES["mllama, an image"].adapt
    assert adapt is not None
    return adapt(tiny_models.prompts(lengths))


IMAGE_COLUMNS = 10  # that the tiny model's image has, in two tiles
LENGTHS = {"padded": [9, 23], "as long as an image": [10, 4], "even": [9, 9]}


def seeing(cross: list[int]) -> PreTrainedModel:
    config = tiny_models.tiny_model("mllama, an image").config.text_config
    config = type(config)(**config.to_dict() | {"cross_attention_layers": cross})
    return tiny_models.tiny_model("mllama, an image", text_config=config)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("cross", [[1], [0, 2], [1, 2]], ids=str)
def test_layers_that_attend_to_an_image_have_its_columns(
    cross: list[int], lengths: list[int]
) -> None:
    model = seeing(cross)
    for inputs in (seen(lengths), tiny_models.prompts(lengths)):
        for mode in ({}, {"num_beams": 3}):
            expected = tokens(model, inputs, **mode)
            for options in PATCHES.values():
                with kvpager.patch(model, **options) as patch:
                    for _ in range(2):
                        assert tokens(model, inputs, **mode) == expected
                    check_pools(patch)


def test_a_cache_with_an_empty_first_layer_continues_as_unpatched() -> None:
    model, inputs = seeing([0]), tiny_models.prompts([9, 9])

    def turns() -> Any:
        options = {"max_new_tokens": 4, "return_dict_in_generate": True}
        first = model.generate(**inputs, **options)
        return tokens(model, with_cache({"input_ids": first.sequences}, cache_of(first)))

    expected = turns()
    assert isinstance(expected, list)
    with kvpager.patch(model):
        assert turns() == expected


def states(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, columns, 16, generator=generator)


Passes = list[dict[int, tuple[int, int]]]  # what each pass writes: layer -> rows and columns
PASSES: dict[str, Passes] = {
    "another length": [{0: (2, 6), 1: (2, 9), 2: (2, 6), 3: (2, 9)}, {0: (2, 1), 2: (2, 1)}],
    "a shorter one": [{0: (2, 9), 1: (2, 6), 2: (2, 9), 3: (2, 6)}, {0: (2, 1), 2: (2, 1)}],
    "other rows": [{0: (2, 6), 1: (3, 6), 2: (2, 6), 3: (3, 6)}, {0: (2, 1), 2: (2, 1)}],
    "the first layer": [{0: (2, 3), 1: (2, 6), 2: (2, 6)}, {1: (2, 1), 2: (2, 1)}],
    "a layer that comes later": [{0: (2, 6), 2: (2, 6)}, {0: (2, 1), 1: (2, 1), 2: (2, 1)}],
    "layers that are skipped": [
        {0: (2, 6), 1: (2, 6), 2: (2, 6), 3: (2, 6)},
        {0: (2, 2), 3: (2, 2)},
        {0: (2, 1), 1: (2, 1), 2: (2, 1), 3: (2, 1)},
        {0: (2, 5), 1: (2, 5), 2: (2, 5), 3: (2, 5)},
    ],
}


@pytest.mark.mostly_slow(quick=25)
@pytest.mark.parametrize("change", ["nothing", "reordered", "copied", "cropped"])
@pytest.mark.parametrize("kind", ["lazy", "full", "window"])
@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
def test_layers_may_write_columns_of_their_own(passes: Passes, kind: str, change: str) -> None:
    config = {
        "lazy": None,
        "full": tiny_models.tiny_model("llama", num_hidden_layers=4).config,
        "window": tiny_models.tiny_model("mistral", num_hidden_layers=4, sliding_window=4).config,
    }[kind]
    paged, plain = kvpager.PagedCache(config, block_size=4), DynamicCache(config=config)
    kept = []
    for number, writes in enumerate(passes):
        for layer, (rows, columns) in writes.items():
            state = states(rows, columns, seed=10 * number + layer)
            for mine, theirs in zip(
                paged.update(state, -state, layer), plain.update(state, -state, layer), strict=True
            ):
                assert torch.equal(mine + 0, theirs)
        if change == "copied":
            kept.append((copy.deepcopy(paged), copy.deepcopy(plain)))
        elif change == "reordered":
            for cache in (paged, plain):
                cache.reorder_cache(torch.tensor([1, 0]))
        elif change == "cropped" and kind != "window":
            paged.crop(-1)
            for layer in plain.layers:
                if layer.is_initialized:  # the others fail in the oldest releases
                    layer.crop(-1)
    for mine, theirs in [*kept, (paged, plain)]:
        assert_the_same(mine, theirs)


def assert_the_same(paged: kvpager.PagedCache, plain: DynamicCache) -> None:
    for mine, theirs in zip(paged.layers, plain.layers, strict=True):
        assert mine.get_seq_length() == theirs.get_seq_length()
        if theirs.get_seq_length():
            assert torch.equal(mine.keys + 0, theirs.keys)
            assert torch.equal(mine.values + 0, theirs.values)
    for pool in {id(group.pool): group.pool for group in paged.groups if group.pool}.values():
        pool.settle()
        pool.manager.check()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_step_without_room_leaves_diverged_layers_unchanged(failing: int) -> None:
    block_bytes = 4 * 2 * 2 * 16 * 4  # of a layer
    cache, plain = kvpager.PagedCache(memory=18 * block_bytes, block_size=4), DynamicCache()
    for each in (cache, plain):
        each.update(states(2, 6), states(2, 6), 0)
        each.update(states(2, 9), states(2, 9), 1)
    for layer in range(failing):
        cache.update(states(2, 2), states(2, 2), layer)
    with pytest.raises(kvpager.OutOfBlocks):
        cache.update(states(2, 99), states(2, 99), failing)
    assert [group.num_columns for group in cache.groups] == [6, 9]
    assert_the_same(cache, plain)


def test_drafts_of_a_models_first_layers_are_unchanged() -> None:
    model = tiny_models.tiny_model("llama", num_hidden_layers=4)
    prompt = tiny_models.prompts([17])
    expected = tokens(model, prompt, assistant_early_exit=2)
    assert isinstance(expected, list)
    with kvpager.patch(model):
        assert tokens(model, prompt, assistant_early_exit=2) == expected
