"""Models spread over devices, or offloaded, by accelerate: the same tokens with paging as without.

The second and third device are fake (`fake_devices.py`) and need no hardware. Tensors of two
devices never meet in an operation there.
"""

from __future__ import annotations

import copy
import functools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.cache_name import cache_of, passing

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from transformers import DynamicCache, PreTrainedModel  # noqa: E402

import kvpager  # noqa: E402
from kvpager.integrations.huggingface.cache.pools import PagedPool  # noqa: E402
from tests.support import tiny_models  # noqa: E402
from tests.support.fake_devices import fake_devices, late_copies  # noqa: E402

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("maia", 0), torch.device("maia", 1)
SPLITS = {
    "in halves": [CPU, CPU, FIRST, FIRST],
    "in turns": [CPU, FIRST, SECOND, FIRST],
    "on another device": [FIRST, FIRST, FIRST, FIRST],
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
}
BATCHES = {"equal lengths": [29, 29], "left padding": [44, 6, 30]}  # blocks fill up on the way


@pytest.fixture
def _boards() -> Iterator[None]:
    with fake_devices():
        yield


on_boards = pytest.mark.usefixtures("_boards")


@functools.cache
def whole() -> PreTrainedModel:
    return tiny_models.tiny_model("llama", num_hidden_layers=4)


def places(layers: list[Any], rest: Any = "cpu") -> dict[str, Any]:
    """A device map: the layers as they are given, and where the rest of the model is."""
    others = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    numbered = {f"model.layers.{number}": place for number, place in enumerate(layers)}
    return dict.fromkeys(others, rest) | numbered


def spread(devices: list[torch.device]) -> PreTrainedModel:
    """The same model, its layers on these devices."""
    model: PreTrainedModel = accelerate.dispatch_model(
        copy.deepcopy(whole()), places(devices), "cpu"
    )
    return model


def generate(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(7)
    defaults = {"max_new_tokens": 6, "return_dict_in_generate": True, "do_sample": False}
    return model.generate(**inputs, **{**defaults, **options})


@functools.cache
def expected(batch: str, mode: str) -> torch.Tensor:
    result = generate(whole(), tiny_models.prompts(BATCHES[batch]), **MODES[mode])
    sequences: torch.Tensor = result.sequences
    return sequences


# ---------------------------------------------------------------- several devices


@on_boards
def test_tensors_of_two_devices_do_not_mix() -> None:
    one, other = torch.ones(3, device=FIRST), torch.ones(3, device=SECOND)
    assert (one + one).device == FIRST
    assert (one + one).cpu().tolist() == [2.0, 2.0, 2.0]
    for operation in (lambda: one + other, lambda: other * torch.ones(3), one.numpy):
        with pytest.raises((RuntimeError, TypeError)):
            operation()


@pytest.mark.mostly_slow(quick=1)
@on_boards
@pytest.mark.parametrize(
    ("split", "batch", "mode"),
    [("in turns", batch, mode) for batch in BATCHES for mode in MODES]
    + [
        ("in halves", "left padding", "greedy"),
        ("in halves", "equal lengths", "beams"),
        ("on another device", "left padding", "sampling"),
    ],
)
def test_layers_keep_their_blocks_where_they_compute(split: str, batch: str, mode: str) -> None:
    model = spread(SPLITS[split])
    with kvpager.patch(model) as patch:
        paged = generate(model, tiny_models.prompts(BATCHES[batch]), **MODES[mode])
        stats, report = patch.stats(), patch.report()
    assert torch.equal(paged.sequences, expected(batch, mode))
    layers = cache_of(paged).layers
    parts = [layer.group.parts(layer.number, layer.num_columns) for layer in layers]
    assert [part.place.storage.device for (part,) in parts] == SPLITS[split]
    assert (stats.in_place_reads > 0, stats.gathers) == (True, 0)
    assert all(f"on {device}" in report for device in SPLITS[split])


@pytest.mark.mostly_slow(quick=1)
@on_boards
@pytest.mark.parametrize("split", SPLITS)
def test_blocks_are_gathered_where_they_are(split: str) -> None:
    model = spread(SPLITS[split])
    with kvpager.patch(model, in_place=False) as patch:
        paged = generate(model, tiny_models.prompts(BATCHES["left padding"]))
        assert patch.stats().in_place_reads == 0
    assert torch.equal(paged.sequences, expected("left padding", "greedy"))
    keys = [layer.keys for layer in cache_of(paged).layers]
    assert [key.device for key in keys] == SPLITS[split]
    assert [(key + 0).device for key in keys] == SPLITS[split]


@pytest.mark.slow
@on_boards
@pytest.mark.parametrize("split", SPLITS)
def test_a_known_prompt_is_found_on_every_device(split: str) -> None:
    model, inputs = spread(SPLITS[split]), tiny_models.prompts(BATCHES["left padding"])
    with kvpager.patch(model, prefix_cache=True) as patch:
        for mode in ("greedy", "greedy", "beams"):
            before = patch.stats().prefix_hit_tokens
            paged = generate(model, inputs, **MODES[mode])
            assert torch.equal(paged.sequences, expected("left padding", mode))
        assert patch.stats().prefix_hit_tokens > before > 0


@pytest.mark.slow
@on_boards
@pytest.mark.parametrize("split", SPLITS)
def test_a_copied_cache_goes_on_by_itself_on_every_device(split: str) -> None:
    inputs, model = tiny_models.prompts([21, 21]), spread(SPLITS[split])
    turns = [tiny_models.prompts([5, 5], seed=seed)["input_ids"] for seed in (1, 2)]
    with kvpager.patch(model) as patch:
        begun = generate(model, inputs, max_new_tokens=3)
        copies = [copy.deepcopy(cache_of(begun)) for _ in turns]
        assert patch.stats().num_shared_blocks > 0
        for turn, cache in zip(turns, copies, strict=True):
            ids = torch.cat([begun.sequences, turn], dim=1)
            longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            plain = generate(whole(), longer).sequences
            assert torch.equal(generate(model, longer, **passing(cache)).sequences, plain)


@on_boards
def test_eight_bits_are_the_same_on_several_devices() -> None:
    inputs = tiny_models.prompts(BATCHES["left padding"])
    found = []
    for model in (copy.deepcopy(whole()), spread(SPLITS["in turns"])):
        with kvpager.patch(model, kv_cache_dtype="int8"):
            found.append(generate(model, inputs).sequences)
    assert torch.equal(*found)


@on_boards
def test_a_bound_on_memory_holds_for_all_devices_together() -> None:
    model, inputs = spread(SPLITS["in halves"]), tiny_models.prompts(BATCHES["equal lengths"])
    with kvpager.patch(model) as patch:
        generate(model, inputs)
        needed = patch.stats().peak_held_bytes
    with kvpager.patch(model, memory=needed // 2), pytest.raises(kvpager.OutOfBlocks):
        generate(model, inputs)


@pytest.mark.slow
@on_boards
@pytest.mark.parametrize(
    ("split", "kv_cache_dtype", "in_place"),
    [
        ("in turns", None, True),
        ("in turns", "int8", False),
        ("in halves", None, False),
        ("in halves", "int8", True),
        ("on another device", "int8", True),
    ],
)
def test_rows_beyond_the_device_are_read_from_host_memory(
    split: str, kv_cache_dtype: Any, in_place: bool
) -> None:
    inputs, options = tiny_models.prompts(BATCHES["left padding"]), {"max_new_tokens": 24}
    with kvpager.patch(
        model := copy.deepcopy(whole()), block_size=4, kv_cache_dtype=kv_cache_dtype
    ) as patch:
        plain = generate(model, inputs, **options).sequences
        bound = patch.stats().peak_held_bytes // 3
    with kvpager.patch(
        model := spread(SPLITS[split]),
        block_size=4,
        kv_cache_dtype=kv_cache_dtype,
        memory=bound,
        host_memory="1MiB",
        in_place=in_place,
    ) as patch:
        found = generate(model, inputs, **options)
        assert patch.stats().host_held_bytes > 0
        assert torch.equal(found.sequences, plain)
        assert (patch.stats().in_place_reads > 0) == in_place
        parts = cache_of(found).groups[0].parts(0, cache_of(found).get_seq_length())
        assert [part.place.storage.device.type for part in parts] in (
            [SPLITS[split][0].type, "cpu"],
            ["cpu"],
        )


def of_rows(cache: Any, column: slice) -> list[torch.Tensor]:
    """Keys and values of some columns, as the CPU has them."""
    layer = cache.layers[0]
    return [torch.clone(each)[:, :, column].cpu() for each in (layer.keys, layer.values)]


def host_of(cache: Any) -> PagedPool:
    host: PagedPool = cache.groups[0].pool.host
    return host


def small_cache(num_blocks: int, num_host_blocks: int) -> kvpager.PagedCache:
    """A cache of layers with 2 heads of 16 numbers, and room for some blocks in either memory."""
    block_bytes = 2 * 4 * 2 * 16 * 4
    return kvpager.PagedCache(
        memory=num_blocks * block_bytes, host_memory=num_host_blocks * block_bytes, block_size=4
    )


def with_rows_on_the_host(states: list[torch.Tensor]) -> kvpager.PagedCache:
    """A cache whose last two rows are in host memory; the second of them twice, so it is shared."""
    cache = small_cache(6, 9)
    cache.update(*(each.to(FIRST) for each in states), 0)
    rows = cache.groups[0].rows
    assert rows is not None
    assert [each.rows.tolist() for each in rows.partitions()] == [[0, 1], [2, 3]]
    cache.batch_select_indices(torch.tensor([2, 3, 3]))
    host = host_of(cache)
    host.manager.free(host.allocate(3 * [1, 2, 3, 4], None))  # it has all its 9 blocks from now on
    return cache


@on_boards
def test_host_memory_is_not_written_during_copies_from_it() -> None:
    states = [torch.randn(4, 2, 10, 16) for _ in range(2)]
    cache = with_rows_on_the_host(states)
    host = host_of(cache)
    one = [torch.randn(3, 2, 1, 16, device=FIRST) for _ in range(2)]
    with late_copies() as stream:
        # Row 0 returns to the device, and row 1 copies the block that it shares with row 2.
        cache.groups[0].extend(3, 10, 1)
        assert stream.num_made < len(stream.copies)
        assert host.manager.num_held_blocks == 3 + 4
        stream.synchronize()
        host.settle()
        assert host.manager.num_held_blocks == 4
        cache.update(*one, 0)
        rows = cache.groups[0].rows
        assert rows is not None
        assert [each.rows.tolist() for each in rows.partitions()] == [[0], [1, 2]]
        for found, before in zip(of_rows(cache, slice(0, 10)), states, strict=True):
            assert torch.equal(found, before[[2, 3, 3]])


@on_boards
def test_a_full_host_waits_for_copies_that_read_it() -> None:
    states = [torch.randn(4, 2, 10, 16) for _ in range(2)]
    cache = with_rows_on_the_host(states)
    with late_copies():
        cache.groups[0].extend(3, 10, 1)
        host = host_of(cache)
        assert host.manager.num_held_blocks == 7
        # 2 of its 9 blocks are free, and 5 when the copy of the row that returned is over.
        sequence = host.allocate(5 * [1, 2, 3, 4], None)
        assert host.manager.num_held_blocks == 9
        host.manager.free(sequence)
        for found, before in zip(of_rows(cache, slice(0, 10)), states, strict=True):
            assert torch.equal(found, before[[2, 3, 3]])


@pytest.mark.slow
@on_boards
@pytest.mark.parametrize("seed", [1, 2, 5])
def test_any_history_with_late_copies_matches_a_dynamic_cache(seed: int) -> None:
    torch.manual_seed(seed)
    choices = random.Random(seed)
    cache, plain = small_cache(16, 200), DynamicCache()
    with late_copies() as stream:
        for _ in range(60):
            rows = len(plain.layers[0].keys) if plain.get_seq_length() else 3
            what = choices.choice(["select", "crop", "copy", "wait", "update", "update"])
            if what == "update" or not plain.get_seq_length():
                columns = choices.randint(1, 5)
                states = [torch.randn(rows, 2, columns, 16) for _ in range(2)]
                plain.update(*states, 0)
                cache.update(*(each.to(FIRST) for each in states), 0)
            elif what == "select":
                chosen = torch.tensor(choices.choices(range(rows), k=choices.randint(1, 6)))
                plain.batch_select_indices(chosen)
                cache.batch_select_indices(chosen)
            elif what == "crop" and plain.get_seq_length() > 2:
                columns = choices.randint(1, plain.get_seq_length() - 2)
                plain.crop(-columns)
                cache.crop(-columns)
            elif what == "copy":
                other = copy.deepcopy(cache)
                cache, other = choices.sample([cache, other], 2)
            else:
                stream.synchronize()
            stored = (plain.layers[0].keys, plain.layers[0].values)
            for found, expected in zip(of_rows(cache, slice(None)), stored, strict=True):
                assert torch.equal(found, expected)
    assert stream.copies


# ---------------------------------------------------------------- offloaded weights

Offload = Callable[[Path], PreTrainedModel]


def to_host_memory(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = accelerate.cpu_offload(copy.deepcopy(whole()))
    return model


def to_disk(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = accelerate.disk_offload(copy.deepcopy(whole()), folder)
    return model


def some_layers_to_disk(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = accelerate.dispatch_model(
        copy.deepcopy(whole()), places(2 * ["cpu"] + 2 * ["disk"]), "cpu", offload_dir=folder
    )
    return model


def loaded_with_layers_on_disk(folder: Path) -> PreTrainedModel:
    whole().save_pretrained(folder)
    model: PreTrainedModel = transformers.LlamaForCausalLM.from_pretrained(
        folder, device_map=places(3 * ["cpu"] + ["disk"])
    )
    return model.eval()


OFFLOADS = [to_host_memory, to_disk, some_layers_to_disk, loaded_with_layers_on_disk]
# transformers 5.17 warns when a model's first weights are offloaded.
quietly = pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids`")
offloads = pytest.mark.parametrize("offload", OFFLOADS, ids=lambda offload: offload.__name__)


@pytest.mark.mostly_slow(quick=3)
@quietly
@offloads
@pytest.mark.parametrize("mode", MODES)
def test_offloaded_weights_give_the_same_tokens(
    offload: Offload, mode: str, tmp_path: Path
) -> None:
    model = offload(tmp_path)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    with kvpager.patch(model) as patch:
        paged = generate(model, tiny_models.prompts(BATCHES["left padding"]), **MODES[mode])
        assert patch.stats().in_place_reads > 0
    assert torch.equal(paged.sequences, expected("left padding", mode))


@quietly
@offloads
def test_an_offloaded_model_knows_its_prompts_again(offload: Offload, tmp_path: Path) -> None:
    model, inputs = offload(tmp_path), tiny_models.prompts(BATCHES["left padding"])
    with kvpager.patch(model, prefix_cache=True) as patch:
        hits = []
        for _ in range(3):
            paged = generate(model, inputs)
            assert torch.equal(paged.sequences, expected("left padding", "greedy"))
            hits.append(patch.stats().prefix_hit_tokens)
    assert 0 == hits[0] < hits[1] < hits[2]


@pytest.mark.slow
@on_boards
@quietly
def test_offloaded_layers_have_blocks_on_the_computing_device() -> None:
    there = places([FIRST, FIRST, "cpu", "cpu"], rest=FIRST)
    model = accelerate.dispatch_model(copy.deepcopy(whole()), there, main_device=FIRST)
    assert model.model.layers[3].mlp.down_proj.weight.device.type == "meta"
    with kvpager.patch(model, prefix_cache=True) as patch:
        for _ in range(2):
            paged = generate(model, tiny_models.prompts(BATCHES["left padding"]))
            assert torch.equal(paged.sequences, expected("left padding", "greedy"))
            layers = cache_of(paged).layers
            parts = [layer.group.parts(layer.number, layer.num_columns) for layer in layers]
            assert {part.place.storage.device for (part,) in parts} == {FIRST}
        assert patch.stats().prefix_hit_tokens > 0


def assert_forgets_its_prompts(model: PreTrainedModel, change: Callable[[], None]) -> None:
    """Check that prompts are computed again after `change`, and then cached again."""
    inputs = tiny_models.prompts(BATCHES["equal lengths"])
    with kvpager.patch(model, prefix_cache=True) as patch:
        hits = []
        for call in range(4):
            if call == 2:
                change()
            with_patch = generate(model, inputs).sequences
            hits.append(patch.stats().prefix_hit_tokens)
    assert hits[0] < hits[1] == hits[2] < hits[3]
    assert torch.equal(with_patch, generate(model, inputs).sequences)
    assert not torch.equal(with_patch, expected("equal lengths", "greedy"))


@quietly
def test_a_weight_in_host_memory_that_is_written_is_noticed(tmp_path: Path) -> None:
    model = to_host_memory(tmp_path)
    kept = model.model.layers[1].mlp.down_proj._hf_hook.weights_map.dataset
    assert_forgets_its_prompts(model, kept["model.layers.1.mlp.down_proj.weight"].neg_)


@quietly
def test_a_weight_in_host_memory_that_is_replaced_is_noticed(tmp_path: Path) -> None:
    model = to_host_memory(tmp_path)
    kept, name = (
        model.model.layers[1].mlp.down_proj._hf_hook.weights_map.dataset,
        ("model.layers.1.mlp.down_proj.weight"),
    )
    assert_forgets_its_prompts(model, lambda: kept.update({name: -kept[name]}))


@quietly
@pytest.mark.parametrize("offload", [to_disk, some_layers_to_disk])
def test_a_file_of_weights_that_is_written_is_noticed(offload: Offload, tmp_path: Path) -> None:
    file = tmp_path / "model.layers.3.mlp.down_proj.weight.dat"

    def negate() -> None:
        before = file.stat()
        numbers = -torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32)
        file.write_bytes(numbers.numpy().tobytes())
        # However coarse the clock of the file system is.
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))

    assert_forgets_its_prompts(offload(tmp_path), negate)
