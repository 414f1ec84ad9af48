"""Eight-bit caches: bounds of the rounding error, and kernels that add no other error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpager.kernels.quantisation import KV_CACHE_DTYPES, dequantise, quantise
from kvpager.ops import append_kv, gather_kv, paged_attention
from kvpager.storage.block_storage import BlockStorage
from kvpager.storage.layout import KVCacheDtype
from tests.support.kernel_cases import (
    CASES,
    ENTRY,
    IMPLEMENTATIONS,
    NAN,
    Case,
    Kernels,
    assert_as_exact_as_plain_torch,
    attend,
    in_blocks,
    make_call,
)

INFINITY = float("inf")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
KV: list[Any] = list(KV_CACHE_DTYPES)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Kernels:
    return IMPLEMENTATIONS[request.param]


def one_layer(
    kv_cache_dtype: KVCacheDtype,
    *,
    blocks: int = 4,
    heads: int = 2,
    key_dim: int = 6,
    value_dim: int = 10,
) -> BlockStorage:
    """Blocks of four tokens, every byte 255: NaN as a scale and as float8_e4m3fn."""
    shape = (heads, key_dim, value_dim)
    storage = BlockStorage(blocks, 4, [shape], dtype=torch.float32, kv_cache_dtype=kv_cache_dtype)
    storage.tier().fill_(255)
    return storage


def rounding_bound(x: Tensor, kv_cache_dtype: str) -> Tensor:
    """Return the largest allowed error of each element of `x` [.., D]."""
    exact = x.double()
    scale = exact.abs().amax(-1, keepdim=True) / (127 if kv_cache_dtype == "int8" else 448)
    half_step = (
        scale / 2 if kv_cache_dtype == "int8" else torch.maximum(exact.abs() / 16, scale / 1024)
    )
    # The scale and the product are rounded to float32, which adds a little.
    return half_step + exact.abs() * 1e-6


def vectors(dtype: torch.dtype = torch.float32) -> Tensor:
    """[tokens, 2, 6]: ordinary, huge, tiny, with one outlier, and with ties."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 2, 6, generator=generator)
    x[0:4] *= 1e4
    x[4:8] *= 1e-4
    x[8:12, :, 2] *= 500
    x[12] = torch.tensor([127, 0.5, 1.5, -2.5, 126.5, -127])
    return x.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kv_cache_dtype", KV)
def test_every_element_comes_back_to_half_a_step(kv_cache_dtype: str, dtype: torch.dtype) -> None:
    x = vectors(dtype)
    stored, scale = quantise(x, KV_CACHE_DTYPES[kv_cache_dtype])
    assert stored.dtype == KV_CACHE_DTYPES[kv_cache_dtype]
    assert (scale.dtype, scale.shape) == (torch.float32, x.shape[:-1])
    error = (dequantise(stored, scale, torch.float64) - x.double()).abs()
    assert bool((error <= rounding_bound(x, kv_cache_dtype)).all())


def test_int8_rounds_ties_to_even_and_is_symmetric() -> None:
    x = torch.tensor([127, 0.5, 1.5, -0.5, -1.5, 2.5, 126.5, -127])
    stored, scale = quantise(x, torch.int8)
    assert scale.item() == 1
    assert stored.tolist() == [127, 0, 2, 0, -2, 2, 126, -127]
    assert torch.equal(quantise(-x, torch.int8)[0], -stored)


@pytest.mark.parametrize("kv_cache_dtype", KV)
def test_the_largest_number_uses_the_whole_range(kv_cache_dtype: str) -> None:
    x = torch.randn(1000, 3)
    stored, _ = quantise(x, KV_CACHE_DTYPES[kv_cache_dtype])
    largest = 127 if kv_cache_dtype == "int8" else 448
    assert stored.float().abs().amax(-1).eq(largest).all()


@pytest.mark.parametrize("kv_cache_dtype", KV)
@pytest.mark.parametrize("smallest", [0.0, -0.0, 1e-45])
def test_zero_and_almost_zero_are_stored_as_zero(kv_cache_dtype: str, smallest: float) -> None:
    stored, scale = quantise(torch.full((2, 5), smallest), KV_CACHE_DTYPES[kv_cache_dtype])
    assert scale.eq(0).all()
    assert stored.float().eq(0).all()


@pytest.mark.parametrize("fault", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("kv_cache_dtype", KV)
def test_a_nan_or_infinity_makes_only_its_vector_nan(kv_cache_dtype: str, fault: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = fault
    back = dequantise(*quantise(x, KV_CACHE_DTYPES[kv_cache_dtype]), torch.float32)
    assert back[1].isnan().all()
    torch.testing.assert_close(back[[0, 2]], x[[0, 2]])


def test_an_unsupported_kv_cache_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype=torch.int16: expected one of torch.int8"):
        quantise(torch.ones(2, 2), torch.int16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kv_cache_dtype", KV)
def test_appended_tokens_gather_to_half_a_step(
    kv_cache_dtype: KVCacheDtype, dtype: torch.dtype, implementation: Kernels
) -> None:
    storage = one_layer(kv_cache_dtype, blocks=12)
    key = vectors(dtype)
    value = torch.randn(2, 40, 30).to(dtype)[..., 5:15].transpose(0, 1)
    slots = torch.randperm(44)[:40]
    caches, scales = storage.layer(0), storage.scales(0)
    assert scales is not None
    implementation.append_kv(key, value, *caches, slots, scales=scales)
    table, lens = torch.arange(11, dtype=torch.int32).expand(1, -1), torch.tensor([44])
    for x, cache, scale in zip((key, value), caches, scales, strict=True):
        gathered = implementation.gather_kv(
            cache, table, lens, 44, scales=scale, dtype=torch.float32
        )[0, slots]
        assert bool(
            ((gathered.double() - x.double()).abs() <= rounding_bound(x, kv_cache_dtype)).all()
        )
        rounded = implementation.gather_kv(cache, table, lens, 44, scales=scale, dtype=dtype)
        assert torch.equal(rounded[0, slots], gathered.to(dtype))


@pytest.mark.parametrize("kv_cache_dtype", KV)
def test_append_writes_its_tokens_bytes_and_no_other(
    kv_cache_dtype: KVCacheDtype, implementation: Kernels
) -> None:
    storage = one_layer(kv_cache_dtype, heads=3)
    expected = storage.tier().clone()
    key, value = torch.randn(3, 3, 6), torch.randn(3, 3, 10)
    slots = torch.tensor([6, -1, 3])
    implementation.append_kv(key, value, *storage.layer(0), slots, scales=storage.scales(0))
    # block 1, offset 2 and block 0, offset 3; scales begin at 16-byte boundaries
    for block, offset in ((1, 2), (0, 3)):
        for start, size in ((0, 18), (80, 30), (208, 12), (256, 12)):
            run = slice(start + offset * size, start + (offset + 1) * size)
            assert not torch.equal(storage.tier()[block, run], expected[block, run])
            expected[block, run] = storage.tier()[block, run]
    assert torch.equal(storage.tier(), expected)


@pytest.mark.parametrize("kv_cache_dtype", KV)
def test_vectors_of_zeros_come_back_as_zeros(
    kv_cache_dtype: KVCacheDtype, implementation: Kernels
) -> None:
    storage = one_layer(kv_cache_dtype)
    key, value = torch.randn(8, 2, 6), torch.randn(8, 2, 10)
    key[3], value[5, 1] = 0, 0
    caches, scales = storage.layer(0), storage.scales(0)
    assert scales is not None
    implementation.append_kv(key, value, *caches, torch.arange(8), scales=scales)
    assert scales[0][0, 3].eq(0).all()
    table, lens = torch.tensor([[0, 1]]).int(), torch.tensor([8])
    options = {"dtype": torch.float32}
    gathered = implementation.gather_kv(caches[0], table, lens, 8, scales=scales[0], **options)
    assert gathered[0, 3].eq(0).all()
    gathered = implementation.gather_kv(caches[1], table, lens, 8, scales=scales[1], **options)
    assert gathered[0, 5, 1].eq(0).all()
    assert gathered[0, 5, 0].ne(0).any()


@pytest.mark.parametrize("fault", [NAN, INFINITY])
@pytest.mark.parametrize("kv_cache_dtype", KV)
def test_an_appended_fault_is_not_read_as_a_number(
    kv_cache_dtype: KVCacheDtype, fault: float, implementation: Kernels
) -> None:
    storage = one_layer(kv_cache_dtype)
    key, value = torch.ones(2, 2, 6), torch.ones(2, 2, 10)
    key[0, 1, 4] = fault
    caches, scales = storage.layer(0), storage.scales(0)
    assert scales is not None
    implementation.append_kv(key, value, *caches, torch.arange(2), scales=scales)
    gathered = implementation.gather_kv(
        caches[0],
        torch.tensor([[0]]).int(),
        torch.tensor([2]),
        2,
        scales=scales[0],
        dtype=torch.float32,
    )
    assert not gathered[0, 0, 1, 4].isfinite()
    assert gathered[0, 0, 0].isfinite().all()
    assert gathered[0, 1].isfinite().all()


@pytest.mark.parametrize("kv_cache_dtype", KV)
def test_unused_slots_gather_as_zeros(
    kv_cache_dtype: KVCacheDtype, implementation: Kernels
) -> None:
    storage = one_layer(kv_cache_dtype)
    caches, scales = storage.layer(0), storage.scales(0)
    assert scales is not None
    key, value = torch.randn(2, 2, 6), torch.randn(2, 2, 10)
    implementation.append_kv(key, value, *caches, torch.tensor([8, 9]), scales=scales)
    tables = torch.tensor([[2, -1], [-1, 2], [3, 1]]).int()
    gathered = implementation.gather_kv(
        caches[0],
        tables,
        torch.tensor([2, 6, 0]),
        7,
        scales=scales[0],
        dtype=torch.bfloat16,
    )
    assert gathered.dtype == torch.bfloat16
    real = torch.zeros(3, 7, dtype=torch.bool)
    real[:2, 5:] = True
    assert gathered[real].ne(0).any(-1).all()
    assert gathered[real].isfinite().all()
    assert gathered[~real].eq(0).all()


def attended(
    case: Case,
    dtype: torch.dtype,
    kv_cache_dtype: KVCacheDtype,
    kernels: Kernels,
    device: str = "cpu",
) -> tuple[Any, Tensor]:
    """Return the call with the stored keys and values, for the oracle, and the output."""
    call = make_call(case, dtype)
    blocks = in_blocks(case, call, 16, dtype, kernels, kv_cache_dtype)
    output = attend(case, call, blocks, device, kernels)
    stored = [blocks.stored(row) for row in range(len(case.rows))]
    keys, values = [key for key, _ in stored], [value for _, value in stored]
    return replace(call, keys=keys, values=values), output


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kv_cache_dtype", KV)
def test_attention_over_eight_bits_is_dense_attention_over_dequantised_values(
    name: str, kv_cache_dtype: KVCacheDtype, implementation: Kernels
) -> None:
    case = CASES[name]
    call, output = attended(case, torch.float32, kv_cache_dtype, implementation)
    assert_as_exact_as_plain_torch(case, call, output, torch.float32)


MIXED = ["decode", "ragged_mix_of_prefill_and_decode", "float_mask_per_head", "head_dim_96"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("kv_cache_dtype", KV)
def test_queries_of_every_dtype_read_eight_bits(
    name: str, kv_cache_dtype: KVCacheDtype, dtype: torch.dtype, implementation: Kernels
) -> None:
    case = CASES[name]
    call, output = attended(case, dtype, kv_cache_dtype, implementation)
    assert_as_exact_as_plain_torch(case, call, output, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kv_cache_dtype", KV)
def test_gpu_attention_over_eight_bits_is_dense_attention(
    name: str, kv_cache_dtype: KVCacheDtype
) -> None:
    case = CASES[name]
    call, output = attended(case, torch.float32, kv_cache_dtype, ENTRY, "cuda")
    assert_as_exact_as_plain_torch(case, call, output, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_cache_dtype", KV)
def test_gpu_append_stores_every_element_to_half_a_step(kv_cache_dtype: KVCacheDtype) -> None:
    shape, slots = [(2, 6, 10)], torch.arange(40, device="cuda")
    storage = BlockStorage(
        10, 4, shape, dtype=torch.float32, kv_cache_dtype=kv_cache_dtype, device="cuda"
    )
    storage.tier().fill_(255)
    caches, scales = storage.layer(0), storage.scales(0)
    assert scales is not None
    tokens = (vectors(), torch.randn(40, 2, 10))
    append_kv(tokens[0].cuda(), tokens[1].cuda(), *caches, slots, scales=scales)
    for x, cache, scale in zip(tokens, caches, scales, strict=True):
        back = dequantise(cache, scale, torch.float64).cpu().view(x.shape)
        assert bool(((back - x.double()).abs() <= rounding_bound(x, kv_cache_dtype)).all())


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("kv_cache_dtype", KV)
def test_a_long_cache_adds_no_error_beyond_rounding(
    kv_cache_dtype: KVCacheDtype, outliers: bool, implementation: Kernels
) -> None:
    """Against float64 attention, at most twice the error of rounding alone."""
    rows, length, heads, dim = 4, 2048, 2, 64
    generator = torch.Generator().manual_seed(11)
    query, key, value = (
        torch.randn(rows, count, heads, dim, generator=generator) for count in (1, length, length)
    )
    if outliers:
        key[..., :4] += 12
    shape = [(heads, dim, dim)]
    storage = BlockStorage(
        rows * 128, 16, shape, dtype=torch.float32, kv_cache_dtype=kv_cache_dtype
    )
    caches, scales = storage.layer(0), storage.scales(0)
    slots = torch.arange(rows * length)
    implementation.append_kv(key.flatten(0, 1), value.flatten(0, 1), *caches, slots, scales=scales)
    tables = torch.arange(rows * 128, dtype=torch.int32).view(rows, 128)
    lens = torch.full((rows,), length)
    output = implementation.paged_attention(query[:, 0], *caches, tables, lens, scales=scales)

    def exact(keys: Tensor, values: Tensor) -> Tensor:
        scores = torch.einsum("rqhd,rnhd->rhqn", query.double(), keys.double()) / dim**0.5
        return torch.einsum("rhqn,rnhd->rqhd", scores.softmax(-1), values.double())[:, 0]

    truth = exact(key, value)
    rounded = (
        dequantise(*quantise(x, KV_CACHE_DTYPES[kv_cache_dtype]), torch.float64)
        for x in (key, value)
    )
    rounding_error = (exact(*rounded) - truth).norm()
    assert 0 < (output.double() - truth).norm() <= 2 * rounding_error
    # Bounds of the rounding error on such data, with room.
    relative = rounding_error / truth.norm()
    assert relative < (0.06 if kv_cache_dtype == "int8" else 0.12)


@pytest.mark.parametrize("kv_cache_dtype", KV)
def test_garbage_in_unseen_blocks_never_shows(
    kv_cache_dtype: KVCacheDtype, implementation: Kernels
) -> None:
    case = Case(((1, 40), (3, 20)), window=9)
    call = make_call(case, torch.float32)
    blocks = in_blocks(case, call, 16, torch.float32, implementation, kv_cache_dtype)
    assert blocks.scales is not None
    assert all(scale.isnan().sum() > scale.numel() / 2 for scale in blocks.scales)
    output = attend(case, call, blocks, kernels=implementation)
    assert output.isfinite().all()
    for scale in blocks.scales:
        scale[scale.isnan()] = INFINITY
    assert torch.equal(attend(case, call, blocks, kernels=implementation), output)


def quantised_arguments(kv_cache_dtype: KVCacheDtype = "int8") -> dict[str, Any]:
    storage = one_layer(kv_cache_dtype, key_dim=8, value_dim=8)
    key_cache, value_cache = storage.layer(0)
    return {"key_cache": key_cache, "value_cache": value_cache, "scales": storage.scales(0)}


def call_append(**caches: Any) -> None:
    append_kv(torch.ones(1, 2, 8), torch.ones(1, 2, 8), slots=torch.tensor([0]), **caches)


def call_attention(**caches: Any) -> None:
    tables, lens = torch.zeros(1, 1).int(), torch.ones(1).int()
    paged_attention(torch.ones(1, 4, 8), block_tables=tables, seq_lens=lens, **caches)


FLOAT_CACHE = torch.zeros(4, 4, 2, 8)


@pytest.mark.parametrize("call", [call_append, call_attention])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scales": None}, ValueError, "key_cache.dtype=torch.int8: needs scales. Pass"),
        (
            {"key_cache": FLOAT_CACHE, "value_cache": FLOAT_CACHE},
            ValueError,
            "key_scales: expected None, because key_cache.dtype=torch.float32 has no scales",
        ),
        (
            {"value_cache": FLOAT_CACHE},
            TypeError,
            "value_cache.dtype=torch.float32: must equal key_cache.dtype=",
        ),
        (
            {"scales": torch.ones(2, 4, 4, 2)},
            TypeError,
            r"scales: expected \(key_scales, value_scales\), got a Tensor",
        ),
        (
            {"scales": (torch.ones(4, 4, 2),)},
            TypeError,
            r"scales: expected \(key_scales, value_scales\), got a tuple",
        ),
        (
            {"scales": (None, None)},
            TypeError,
            r"scales: expected \(key_scales, value_scales\), got a tuple",
        ),
        (
            {"scales": (torch.ones(4, 4, 2), None)},
            TypeError,
            r"scales: expected \(key_scales, value_scales\), got a tuple",
        ),
        (
            {"key_cache": FLOAT_CACHE, "value_cache": FLOAT_CACHE, "scales": (None, None)},
            TypeError,
            r"scales: expected \(key_scales, value_scales\), got a tuple",
        ),
        (
            {"scales": (torch.ones(4, 4), torch.ones(4, 4))},
            ValueError,
            r"key_scales.shape=\[4, 4\]: expected .*kv_heads\] = \[4, 4, 2\]",
        ),
        (
            {"scales": (torch.ones(4, 4, 2), torch.ones(4, 4, 2).half())},
            TypeError,
            "value_scales.dtype=torch.float16: expected torch.float32",
        ),
        (
            {"scales": (torch.ones(4, 2, 4).mT, torch.ones(4, 4, 2))},
            ValueError,
            "pass key_scales.contiguous",
        ),
        (
            {"scales": (torch.ones(4, 4, 2), torch.ones(4, 4, 2, device="meta"))},
            ValueError,
            "value_scales.device=meta: expected cpu, the device of the cache",
        ),
        (
            {"key_cache": FLOAT_CACHE.int(), "value_cache": FLOAT_CACHE.int(), "scales": None},
            TypeError,
            "key_cache.dtype=torch.int32: expected a floating dtype",
        ),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    call: Any, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    call(**quantised_arguments())  # what fits is remembered, and what does not is not
    for _ in range(2):
        with pytest.raises(error, match=message):
            call(**{**quantised_arguments(), **changes})


def test_keys_and_queries_are_never_eight_bits_themselves() -> None:
    caches = quantised_arguments("fp8_e4m3")
    eight = torch.ones(1, 2, 8).to(torch.float8_e4m3fn)
    tables, lens = torch.zeros(1, 1).int(), torch.ones(1).int()
    with pytest.raises(
        TypeError, match=r"key.dtype=torch.float8_e4m3fn: expected a floating dtype of"
    ):
        append_kv(eight, eight, slots=torch.tensor([0]), **caches)
    with pytest.raises(
        TypeError, match=r"value.dtype=torch.bfloat16: must equal key.dtype=torch.float32"
    ):
        append_kv(eight.float(), eight.bfloat16(), slots=torch.tensor([0]), **caches)
    with pytest.raises(
        TypeError, match=r"query.dtype=torch.float8_e4m3fn: expected a floating dtype"
    ):
        paged_attention(eight, block_tables=tables, seq_lens=lens, **caches)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scales": None}, ValueError, "cache.dtype=torch.int8: needs scales"),
        ({"dtype": None}, TypeError, "dtype=None: required with scales"),
        ({"dtype": torch.int8}, TypeError, "dtype=torch.int8: expected a floating dtype"),
        ({"scales": (1, 2)}, TypeError, "scales: expected the scales tensor of cache, got a tuple"),
        ({"scales": torch.ones(4, 4, 3)}, ValueError, r"scales.shape=\[4, 4, 3\]"),
        (
            {"cache": FLOAT_CACHE},
            ValueError,
            "scales: expected None, because cache.dtype=torch.float32",
        ),
    ],
)
def test_gather_refuses_scales_that_do_not_fit(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = quantised_arguments()
    passed = {"cache": arguments["key_cache"], "scales": arguments["scales"][0]}
    options: dict[str, Any] = {**passed, "dtype": torch.float32, **changes}
    with pytest.raises(error, match=message):
        gather_kv(
            block_tables=torch.zeros(1, 1).int(), seq_lens=torch.ones(1).int(), length=1, **options
        )


def test_eight_bits_take_half_of_sixteen_plus_scales() -> None:
    shape, blocks = [(8, 128, 128)], 10
    half = BlockStorage(blocks, 16, shape, dtype=torch.bfloat16)
    eight = BlockStorage(blocks, 16, shape, dtype=torch.bfloat16, kv_cache_dtype="int8")
    assert eight.nbytes == half.nbytes // 2 + blocks * 16 * 8 * 2 * 4
