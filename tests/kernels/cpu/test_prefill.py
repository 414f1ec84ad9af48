"""Native attention of many queries per row, which has inner loops of its own.

`prefill.h` has those of floats, `matrix.h` those of matrix units.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.support.kernel_cases import (
    NAN,
    REFERENCE,
    Case,
    assert_as_exact_as_plain_torch,
    attend,
    in_blocks,
    make_call,
)
from tests.support.native_kernels import FLOATS, VARIANTS, Native, require

pytestmark = pytest.mark.usefixtures("one_thread")

PREFILLS = {
    "several_chunks": Case(((150, 150), (61, 200), (1, 90), (0, 5))),
    "heads_alone": Case(((150, 150), (40, 64)), query_heads=3, kv_heads=3),
    "more_heads_than_a_chunk_has_queries": Case(((3, 70),), query_heads=256, kv_heads=2),
    "every_number_of_queries": Case(tuple((n, n + 9) for n in range(6, 42))),
    "window": Case(((150, 150), (61, 200)), window=33),
    "window_of_one": Case(((70, 100),), window=1),
    "sinks_softcap_window": Case(((90, 130), (70, 70)), sinks=True, softcap=2.0, window=50),
    "non_causal": Case(((90, 130),), causal=False),
    "non_causal_window": Case(((90, 130),), causal=False, window=20),
    "kv_starts": Case(((90, 130), (70, 70), (70, 100)), kv_starts=(41, 70, 120), sinks=True),
    "more_queries_than_tokens": Case(((90, 40), (130, 1), (60, 0)), sinks=True, window=9),
    "own_softmax_scale": Case(((70, 100),), softmax_scale=1.7),
    "head_dim_256": Case(((70, 100),), key_dim=256, value_dim=256),
    "head_dim_80": Case(((70, 100),), key_dim=80, value_dim=80),
    "odd_head_dims": Case(((70, 100),), key_dim=33, value_dim=13),
    "softcap_with_a_negative_scale": Case(((70, 100),), softcap=2.0, softmax_scale=-0.4),
    "negative_scale": Case(((150, 150),), softmax_scale=-0.4, window=33),
    "several_tiles": Case(((150, 700), (1, 300))),
    "very_wide_keys": Case(((60, 100),), query_heads=2, kv_heads=1, key_dim=576, value_dim=512),
}


@pytest.fixture(params=VARIANTS)
def native(request: pytest.FixtureRequest) -> Native:
    return require(request.param)


@pytest.mark.mostly_slow(quick=12)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", PREFILLS)
def test_prefill_is_as_exact_as_plain_torch(name: str, dtype: torch.dtype, native: Native) -> None:
    case = PREFILLS[name]
    call = make_call(case, dtype)
    output = attend(case, call, in_blocks(case, call, 16, dtype), kernels=native.kernels)
    assert_as_exact_as_plain_torch(case, call, output, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [2, 3])
def test_few_queries_of_a_long_row_are_shared_among_threads(
    threads: int, dtype: torch.dtype, native: Native
) -> None:
    case = Case(((40, 3000), (30, 30)), query_heads=2, kv_heads=1, sinks=True)
    call = make_call(case, dtype)
    blocks = in_blocks(case, call, 16, dtype)
    torch.set_num_threads(threads)
    output = attend(case, call, blocks, kernels=native.kernels)
    assert_as_exact_as_plain_torch(case, call, output, dtype)
    assert torch.equal(attend(case, call, blocks, kernels=native.kernels), output)
    torch.set_num_threads(1)  # the whole row in one task
    alone = attend(case, call, blocks, kernels=native.kernels)
    torch.testing.assert_close(output, alone, rtol=0.02, atol=5e-4)


@pytest.mark.parametrize("dtype", FLOATS)
def test_freed_blocks_are_not_seen_by_any_query(dtype: torch.dtype, native: Native) -> None:
    case = Case(((70, 100),))
    call = make_call(case, dtype)
    blocks = in_blocks(case, call, 16, dtype)
    for column in (0, 2, 3):
        for cache in blocks.caches:
            cache[blocks.block_tables[0, column]] = NAN
        blocks.block_tables[0, column] = -1
    output = attend(case, call, blocks, kernels=native.kernels)
    assert output.isfinite().all()
    expected = attend(case, call, blocks, kernels=REFERENCE)
    bound = 4 * max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(output, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_nan_reaches_the_queries_that_see_it(dtype: torch.dtype, native: Native) -> None:
    case = Case(((70, 100),))
    call = make_call(case, dtype)
    call.keys[0][65, 1, 3] = NAN  # seen by the queries from 35 on, in the heads 2 and 3
    output = attend(case, call, in_blocks(case, call, 16, dtype), kernels=native.kernels)
    assert output[35:, 2:].isnan().all()
    assert output[:, :2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_is_blind_to_the_bits_of_the_tokens_it_does_not_see(
    dtype: torch.dtype, native: Native
) -> None:
    case = Case(((150, 150),), window=40)
    call = make_call(case, dtype)
    expected = attend(case, call, in_blocks(case, call, 16, dtype), kernels=native.kernels)
    call.keys[0][100:] *= 3
    call.values[0][:60] += 1
    output = attend(case, call, in_blocks(case, call, 16, dtype), kernels=native.kernels)
    assert torch.equal(output[99], expected[99])  # it sees the tokens 60 to 99
    assert not torch.equal(output[98], expected[98])
    assert not torch.equal(output[100], expected[100])


def test_prefill_uses_the_matrix_units_of_a_cpu_that_has_them() -> None:
    native = require("amx")
    assert native.library.matrix_units
    assert not require("avx512bf16").library.matrix_units


# Lets the kernel refuse ARCH_REQ_XCOMP_PERM (0x1023) of arch_prctl (158), as some sandboxes do.
_WITHOUT_PERMISSION = """
import ctypes, struct, torch
steps = [(0x20, 0, 0, 0), (0x15, 0, 3, 158), (0x20, 0, 0, 16), (0x15, 0, 1, 0x1023),
         (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
libc = ctypes.CDLL(None)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
    raise SystemExit(77)
from tests.support.kernel_cases import *
from tests.support.native_kernels import require
native = require("amx")
assert not native.library.matrix_units
case = Case(((150, 150), (61, 200)), window=33)
call = make_call(case, torch.bfloat16)
blocks = in_blocks(case, call, 16, torch.bfloat16)
output = attend(case, call, blocks, kernels=native.kernels)
assert_as_exact_as_plain_torch(case, call, output, torch.bfloat16)
"""


@pytest.mark.slow
def test_prefill_needs_no_permission_for_matrix_units() -> None:
    require("amx")
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_PERMISSION], capture_output=True, text=True, timeout=120
    )
    if done.returncode == 77:
        pytest.skip("this system filters no calls")
    assert done.returncode == 0, done.stderr
