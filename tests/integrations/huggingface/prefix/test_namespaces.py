"""Namespaces: calls share the prompts of their own namespace only."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import kvpager
from tests.support.llama_calls import COMPUTED, generate, llama, long_prompt


def test_namespaces_share_nothing() -> None:
    with kvpager.patch(prefix_cache=True, namespace="acme") as outer:
        generate(llama(), long_prompt())
        with kvpager.patch(llama(), prefix_cache=True, namespace="umbrella") as inner:
            with COMPUTED[llama()] as computed:
                generate(llama(), long_prompt())
            assert max(computed.columns) == 1000
            assert inner.stats().prefix_hit_tokens == 0
        assert outer.stats().prefix_hit_tokens == 0


def test_a_call_may_be_of_another_namespace() -> None:
    def hits(patch: Any) -> int:
        before = patch.stats().prefix_hit_tokens
        generate(llama(), long_prompt())
        return int(patch.stats().prefix_hit_tokens - before)

    room: dict[str, Any] = {"memory": "64MiB"}  # for the prompts of both
    with kvpager.patch(llama(), prefix_cache=True, namespace="acme", **room) as patch:
        assert hits(patch) == 0
        with patch.namespace("umbrella"):
            assert hits(patch) == 0
            with patch.namespace("acme"):
                assert hits(patch) > 900
            assert hits(patch) > 900
        with pytest.raises(RuntimeError, match="not served"), patch.namespace("initech"):
            raise RuntimeError("not served")
        assert hits(patch) > 900  # of acme again
        with patch.namespace("initech"):
            assert hits(patch) == 0


def test_a_namespace_holds_for_its_own_thread_and_patch_alone() -> None:
    found: dict[str, list[int]] = {}

    def serve(patch: Any, name: str, prompt: torch.Tensor) -> None:
        with patch.namespace(name):
            for _ in range(2):
                with COMPUTED[llama()] as computed:
                    generate(llama(), prompt)
                found.setdefault(name, []).append(max(computed.columns))

    with kvpager.patch(llama(), prefix_cache=True) as patch:
        with patch.namespace("outer"):
            thread = threading.Thread(target=lambda: generate(llama(), long_prompt()))
            thread.start()
            thread.join()
            # The thread's call was of no namespace, so nothing is here yet.
            serve(patch, "inner", long_prompt())
        generate(llama(), long_prompt())
        assert found["inner"][0] == 1000
        assert found["inner"][1] < 100
        other = kvpager.patch(prefix_cache=True)
        with other, patch.namespace("inner"), COMPUTED[llama()] as computed:
            generate(llama(), long_prompt())  # the patch made last serves it
        assert max(computed.columns) == 1000


def test_a_namespace_needs_a_name_and_prompts_that_are_kept() -> None:
    with kvpager.patch(llama()) as patch, pytest.raises(kvpager.KVPagerError, match="prefix_cache"):
        patch.namespace("acme")
    with kvpager.patch(llama(), prefix_cache=True) as patch:
        with pytest.raises(TypeError, match="namespace=None: expected a str"):
            patch.namespace(None)
        with pytest.raises(TypeError, match="namespace=7: expected a str"):
            patch.namespace(7)
