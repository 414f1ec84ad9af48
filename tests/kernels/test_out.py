"""Attention that writes its result into a tensor of the caller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvpager.ops import AttentionArgs, LayerCaches, paged_attention
from kvpager.ops import attend as attend_shared
from tests.support.kernel_arguments import attention_arguments
from tests.support.kernel_cases import CASES, NAN, Kernels, attend, in_blocks, make_call

SOME = (
    "decode",
    "ragged_mix_of_prefill_and_decode",
    "narrow_values",
    "more_queries_than_tokens",
    "float_mask_per_head",
    "only_empty_rows",
    "rows_without_queries",
    "long_prefill",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SOME)
def test_every_element_of_out_is_written(
    name: str, dtype: torch.dtype, implementation: Kernels
) -> None:
    case = CASES[name]
    call = make_call(case, dtype)
    blocks = in_blocks(case, call, 16, dtype)
    expected = attend(case, call, blocks, kernels=implementation)
    out = torch.full_like(expected, NAN)
    assert attend(case, call, blocks, kernels=implementation, out=out) is out
    assert torch.equal(out, expected)


def test_out_without_queries_stays_empty(implementation: Kernels) -> None:
    arguments = attention_arguments() | {"query": torch.zeros(0, 4, 8)}
    arguments |= {"block_tables": torch.zeros(0, 1).int(), "seq_lens": torch.zeros(0).int()}
    out = torch.zeros(0, 4, 8)
    assert implementation.paged_attention(**arguments, out=out) is out


def test_shared_arguments_write_into_out_as_well() -> None:
    arguments = attention_arguments()
    caches = LayerCaches(arguments["key_cache"].zero_(), arguments["value_cache"].fill_(3))
    args, out = AttentionArgs(arguments["block_tables"], arguments["seq_lens"]), ones()
    assert attend_shared(arguments["query"], caches, args, out=out) is out
    assert out.eq(3).all()


def ones() -> Tensor:
    return torch.ones(2, 4, 8)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.ones(2, 4, 7), ValueError, r"out.shape=\[2, 4, 7\]: expected \[tokens"),
        (torch.ones(2, 32), ValueError, r"out.shape=\[2, 32\]: expected .* = \[2, 4, 8\]"),
        (ones().double(), TypeError, "out.dtype=torch.float64: must equal query.dtype"),
        (torch.ones(2, 8, 4).mT, ValueError, r"out has strides .* has to be contiguous"),
        (torch.ones(2, 4, 9)[:, :, :8], ValueError, "has to be contiguous"),
        (ones().to("meta"), ValueError, "out.device=meta: expected cpu"),
        ([1.0], TypeError, "out: expected a torch.Tensor, got list"),
    ],
)
def test_an_out_that_does_not_fit_is_refused(
    out: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        paged_attention(**attention_arguments(), out=out)
    if isinstance(out, Tensor) and out.device.type == "cpu":
        assert out.eq(1).all()


@pytest.mark.parametrize("name", ["query", "key_cache", "value_cache"])
@pytest.mark.parametrize("at_its_end", [False, True])
def test_an_out_in_the_memory_of_an_input_is_refused(name: str, at_its_end: bool) -> None:
    arguments, memory = attention_arguments(), torch.zeros(500)
    shape = arguments[name].shape
    arguments[name] = memory[100 : 100 + shape.numel()].view(shape)
    first = 100 + shape.numel() - 1 if at_its_end else 100 - 63  # one element is in both
    with pytest.raises(ValueError, match=f"out shares memory with {name}; pass a tensor of its"):
        paged_attention(**arguments, out=memory[first : first + 64].view(2, 4, 8))


def test_an_out_beside_the_query_in_one_tensor_is_fine() -> None:
    arguments = attention_arguments()
    memory = torch.zeros(3, 2, 4, 8)
    arguments["query"] = memory[1]
    for out in (memory[0], memory[2]):
        assert paged_attention(**arguments, out=out) is out


def test_values_that_are_refused_leave_out_as_it_was(implementation: Kernels) -> None:
    out = ones()
    arguments = attention_arguments() | {"seq_lens": torch.tensor([1, 50])}
    with pytest.raises(ValueError, match="seq_lens"):
        implementation.paged_attention(**arguments, out=out)
    assert out.eq(1).all()
