"""Every block of code in the README and docs/ runs alone and prints what its page shows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.support import code_blocks
from tests.support.code_blocks import PAGES, ROOT, Block

BLOCKS = [block for page in PAGES for block in code_blocks.blocks(page)]
# What cannot run here, and how often a page has it. A new one is added by hand.
NOT_TESTED = {
    ("README.md", "needs a network"): 1,
    ("README.md", "runs the tests"): 1,
    ("docs/benchmarks.md", "takes minutes"): 1,
    ("docs/conformance.md", "needs the other managers"): 1,
    ("docs/getting-started.md", "needs a network"): 1,
    ("docs/guides/events.md", "needs a network"): 1,
    ("docs/guides/eviction.md", "needs your trace"): 1,
    ("docs/guides/own-manager.md", "needs a network"): 1,
    ("docs/guides/peft-torchao.md", "needs torchao"): 1,
    ("docs/guides/recordings.md", "needs an engine"): 1,
    ("docs/guides/serving.md", "needs a network"): 1,
    ("docs/guides/serving.md", "opens a port"): 1,
    ("docs/guides/throughput.md", "takes minutes"): 3,
    ("docs/guides/tiers.md", "needs your stores"): 1,
    ("docs/models.md", "takes hours"): 1,
    ("docs/sglang.md", "needs SGLang"): 2,
    ("docs/testing.md", "takes hours"): 1,
    ("docs/testing.md", "takes minutes"): 2,
    ("docs/vllm.md", "needs vLLM"): 5,
    ("docs/vllm.md", "needs vLLM on a GPU"): 2,
    ("docs/vllm.md", "needs your stores"): 1,
}


def cases() -> list[object]:
    """Return the blocks that run, slow ones marked."""
    return [
        pytest.param(block, id=str(block), marks=[pytest.mark.slow] if block.is_slow else [])
        for block in BLOCKS
        if block.obstacle is None
    ]


@pytest.mark.parametrize("block", cases())
def test_a_block_prints_what_its_page_shows(block: Block, tmp_path: Path) -> None:
    if "transformers" in block.code:
        pytest.importorskip("transformers")
    if "kv_events" in block.code:
        pytest.importorskip("zmq")
    code_blocks.run(block, tmp_path)


def test_every_program_shows_its_output() -> None:
    silent = [
        str(block)
        for block in BLOCKS
        if block.language == "python" and block.obstacle is None and not block.output
    ]
    assert silent == []


def test_every_command_shows_its_output() -> None:
    silent = [
        f"{block}: {command}"
        for block in BLOCKS
        if block.language == "console" and block.obstacle is None
        for command, output in block.commands()
        if not output.strip()
    ]
    assert silent == []


def test_the_blocks_that_cannot_run_are_these() -> None:
    found = Counter(
        (block.page.relative_to(ROOT).as_posix(), block.obstacle)
        for block in BLOCKS
        if block.obstacle is not None
    )
    assert found == NOT_TESTED


def test_a_fence_names_its_language() -> None:
    known = {"python", "console", "text", "json", "toml"}
    others = [
        f"{page.name}:{line} {language!r}"
        for page in PAGES
        for line, language, _ in code_blocks.fences(page)
        if language not in known
    ]
    assert others == []


def test_an_output_that_differs_is_told() -> None:
    block = Block(ROOT / "README.md", 1, "python", "print(1)", "2\n")
    with pytest.raises(AssertionError, match="but it prints"):
        code_blocks.compare(block, "2\n", "1\n")
    code_blocks.compare(block, "a ... c\n", "a b c\n")
