"""kvpager's attention backend for vLLM's CPU platform, on pages as vLLM makes them."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvpager.integrations import vllm_plugin
from kvpager.kernels import backends, reference
from tests.support.vllm_attention_steps import DIM, HEADS, KV_HEADS, SIZE, Step, config, pages_of
from tests.support.vllm_parts import attention, identity, interface, releases

ROOT = Path(__file__).resolve().parents[3]
Make = Callable[..., Any]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return a function that makes the attention of a layer, as vLLM does."""
    monkeypatch.setenv(vllm_plugin.VARIABLE, "always")

    def impl(
        alibi: Any = None,
        window: int | None = None,
        cache_dtype: str = "auto",
        of: Any = None,
        **settings: Any,
    ) -> Any:
        for module in (attention, sys.modules[attention.CPUAttentionBackendImpl.__module__]):
            monkeypatch.setattr(module, "get_current_vllm_config", lambda: of or config())
        shape = (HEADS, DIM, 0.3, KV_HEADS)
        return attention.KvpagerAttentionImpl(*shape, alibi, window, cache_dtype, **settings)

    return impl


# ---------------------------------------------------------------- pages and results


def test_a_page_holds_the_keys_of_a_head_before_its_values() -> None:
    pages = pages_of()
    caches = attention.page_caches(pages)
    caches.key[5, 7, 1], caches.value[5, 7, 1] = 3, 4
    halves = pages[5, 1].reshape(2, SIZE, DIM)
    assert halves[0, 7].eq(3).all()
    assert halves[1, 7].eq(4).all()
    assert pages.nan_to_num(0).count_nonzero() == 2 * DIM


def test_pages_of_another_arrangement_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs contiguous pages. Unset KVPAGER_VLLM_ATTENTION"):
        attention.page_caches(torch.zeros(4, SIZE, KV_HEADS, 2 * DIM).transpose(1, 2))


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {}),
        ({"window": 33}, {"window": 33}),
        ({"logits_soft_cap": 2.0}, {"softcap": 2.0}),
        ({"sinks": torch.tensor([1.0, -1, 2, 0])}, {"sinks": torch.tensor([1.0, -1, 2, 0])}),
    ],
)
def test_a_step_of_prompts_and_decodes_is_attended_as_by_the_reference(
    settings: dict[str, Any], options: dict[str, Any], make: Make
) -> None:
    step = Step()
    torch.testing.assert_close(step.run(make(**settings)), step.expected(**options))


@pytest.mark.parametrize("change", [-1, 1])
def test_a_window_that_is_one_off_is_noticed(change: int, make: Make) -> None:
    step = Step()
    output, expected = step.run(make(window=33 + change)), step.expected(window=33)
    assert (output - expected).abs().max() > 1e-2


def test_rows_may_differ_in_causality(make: Make) -> None:
    step = Step()
    output = step.run(make(), dynamic_causal=torch.tensor([True, False, True]))
    torch.testing.assert_close(output[:1], step.expected()[:1])
    torch.testing.assert_close(output[1:21], step.expected(causal=False)[1:21])
    torch.testing.assert_close(output[21:], step.expected()[21:])


def test_warming_up_computes_nothing(make: Make) -> None:
    output = torch.full((2, HEADS, DIM), 7.0)
    empty = torch.zeros(0, KV_HEADS, SIZE, 2 * DIM)
    assert make().forward(None, output, None, None, empty, None, output) is not None
    assert output.eq(7).all()


# ---------------------------------------------------------------- which code serves a layer


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, None),
        ({"alibi": [0.1] * HEADS}, "ALiBi"),
        ({"cache_dtype": "fp8"}, "kv_cache_dtype=fp8"),
        ({"attn_type": "encoder_only"}, "attention of type encoder_only"),
    ],
)
def test_other_kinds_of_layers_stay_with_vllm(
    settings: dict[str, Any], reason: str | None, make: Make
) -> None:
    assert make(**settings).reason == reason


@pytest.mark.parametrize(
    ("variant", "dtype", "amx", "reason"),
    [
        ("avx512bf16", torch.bfloat16, False, None),
        ("avx2", torch.float32, False, "float32 on avx2 is not measured to be faster"),
        ("avx2", torch.bfloat16, False, None),
        ("amx", torch.bfloat16, True, "bfloat16 on matrix units"),
        ("avx512bf16", torch.float32, False, "float32 on avx512bf16 is not measured"),
        ("avx512", torch.bfloat16, False, "bfloat16 on avx512 is not measured"),
        ("portable", torch.float32, False, "float32 on portable is not measured"),
        ("avx2", torch.float16, False, "float16 on avx2 is not measured"),
    ],
)
def test_only_what_was_measured_to_be_faster_is_taken_over(
    variant: str, dtype: torch.dtype, amx: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(vllm_plugin.VARIABLE, "1")
    monkeypatch.setattr(attention.provider, "choose", lambda: SimpleNamespace(name=variant))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    found = attention.reason_for_vllm(dtype)
    assert found == reason if reason is None else found.startswith(reason)
    monkeypatch.setenv(vllm_plugin.VARIABLE, "always")
    assert attention.reason_for_vllm(dtype) is None


def test_without_native_kernels_the_choice_is_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "select", lambda *_: reference.paged_attention)
    with pytest.raises(RuntimeError, match="kvpager has no native kernels here"):
        make()


def transfer(name: str, *inside: str) -> Any:
    extra = {"connectors": [{"kv_connector": each} for each in inside]}
    return SimpleNamespace(kv_connector=name, kv_connector_extra_config=extra)


@pytest.mark.parametrize(
    "bad", [transfer("NixlConnector"), transfer("MultiConnector", "A", "NixlPullConnector")]
)
def test_a_connector_that_packs_blocks_for_vllm_is_refused(bad: Any, make: Make) -> None:
    with pytest.raises(ValueError, match=r"kv_connector=Nixl.* Use another connector, or unset"):
        make(of=config(transfer=bad))
    make(of=config(transfer=transfer("KvpagerOffloadingConnector")))


# ---------------------------------------------------------------- all layers of a model


def layers(**impls: Any) -> dict[str, Any]:
    return {name.replace("_", "."): impl for name, impl in impls.items()}


def test_one_line_says_which_code_serves_which_layer(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention.provider, "choose", lambda: SimpleNamespace(name="avx2"))
    mixed = layers(a_0=make(), a_1=make(), a_2=make(alibi=[0.1] * HEADS))
    expected = "kvpager's kernels serve the attention of 2 layers (avx2), vLLM's serve a.2 (ALiBi)"
    assert attention.describe(mixed) == expected


def test_layers_that_share_pages_must_run_the_same_code(make: Make) -> None:
    own = make(kv_sharing_target_layer_name="a.0")
    attention._check_sharing(layers(a_0=make(), a_1=own))
    with pytest.raises(ValueError, match=r"a.1 shares pages with a.0, but only one"):
        attention._check_sharing(layers(a_0=make(cache_dtype="fp8"), a_1=own))


# ---------------------------------------------------------------- the entry point


def test_the_entry_point_of_the_package_is_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["kvpager"].partition(":")
    assert getattr(importlib.import_module(module), name) is vllm_plugin.register


@pytest.mark.parametrize("value", [None, "", "0"])
def test_without_the_variable_nothing_is_imported(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(vllm_plugin.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(vllm_plugin.VARIABLE, value)
    monkeypatch.setitem(sys.modules, "vllm", None)
    vllm_plugin.register()


def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(vllm_plugin.VARIABLE, "yes")
    with pytest.raises(ValueError, match="KVPAGER_VLLM_ATTENTION=yes: expected 0, 1 or always"):
        vllm_plugin.register()


def test_a_release_whose_attention_was_not_tested_is_refused() -> None:
    releases.check_release("0.32.1", below=(0, 33))
    with pytest.raises(ImportError, match=r"Install 'vllm>=0.32,<0.33'"):
        releases.check_release("0.33.0", below=(0, 33))


def test_pages_of_one_backend_are_no_hit_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    enum = interface.AttentionBackendEnum
    path = enum.CPU_ATTN.value
    monkeypatch.setattr(enum, "get_path", lambda self: path)
    monkeypatch.setenv(vllm_plugin.VARIABLE, "1")
    stock = identity._attention(torch.float32)
    path = vllm_plugin.BACKEND
    monkeypatch.setattr(attention, "reason_for_vllm", lambda dtype: None)
    assert identity._attention(torch.float32) == vllm_plugin.BACKEND != stock
    monkeypatch.setattr(attention, "reason_for_vllm", lambda dtype: "not measured")
    assert identity._attention(torch.float32) == stock
