"""Processes whose hashes differ share blocks by content, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvpager.storage.keys import KeyContext, content_keys
from kvpager.storage.tiers.layout import BlockLayout
from kvpager.storage.tiers.protocol import Loaded, Saved
from tests.support.valkey_blocks import FRAME_AT, blocks, load, open_store, save
from tests.support.valkey_servers import Server

ROOT = Path(__file__).resolve().parents[3]
LAYOUT = BlockLayout.of(block_size=16, layers=[(2, 32, 32)] * 4, dtype="float32", block_bytes=4096)
CONTEXT = KeyContext(
    layout=LAYOUT.text,
    model="a model@a commit",
    secret=b"acme's 32 bytes of secret, kept.",
    lora="a",
)
OTHERS = {
    "tenant": replace(CONTEXT, secret=b"other tenant's secret of 32 byte"),
    "nobody": replace(CONTEXT, secret=b""),
    "model": replace(CONTEXT, model="a model@another commit"),
    "adapter": replace(CONTEXT, lora=None),
    "layout": replace(CONTEXT, layout=LAYOUT.text.replace("float32", "float16")),
}
PROMPT = np.arange(8 * 16, dtype=np.int32)
CONTENT = blocks(8, LAYOUT.block_bytes)


def keys(context: KeyContext) -> list[bytes]:
    return content_keys(PROMPT, 16, context)


def save_all(url: str) -> list[int]:
    return save(open_store(url, LAYOUT), keys(CONTEXT), CONTENT)


def read_all(url: str) -> dict[str, object]:
    """Load the prompt's blocks, and look for them under every other context."""
    store = open_store(url, LAYOUT)
    outcomes, into = load(store, keys(CONTEXT))
    return {
        "outcomes": outcomes,
        "right": [buffer == block for buffer, block in zip(into, CONTENT, strict=True)],
        "again": load(store, keys(CONTEXT))[0],
        "found": {name: store.find(keys(context)) for name, context in OTHERS.items()},
        "foreign": [load(store, keys(context))[0] for context in OTHERS.values()],
        "bad": store.stats().bad,
    }


def in_a_process(function: str, url: str) -> object:
    """Run a function of this file in a process of its own, whose hashes are random."""
    code = f"import json; from {__name__} import *; print(json.dumps({function}({url!r})))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "random", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
def test_another_process_loads_what_one_saved_and_no_byte_else(server: Server) -> None:
    assert in_a_process("save_all", server.url) == [Saved.SAVED] * 8
    lost, flipped, short, foreign = (b"kvp1:" + key for key in keys(CONTEXT)[1:5])
    server.ask(b"DEL", lost)
    server.ask(b"SETRANGE", flipped, b"%d" % (FRAME_AT + 4000), b"x")
    server.ask(b"SET", short, b"short")
    server.ask(b"COPY", b"kvp1:" + keys(CONTEXT)[0], foreign, b"REPLACE")

    hit, miss, bad = Loaded.HIT, Loaded.MISS, Loaded.BAD
    seen = in_a_process("read_all", server.url)
    assert isinstance(seen, dict)
    assert seen["outcomes"] == [hit, miss, bad, bad, bad, hit, hit, hit]
    assert [seen["right"][i] for i in (0, 5, 6, 7)] == [True] * 4
    assert seen["again"] == [hit, miss, miss, miss, miss, hit, hit, hit]
    assert seen["found"] == dict.fromkeys(OTHERS, 0)
    assert seen["foreign"] == [[miss] * 8] * len(OTHERS)
    assert seen["bad"] == 3
