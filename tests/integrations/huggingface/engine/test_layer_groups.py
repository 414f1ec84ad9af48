"""Layers in groups that share block tables: as few as fit blocks of one size."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from kvpager.integrations.huggingface.runner.layer_groups import LayerGroups, group_layers
from kvpager.storage.block_storage import LayerShape

SHAPE = LayerShape(8, 128, 128)


def groups(windows: list[int | None], max_length: int | None = 32_768) -> LayerGroups:
    found = group_layers([SHAPE] * len(windows), windows, max_length)
    assert len(set(found.places)) == len(windows)  # no two layers in one place
    for (group, place), window in zip(found.places, windows, strict=True):
        assert place < len(found.shapes)
        assert found.windows[group] in (window, None)
    return found


def test_layers_that_look_to_the_front_are_one_group() -> None:
    found = groups([None] * 32)
    assert found.windows == (None,)
    assert found.places == tuple((0, layer) for layer in range(32))


def test_layers_of_one_window_are_one_group() -> None:
    assert groups([4096] * 32).windows == (4096,)


def test_as_many_full_as_windowed_layers_are_two_groups() -> None:
    found = groups([128, None] * 12)
    assert (found.windows, len(found.shapes)) == ((None, 128), 12)
    assert found.places[:4] == ((1, 0), (0, 0), (1, 1), (0, 1))


def test_five_windowed_layers_per_full_layer_waste_little() -> None:
    found = groups(([1024] * 5 + [None]) * 10 + [1024] * 2)  # gemma 3 of 27 billion
    assert (found.windows, len(found.shapes)) == ((None, *[1024] * 6), 10)
    sizes = [sum(place[0] == group for place in found.places) for group in range(7)]
    assert sizes == [10, 9, 9, 9, 9, 8, 8]


def test_few_windowed_layers_among_many_full_ones_make_smaller_blocks() -> None:
    found = groups([None] * 24 + [4096] * 4)
    assert (found.windows, len(found.shapes)) == ((*[None] * 6, 4096), 4)


def test_a_window_that_no_sequence_outgrows_is_none() -> None:
    assert groups([4096, None] * 4, max_length=4096).windows == (None,)
    assert groups([4095, None] * 4, max_length=4096).windows == (None, 4095)
    assert groups([4096, None] * 4, max_length=None).windows == (None, 4096)


def test_layers_of_different_shapes_form_one_full_group() -> None:
    shapes = [SHAPE, LayerShape(4, 256, 256)] * 3
    found = group_layers(shapes, [1024, None] * 3, 32_768)
    assert found == LayerGroups((None,), tuple(shapes), tuple((0, layer) for layer in range(6)))


def test_so_many_groups_that_each_step_would_suffer_are_one() -> None:
    assert groups([None] * 23 + [1024] * 1).windows == (None,)
