"""Patched models with `mode="virtual"`: attention code reads mapped blocks without a gather."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import kvpager
from kvpager.modes import page_pool
from tests.support import tiny_models

# Their attention code is their own, or expects what kvpager's kernels do not offer.
OWN_ATTENTION = ["bloom", "falcon", "gpt_neo", "mpt", "deepseek_v3"]

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not hasattr(page_pool.os, "memfd_create"), reason="needs Linux"),
]


def made(name: str) -> Any:
    if not tiny_models.is_known(name):
        pytest.skip("not in this transformers")
    return tiny_models.tiny_model(name)


def tokens(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0, **options
    )


def prompts(rows: int = 3) -> torch.Tensor:
    return torch.arange(4, 4 + rows * 21).view(rows, 21) % 90 + 3


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_models_with_attention_of_their_own_gather_nothing(name: str) -> None:
    model, ids = made(name), prompts()
    expected = [tokens(model, ids), tokens(model, ids, num_beams=3)]
    with kvpager.patch(model, mode="virtual", block_size=4) as patch:
        found = [tokens(model, ids), tokens(model, ids, num_beams=3)]
        stats = patch.stats()
    assert all(map(torch.equal, found, expected))
    assert (stats.gathers, stats.in_place_reads > 0) == (0, True)


def test_padded_rows_are_gathered_and_keep_their_tokens() -> None:
    model, ids = made("bloom"), prompts()
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    expected = tokens(model, ids, mask)
    with kvpager.patch(model, mode="virtual") as patch:
        assert torch.equal(tokens(model, ids, mask), expected)
        assert patch.stats().gathers > 0


def test_shared_prompts_are_mapped_and_not_copied() -> None:
    model = made("bloom")
    ids = prompts(1).repeat(3, 1)
    expected = tokens(model, ids)
    with kvpager.patch(model, mode="virtual", block_size=4, prefix_cache=True) as patch:
        assert torch.equal(tokens(model, ids), expected)
        assert torch.equal(tokens(model, ids), expected)
        stats = patch.stats()
    assert stats.prefix_hit_tokens > 0
    assert stats.gathers == 0


def test_rows_move_to_host_memory_and_keep_their_tokens() -> None:
    model, ids = made("bloom"), prompts()
    expected = tokens(model, ids)
    with kvpager.patch(
        model, mode="virtual", block_size=4, memory="64KiB", host_memory="16MiB"
    ) as patch:
        assert torch.equal(tokens(model, ids), expected)
        assert patch.stats().gathers > 0  # rows on two tiers


def test_too_few_mappings_are_said_and_rows_gathered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bound = tmp_path / "max_map_count"
    bound.write_text("5000")
    monkeypatch.setattr(page_pool, "_MAX_MAP_COUNT", bound)
    model, ids = made("bloom"), prompts()
    expected = tokens(model, ids)
    caplog.set_level(logging.WARNING, "kvpager")
    with kvpager.patch(model, mode="virtual") as patch:
        assert torch.equal(tokens(model, ids), expected)
        assert patch.stats().gathers > 0
    messages = [record.getMessage() for record in caplog.records]
    assert len([each for each in messages if "vm.max_map_count=5000" in each]) == 1


def test_a_mode_is_checked_and_shown() -> None:
    model = made("llama")
    with pytest.raises(ValueError, match="mode='flat': expected one of"):
        kvpager.patch(model, mode="flat")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match='mode="reserved": rows of a patched model have no regions'
    ):
        kvpager.patch(model, mode="reserved")
    with kvpager.patch(model, mode="virtual") as patch:
        assert "mode=virtual" in repr(patch)
