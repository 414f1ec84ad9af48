"""Debug mode reports every wrong index before any memory is touched."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpager.kernels import append_kv, copy_blocks, debug, gather_kv, paged_attention
from kvpager.kernels.quantisation import KV_CACHE_DTYPES
from kvpager.ops import HostRows
from kvpager.storage.block_storage import BlockStorage
from tests.support.kernel_cases import CASES, Case, attend, in_blocks, make_call, strided_caches

# 6 blocks of 4 slots, and tables of 3 columns: 12 tokens at most.
BLOCKS, BLOCK_SIZE, COLUMNS = 6, 4, 3


@pytest.fixture
def debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debug, "enabled", lambda: True)


@pytest.fixture
def unreachable(debugging: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enable debug mode and fail if a kernel runs."""
    del debugging

    def select(operation: str, device: torch.device) -> Any:
        pytest.fail(f"{operation} was to run on {device}")

    for module in (append_kv, copy_blocks, gather_kv, paged_attention):
        monkeypatch.setattr(module, "select", select)


@pytest.mark.parametrize(
    ("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)]
)
def test_the_environment_switches_debug_mode_on(
    value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("KVPAGER_DEBUG", raising=False)
    else:
        monkeypatch.setenv("KVPAGER_DEBUG", value)
    assert debug.__file__ is not None
    assert runpy.run_path(debug.__file__)["enabled"]() is expected


def tables(*changes: tuple[int, int, int]) -> Tensor:
    """Two rows over five blocks; `changes` are (row, column, entry)."""
    blocks = torch.tensor([[5, 0, -1], [2, 4, 1]], dtype=torch.int32)
    for row, column, entry in changes:
        blocks[row, column] = entry
    return blocks


BAD_ROWS = [
    (
        {"block_tables": tables((1, 2, 6))},
        r"block_tables\[1, 2\]=6: the cache has blocks 0 to 5, and -1 is none",
    ),
    ({"block_tables": tables((0, 1, -2))}, r"block_tables\[0, 1\]=-2: the cache has"),
    ({"block_tables": tables((1, 0, 1 << 30))}, r"block_tables\[1, 0\]=1073741824: "),
    (
        {"seq_lens": torch.tensor([7, -1])},
        r"seq_lens\[1\]=-1: block_tables has room for 0 to 12 tokens per row",
    ),
    (
        {"seq_lens": torch.tensor([13, 9])},
        r"seq_lens\[0\]=13: block_tables has room for 0 to",
    ),
]

BAD_ATTENTION = [
    (
        {"cu_seqlens_q": torch.tensor([1, 2, 4])},
        r"cu_seqlens_q\[0\]=1: must rise from 0 to the 4 tokens of query",
    ),
    ({"cu_seqlens_q": torch.tensor([0, 2, 3])}, r"cu_seqlens_q\[2\]=3: must rise"),
    ({"cu_seqlens_q": torch.tensor([0, 2, 5])}, r"cu_seqlens_q\[2\]=5: must rise"),
    (
        {"cu_seqlens_q": torch.tensor([0, 5, 4])},
        r"cu_seqlens_q\[2\]=4: expected at least that of the row before",
    ),
    ({"cu_seqlens_q": torch.tensor([0, -1, 4])}, r"cu_seqlens_q\[1\]=-1: expected at least"),
    (
        {"kv_starts": torch.tensor([0, -5])},
        r"kv_starts\[1\]=-5: the first token of a row is 0",
    ),
    ({"mask": torch.zeros(1, 1, 2, 9)}, "mask has 2 query rows, but a row has 3 queries; pass"),
]


def attention_arguments() -> dict[str, Any]:
    key_cache, value_cache = strided_caches(BLOCKS, BLOCK_SIZE, 2, 8, 8, torch.float32)
    return {
        "query": torch.zeros(4, 4, 8),
        "key_cache": key_cache,
        "value_cache": value_cache,
        "block_tables": tables(),
        "seq_lens": torch.tensor([7, 9]),
        "cu_seqlens_q": torch.tensor([0, 1, 4]),
    }


@pytest.mark.usefixtures("unreachable")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("changes", "message"), [*BAD_ROWS, *BAD_ATTENTION])
def test_attention_reports_the_wrong_value(
    changes: dict[str, Tensor], message: str, dtype: torch.dtype
) -> None:
    changes = {
        name: value if value.is_floating_point() else value.to(dtype)
        for name, value in changes.items()
    }
    with pytest.raises(ValueError, match=message):
        paged_attention.paged_attention(**{**attention_arguments(), **changes})


@pytest.mark.usefixtures("unreachable")
@pytest.mark.parametrize(("changes", "message"), BAD_ROWS)
def test_gather_reports_the_wrong_value(changes: dict[str, Tensor], message: str) -> None:
    arguments = attention_arguments()
    rows = {"block_tables": arguments["block_tables"], "seq_lens": arguments["seq_lens"], **changes}
    with pytest.raises(ValueError, match=message):
        gather_kv.gather_kv(arguments["key_cache"], **rows, length=3)


@pytest.mark.usefixtures("debugging")
@pytest.mark.parametrize("kv_cache_dtype", [None, *KV_CACHE_DTYPES])
@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0, 24, 1], r"slots\[1\]=24: the cache has slots 0 to 23"),
        ([3, -1, 1 << 40], r"slots\[2\]=1099511627776: the cache has slots 0 to 23"),
        ([7, 3, 7], r"slots\[0\] and slots\[2\] are both 7; give every token a slot of its own"),
        ([5, 0, 0], r"slots\[1\] and slots\[2\] are both 0; give"),
    ],
)
def test_append_reports_errors_and_writes_nothing(
    slots: list[int], message: str, kv_cache_dtype: Any
) -> None:
    storage = BlockStorage(
        BLOCKS, BLOCK_SIZE, [(2, 8, 8)], dtype=torch.float32, kv_cache_dtype=kv_cache_dtype
    )
    storage.tier().fill_(77)
    tokens = torch.ones(3, 2, 8)
    with pytest.raises(ValueError, match=message):
        append_kv.append_kv(
            tokens, tokens, *storage.layer(0), torch.tensor(slots), scales=storage.scales(0)
        )
    assert storage.tier().eq(77).all()


@pytest.mark.usefixtures("debugging")
@pytest.mark.parametrize(
    ("copies", "message"),
    [
        ([[0, 1], [2, 6]], r"copies\[1, 1\]=6: the storage has blocks 0 to 5"),
        ([[0, 1], [9, 2]], r"copies\[1, 0\]=9: the storage has blocks 0 to 5"),
        (
            [[0, 3], [-1, 3], [1, 2], [4, 3]],
            r"copies\[0\] and copies\[3\] both write block 3; give every block one source",
        ),
        ([[2, 0], [1, 0]], r"copies\[0\] and copies\[1\] both write block 0; give"),
    ],
)
def test_copies_report_errors_and_copy_nothing(copies: list[list[int]], message: str) -> None:
    storage = torch.arange(12.0).view(BLOCKS, 2)
    before = storage.clone()
    with pytest.raises(ValueError, match=message):
        copy_blocks.copy_blocks(storage, torch.tensor(copies))
    assert torch.equal(storage, before)


@pytest.mark.usefixtures("debugging")
@pytest.mark.parametrize("name", CASES)
def test_valid_calls_are_not_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    call = make_call(case, torch.float32)
    output = attend(case, call, in_blocks(case, call, 16, torch.float32))
    monkeypatch.setattr(debug, "enabled", lambda: False)
    assert torch.equal(output, attend(case, call, in_blocks(case, call, 16, torch.float32)))


@pytest.mark.usefixtures("debugging")
def test_skipped_entries_may_hold_anything() -> None:
    case = Case(((1, 20), (1, 3), (1, 0)))
    call = make_call(case, torch.float32)
    blocks = in_blocks(case, call, 4, torch.float32)
    # -1 in the middle is a freed block; entries past a row's tokens are ignored.
    blocks.block_tables[0, 2], blocks.block_tables[1, 1:], blocks.block_tables[2] = -1, 1000, -9
    attend(case, call, blocks)
    gather_kv.gather_kv(blocks.caches[0], blocks.block_tables, blocks.seq_lens, 30)
    tokens = torch.ones(4, 2, 16)
    append_kv.append_kv(tokens, tokens, *blocks.caches, torch.tensor([-1, 5, -1, -7]))
    storage = torch.arange(12.0).view(BLOCKS, 2)
    copy_blocks.copy_blocks(storage, torch.tensor([[-1, 3], [99, -1], [0, 3], [-1, 99]]))
    assert torch.equal(storage[3], storage[0])


@pytest.mark.usefixtures("debugging")
def test_the_last_block_and_the_last_slot_are_in_bounds() -> None:
    arguments = {**attention_arguments(), "seq_lens": torch.tensor([8, 12])}
    for name in ("key_cache", "value_cache"):
        arguments[name].zero_()
    paged_attention.paged_attention(**arguments)
    rows = arguments["block_tables"], arguments["seq_lens"]
    gather_kv.gather_kv(arguments["key_cache"], *rows, 12)
    caches, token = (arguments["key_cache"], arguments["value_cache"]), torch.ones(1, 2, 8)
    append_kv.append_kv(token, token, *caches, torch.tensor([BLOCKS * BLOCK_SIZE - 1]))
    assert caches[0][-1, -1].eq(1).all()
    copy_blocks.copy_blocks(torch.zeros(2, 2), torch.tensor([[1, 0], [0, 1]]))


@pytest.mark.usefixtures("debugging")
@pytest.mark.parametrize("name", ["block_tables", "seq_lens", "cu_seqlens_q"])
def test_host_rows_have_the_values_of_the_tensors(name: str) -> None:
    arguments = attention_arguments()
    for cache in ("key_cache", "value_cache"):
        arguments[cache].zero_()
    names = ("block_tables", "seq_lens", "cu_seqlens_q")
    arrays = {each: arguments[each].numpy().copy() for each in names}
    arrays["block_tables"][0, -1] += 1  # past the row's last token
    paged_attention.paged_attention(**arguments, host_rows=HostRows(**arrays))
    arrays[name].flat[1] += 1
    with pytest.raises(ValueError, match=rf"{name}\[.*host_rows has another value"):
        paged_attention.paged_attention(**arguments, host_rows=HostRows(**arrays))


@pytest.mark.usefixtures("debugging")
def test_empty_calls_pass() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    key_cache, value_cache = strided_caches(2, 4, 2, 8, 8, torch.float32)
    query, rows = torch.empty(0, 4, 8), none.view(0, 1)
    starts = torch.zeros(1, dtype=torch.int64)
    output = paged_attention.paged_attention(query, key_cache, value_cache, rows, none, starts)
    assert output.shape == (0, 4, 8)
    assert gather_kv.gather_kv(key_cache, rows, none, 3).shape == (0, 3, 2, 8)
    append_kv.append_kv(torch.empty(0, 2, 8), torch.empty(0, 2, 8), key_cache, value_cache, none)
    copy_blocks.copy_blocks(torch.zeros(2, 2), none.view(0, 2))
    assert key_cache.isnan().all()


def test_without_debug_mode_no_value_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debug, "enabled", lambda: False)
    names = ("attention", "rows", "slots", "copies")
    for name in (f"check_{name}" for name in names):
        monkeypatch.setattr(debug, name, lambda *_: pytest.fail("a value was looked at"))
    case = CASES["prefill"]
    call = make_call(case, torch.float32)
    blocks = in_blocks(case, call, 16, torch.float32)
    attend(case, call, blocks)
    gather_kv.gather_kv(blocks.caches[0], blocks.block_tables, blocks.seq_lens, 3)
    copy_blocks.copy_blocks(torch.zeros(2, 2), torch.tensor([[0, 1]]))


@pytest.mark.gpu
@pytest.mark.usefixtures("unreachable")
@pytest.mark.parametrize(("changes", "message"), [*BAD_ROWS, *BAD_ATTENTION])
def test_gpu_attention_reports_the_wrong_value(changes: dict[str, Tensor], message: str) -> None:
    arguments = {name: x.cuda() for name, x in {**attention_arguments(), **changes}.items()}
    with pytest.raises(ValueError, match=message):
        paged_attention.paged_attention(**arguments)
