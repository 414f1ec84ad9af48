"""What a user may tell the tiers of a patch, and what `patch` refuses to open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("xxhash")

import kvpager
from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.runner import tiers as opening
from kvpager.storage.tiers.seals import Digest
from tests.support import tiny_models
from tests.support.llama_calls import generate
from tests.support.tiered_engines import NUM_CACHED, edited, llama
from tests.support.tiered_patches import ids, one, patched, saved_by

# -------------------------------------------------------------------------------------- controls


def test_a_warmed_prompt_is_in_the_pool(model: Any, disk: str) -> None:
    expected = ids(model, one())
    saved_by(model, disk, one(), namespace="acme")
    with patched(model, disk) as patch:
        prompt = one()["input_ids"][0]
        assert patch.tiers.warm([prompt]) == 0
        assert patch.tiers.warm([prompt, prompt], namespace="acme") == NUM_CACHED
        store = patch.tiers.stats().tiers[0].store
        with patch.namespace("acme"):
            assert patch.tiers.warm([prompt]) == 0  # it is in the pool
            assert ids(model, one()) == expected
        assert patch.stats().prefix_hit_tokens == NUM_CACHED
        assert patch.tiers.stats().tiers[0].store.hits == store.hits == NUM_CACHED // 16


def test_a_changed_model_warms_nothing(disk: str) -> None:
    changed = llama()
    saved_by(changed, disk, one())
    with patched(changed, disk) as patch:
        changed.load_state_dict(edited().state_dict())
        assert patch.tiers.warm([one()["input_ids"][0]]) == 0
        assert "because the model changed" in patch.report()


def test_a_forgotten_namespace_is_found_nowhere(model: Any, disk: str) -> None:
    saved_by(model, disk, one(), namespace="acme")
    with patched(model, disk, namespace="acme") as patch:
        generate(model, one())
        assert patch.stats().prefix_hit_tokens == NUM_CACHED
        assert patch.tiers.forget("acme") == NUM_CACHED // 16
        generate(model, one())
        assert patch.stats().prefix_hit_tokens == NUM_CACHED
    with pytest.raises(KVPagerError, match="was undone"):
        patch.tiers.forget("acme")
    assert patch.tiers.stats().tiers[0].store.hits == NUM_CACHED // 16


def test_a_namespace_keeps_no_more_than_its_limit(model: Any, disk: str) -> None:
    with patched(model, disk, namespace="acme") as patch:
        block_bytes = patch.tiers.stats().tiers[0].store.block_bytes
        patch.tiers.limit("acme", capacity=2 * block_bytes)
        generate(model, one())
    with patched(model, disk, namespace="acme") as patch:
        generate(model, one())
        assert patch.stats().prefix_hit_tokens <= 32
        assert patch.tiers.stats().tiers[0].store.num_blocks <= 2


def test_a_patch_without_tiers_says_so(model: Any) -> None:
    with (
        kvpager.patch(model, prefix_cache=True) as patch,
        pytest.raises(KVPagerError, match="no tiers"),
    ):
        patch.tiers.forget("acme")


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mistral", "sliding windows"),
        ("mamba", "recurrent|cannot be batched"),
        ("t5", "encoder's input"),
    ],
)
def test_models_without_tiers_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(KVPagerError, match=reason):
        kvpager.patch(
            tiny_models.tiny_model(name),
            prefix_cache=True,
            tiers=f"disk:{tmp_path}/kv?capacity=1MiB",
        )
    assert not (tmp_path / "kv").exists()


def test_a_model_in_training_is_refused(disk: str) -> None:
    with pytest.raises(KVPagerError, match=r"model\.eval"):
        kvpager.patch(llama().train(), prefix_cache=True, tiers=disk)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_cache": False, "tiers": "host:1MiB"}, "Pass prefix_cache=True too"),
        ({"tiers": "nowhere:1MiB"}, "no store is called 'nowhere'"),
        ({"tiers": "host:lots"}, "lots"),
        ({"model_id": "name"}, "model_id: of use with tiers only"),
        ({"seal": Digest()}, "seal: of use with tiers only"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit_are_refused(
    model: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kvpager.patch(model, **{"prefix_cache": True} | options)
    kvpager.patch(model).undo()  # it is not patched


def test_tiers_need_a_model() -> None:
    with pytest.raises(ValueError, match="the prompts of one model"):
        kvpager.patch(prefix_cache=True, tiers="host:1MiB")


def test_a_second_patch_leaves_the_first_as_it_is(model: Any, disk: str) -> None:
    with patched(model, disk):
        with pytest.raises(KVPagerError, match="patched already"):
            kvpager.patch(model, prefix_cache=True, tiers=disk)
        generate(model, one())
    with patched(model, disk) as patch:
        generate(model, one())
        assert patch.stats().prefix_hit_tokens == NUM_CACHED


def test_a_model_that_changes_while_it_is_patched_is_refused(
    disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = llama()

    def name(model: Any) -> str:
        with torch.no_grad():
            model.lm_head.weight += 1
        return "name"

    with monkeypatch.context() as planted:
        planted.setattr(opening, "model_id", name)
        with pytest.raises(KVPagerError, match="the model changed while it was patched"):
            kvpager.patch(changed, prefix_cache=True, tiers=disk)
    with patched(changed, disk):  # neither the model nor the directory is taken
        pass
