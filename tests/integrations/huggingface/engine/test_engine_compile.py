"""Which arguments of `torch.compile` an engine takes."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

from torch._inductor import config

from kvpager.engine.config import require_no_cuda_graphs


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"mode": "default"},
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"freezing": True}},
        {"options": {"triton.cudagraphs": False}},
        {"backend": "aot_eager"},
        {"backend": "aot_eager", "mode": None},
        {"backend": lambda graph, inputs: graph},
    ],
)
def test_what_records_no_graph_is_taken(arguments: dict[str, Any]) -> None:
    require_no_cuda_graphs(arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"mode": "reduce-overhead"}, "'mode': 'reduce-overhead'"),
        ({"mode": "max-autotune"}, "'mode': 'max-autotune'"),
        ({"options": {"triton.cudagraphs": True}}, "'options': {'triton.cudagraphs': True}"),
        ({"backend": "cudagraphs"}, "'backend': 'cudagraphs'"),
    ],
)
def test_what_records_graphs_is_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=r"engine's thread\. Use mode='default'") as error:
        require_no_cuda_graphs(arguments)
    assert f"compile={{{named}}}" in str(error.value)


def test_global_cuda_graphs_are_refused_unless_switched_off() -> None:
    with config.patch({"triton.cudagraphs": True}):
        with pytest.raises(ValueError, match=r"config\.triton\.cudagraphs"):
            require_no_cuda_graphs({})
        require_no_cuda_graphs({"options": {"triton.cudagraphs": False}})
