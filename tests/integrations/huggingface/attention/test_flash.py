"""Flash attention under a patch: blocks are read in place where that means the same.

No flash attention is installed here. What stands for it is transformers' own eager attention, over
dense keys and values, with the 4D mask that says what flash attention is told otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, LlamaConfig, MistralConfig  # noqa: E402
from transformers.masking_utils import flash_attention_mask  # noqa: E402
from transformers.modeling_utils import AttentionInterface  # noqa: E402
from transformers.models.gemma2 import modeling_gemma2  # noqa: E402
from transformers.models.gpt_oss import modeling_gpt_oss  # noqa: E402

import kvpager  # noqa: E402
from kvpager import PagedCache  # noqa: E402 - from here on the attention kvpager is known
from kvpager.integrations.huggingface.attention import flash as flash_module  # noqa: E402
from kvpager.integrations.huggingface.attention.flash import reading_flash_in_place  # noqa: E402
from tests.support import tiny_models  # noqa: E402

FLASH = ["flash_attention_2", "flash_attention_3", "flash_attention_4"]
HEADS, KV_HEADS, DIM, WINDOW = 4, 2, 16, 8
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scaling": 0.4},
    "window": {"sliding_window": WINDOW},
    "softcap": {"softcap": 5.0},
    "no softcap": {"softcap": 0.0},
    "sinks": {"s_aux": SINKS},
    "window and softcap": {"sliding_window": WINDOW, "softcap": 5.0},
    "window and sinks": {"sliding_window": WINDOW, "s_aux": SINKS},
}
# Columns of one forward pass after another.
STEPS = {
    "decode": [21, 1, 1, 1],
    "chunks": [13, 8, 1, 5],
    "chunks behind the window": [20, 2, 3, 6],
    "token by token": [1] * 18,
}
PADDINGS = {"no padding": [0, 0, 0], "left padding": [0, 7, 12]}


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    scaling: float | None = None,
    **others: Any,
) -> Tensor:
    """Return causal flash attention by transformers' eager: [rows, queries, heads, dim].

    Queries that see nothing are padding, and give zeros.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    queries = torch.arange(kv_len - q_len, kv_len)[:, None]
    columns = torch.arange(kv_len)
    visible = (columns <= queries) & (columns > queries - (sliding_window or kv_len))
    visible = visible.expand(len(query), 1, q_len, kv_len)
    if mask is not None:
        visible = visible & mask[:, None, None, :].bool()
    additive = torch.zeros(visible.shape, dtype=query.dtype)
    additive = additive.masked_fill(~visible, torch.finfo(torch.float32).min)
    sinks = torch.full((query.shape[1],), -torch.inf) if s_aux is None else s_aux
    module: Any = SimpleNamespace(
        num_key_value_groups=query.shape[1] // key.shape[1], sinks=sinks.to(query), training=False
    )
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    if softcap:
        assert s_aux is None
        output, _ = modeling_gemma2.eager_attention_forward(
            module, query, key, value, additive, scaling=scaling, softcap=softcap
        )
    else:
        output, _ = modeling_gpt_oss.eager_attention_forward(
            module, query, key, value, additive, scaling=scaling
        )
    result: Tensor = output.masked_fill(~visible.any(dim=-1).mT[..., None], 0)
    return result


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("this call was to be read in place")


class Original:
    """Stands where transformers' function was; remembers that it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        self.calls.append((args, kwargs))
        return torch.zeros(1), None


class Batch:
    """One layer's keys and values as they come, written to a paged cache and to a dense one."""

    def __init__(self, padding: list[int], window: int | None, dtype: torch.dtype) -> None:
        config: Any = LlamaConfig(num_hidden_layers=1)
        if window is not None:
            config = MistralConfig(num_hidden_layers=1, sliding_window=window)
        self.paged, self.dense = PagedCache(config), DynamicCache(config=config)
        self.padding, self.dtype = torch.tensor(padding), dtype
        self.paged.groups[0].columns.padding = np.array(padding)
        # Else a first piece longer than the window would be handed back as it came.
        self.paged.activate_past_recording()
        self.numbers = torch.Generator().manual_seed(3)
        self.num_columns = 0

    def random(self, heads: int, columns: int) -> Tensor:
        shape = (len(self.padding), heads, columns, DIM)
        return torch.randn(shape, generator=self.numbers).to(self.dtype)

    def step(self, columns: int) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Queries, handles to what they attend over, and the same dense."""
        new = self.random(KV_HEADS, columns), self.random(KV_HEADS, columns)
        self.num_columns += columns
        handles, plain = self.paged.update(*new, 0), self.dense.update(*new, 0)
        return self.random(HEADS, columns), handles, plain

    @property
    def tokens(self) -> Tensor:
        """The 2D mask of all columns so far."""
        return torch.arange(self.num_columns) >= self.padding[:, None]

    def mask(self, q_len: int, kv_len: int) -> Tensor | None:
        """Return the mask that transformers passes."""
        mask: Tensor | None = flash_attention_mask(
            len(self.padding), q_len, kv_len, attention_mask=self.tokens
        )
        return mask


MODULE: Any = SimpleNamespace(is_causal=True)


@pytest.mark.mostly_slow(quick=57)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_read_in_place_is_what_eager_computes(
    options: str, steps: str, padding: str, dtype: torch.dtype
) -> None:
    given, flash = OPTIONS[options], reading_flash_in_place(refuse)
    batch = Batch(PADDINGS[padding], given.get("sliding_window"), dtype)
    for columns in STEPS[steps]:
        query, (key, value), plain = batch.step(columns)
        mask = batch.mask(columns, key.shape[2])
        output, weights = flash(MODULE, query, key, value, mask, **given)
        assert weights is None
        expected = dense(query.double(), *(t.double() for t in plain), mask, **given)
        atol = 2.5 * torch.finfo(dtype).eps * float(plain[1].abs().max())
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=atol)
    assert batch.paged.memory.counters.in_place_reads == len(STEPS[steps])


@pytest.mark.parametrize("columns", [1, 9])
def test_cross_attention_looks_at_everything(columns: int) -> None:
    batch = Batch([0, 0], None, torch.bfloat16)
    _, (key, value), plain = batch.step(9)
    query = batch.random(HEADS, columns)
    output, _ = reading_flash_in_place(refuse)(MODULE, query, key, value, None, is_causal=False)
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), *(t.double() for t in plain), enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=2.5 * 2**-7)


def ones(columns: int, **hidden: int) -> Tensor:
    mask = torch.ones(2, columns, dtype=torch.bool)
    for row, column in hidden.items():
        mask[int(row[1:]), column] = False
    return mask


OTHER_CALLS: dict[str, dict[str, Any]] = {
    "a mask with a hole": {"mask": ones(12, r0=5)},
    "a mask that hides the end": {"mask": ones(12, r1=11)},
    "a mask of a part": {"mask": ones(11)},
    "packed sequences": {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]])},
    "lengths of packed sequences": {"cu_seq_lens_q": torch.tensor([0, 6, 12])},
    "dropout": {"dropout": 0.5},
    "a position bias": {"position_bias": torch.zeros(1, HEADS, 12, 12)},
    "a window to both sides": {"is_causal": False, "sliding_window": 4},
    "padding seen from both sides": {"is_causal": False, "mask": ones(12)},
    "float32": {"dtype": torch.float32},
}


@pytest.mark.parametrize("call", OTHER_CALLS)
def test_what_means_something_else_is_left_to_the_original(call: str) -> None:
    given = dict(OTHER_CALLS[call])
    mask, dtype = given.pop("mask", None), given.pop("dtype", torch.bfloat16)
    batch = Batch([0] if "position_ids" in given else [0, 0], None, dtype)
    query, (key, value), _ = batch.step(12)
    original = Original()
    reading_flash_in_place(original)(MODULE, query, key, value, mask, **given)
    ((args, kwargs),) = original.calls
    assert kwargs == given
    assert args == (MODULE, query, key, value, mask)
    assert batch.paged.memory.counters.in_place_reads == 0


def test_a_mask_is_compared_once_for_all_layers_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    compare = flash_module._is_padding

    def counted(mask: Tensor, view: Any) -> bool:
        compared.append(view.stop)
        return compare(mask, view)

    monkeypatch.setattr(flash_module, "_is_padding", counted)
    batch, original = Batch([0, 3], None, torch.bfloat16), Original()
    flash = reading_flash_in_place(original)
    for columns in (12, 1):
        query, (key, value), _ = batch.step(columns)
        mask = batch.mask(columns, key.shape[2])
        for _ in range(3):
            flash(MODULE, query, key, value, mask)
    assert (compared, original.calls) == ([12, 13], [])
    assert mask is not None
    mask[0, 5] = False  # the same tensor hides another column
    flash(MODULE, query, key, value, mask)
    assert (compared, len(original.calls)) == ([12, 13, 13], 1)
    with torch.inference_mode():
        flash(MODULE, query, key, value, batch.mask(1, key.shape[2]))
    assert len(original.calls) == 1


def test_padding_without_a_mask_is_left_to_the_original() -> None:
    batch, original = Batch([0, 3], None, torch.bfloat16), Original()
    query, (key, value), _ = batch.step(12)
    reading_flash_in_place(original)(MODULE, query, key, value, None)
    assert len(original.calls) == 1


def test_positions_in_a_row_are_one_sequence() -> None:
    batch = Batch([0], None, torch.bfloat16)
    query, (key, value), _ = batch.step(12)
    for first in (0, 2):
        positions = torch.arange(first, first + 12)[None]
        flash = reading_flash_in_place(refuse)
        flash(MODULE, query, key, value, None, position_ids=positions)


def test_dense_keys_and_values_are_left_to_the_original() -> None:
    query, key, value = torch.ones(3, 1, 2, 5, 16, dtype=torch.bfloat16).unbind()
    original = Original()
    reading_flash_in_place(original)(MODULE, query, key, value, None)
    assert len(original.calls) == 1


# ---------------------------------------------------------------- the registry


def test_flash_attention_is_replaced_while_patched_and_restored() -> None:
    registered = AttentionInterface._global_mapping
    before = dict(registered)
    with kvpager.patch():
        changed = {name for name, function in before.items() if registered[name] is not function}
        assert changed == {"sdpa", *(name for name in FLASH if name in before)}
    assert registered == before


def test_a_flash_attention_that_was_replaced_meanwhile_stays(caplog: Any) -> None:
    registered = AttentionInterface._global_mapping
    before = registered["flash_attention_2"]
    try:
        with kvpager.patch():
            AttentionInterface.register("flash_attention_2", refuse)
        assert registered["flash_attention_2"] is refuse
        assert "flash_attention_2 attention was replaced by other code while patched" in caplog.text
    finally:
        AttentionInterface.register("flash_attention_2", before)


# ---------------------------------------------------------------- generate


def stand_in(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """Flash attention's place taken by the dense one, as exact as float64 and rounded once."""
    exact = dense(query.double(), key.double(), value.double(), mask, **given)
    return exact.to(query.dtype), None


@pytest.fixture
def _stand_in() -> Iterator[None]:
    before = AttentionInterface._global_mapping["flash_attention_2"]
    AttentionInterface.register("flash_attention_2", stand_in)
    yield
    AttentionInterface.register("flash_attention_2", before)


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_generate_reads_in_place_and_gives_the_same_tokens(name: str, chunk: int | None) -> None:
    model: Any = tiny_models.tiny_model(name).to(torch.bfloat16)
    # Not by set_attn_implementation, which asks for the package.
    model.config._attn_implementation = "flash_attention_2"
    inputs = tiny_models.prompts([21, 9, 34])
    options = {
        "max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "prefill_chunk_size": chunk,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    expected = model.generate(**inputs, **options)
    with kvpager.patch(model) as patch:
        found = model.generate(**inputs, **options)
        stats = patch.stats()
    tiny_models.assert_equal_but_for_near_ties(found, expected, 34)
    passes = 12 if chunk is None else 11 + 7
    num_layers = model.config.num_hidden_layers
    # A prompt longer than the window is attended to as it comes, not by way of blocks.
    windowed = {"mistral": 2, "gemma2": 1, "gpt_oss": 1}.get(name, 0) if chunk is None else 0
    assert stats.in_place_reads == passes * num_layers - windowed
    assert stats.gathers == 0
