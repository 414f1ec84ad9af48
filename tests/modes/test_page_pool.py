"""Pages at several addresses: what the system does for them, in processes that may end."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from kvpager.modes.page_pool import PagePool
from tests.support.programs import run_program

Run = Callable[[str], CompletedProcess[str]]
PAGE = 16_384


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs a program in another process, since it may be killed."""
    prelude = f"""
import numpy as np, os, sys, torch
from kvpager.modes.page_pool import PagePool
from kvpager.storage.block_storage import BlockStorage
PAGE = {PAGE}
def row(*blocks): return np.array([blocks], np.int32)
def storage(num_blocks, mode="virtual"):
    return BlockStorage(num_blocks, 16, [(2, 32, 32)], dtype=torch.float32, mode=mode)
"""

    def run_it(program: str) -> CompletedProcess[str]:
        file = tmp_path / "program.py"
        file.write_text(prelude + program, encoding="utf-8")
        return run_program(file, cwd=tmp_path)

    return run_it


def test_a_page_is_the_same_memory_wherever_it_is_mapped() -> None:
    pool = PagePool(4, PAGE)
    addresses = pool.open_range(4, 301)
    pool.map(addresses.address, 2)
    pool.map(addresses.address + 2 * PAGE, 2)
    pool.pages[2, 5] = 7
    assert addresses.tensor().view(4, PAGE)[:, 5].tolist() == [7, 0, 7, 0]
    addresses.tensor()[PAGE * 2 + 6] = 9
    assert pool.pages[2, 6] == 9
    addresses.unmap(0, PAGE)
    assert addresses.tensor().view(4, PAGE)[:, 5].tolist() == [0, 0, 7, 0]


def test_growing_keeps_contents_and_mappings_and_earlier_views() -> None:
    pool = PagePool(2, PAGE)
    addresses = pool.open_range(1, 301)
    earlier = pool.pages
    pool.map(addresses.address, 1)
    pool.resize(200)
    pool.pages[1, 3] = 5
    assert (earlier[1, 3], addresses.tensor()[3]) == (5, 5)
    assert pool.pages.shape == (200, PAGE)
    assert not pool.pages[2:].any()
    pool.resize(1)
    pool.resize(2)
    assert not pool.pages[1].any()  # dropped pages are zeros
    assert earlier[1, 3] == 0


def test_pages_that_are_not_whole_pages_of_the_system_are_refused() -> None:
    with pytest.raises(ValueError, match="page_bytes=1000: expected a multiple of 4096"):
        PagePool(4, 1_000)


def test_a_write_beyond_a_row_ends_the_process_and_a_read_shows_zeros(run: Run) -> None:
    program = """
made = storage(8)
rows = made.open_rows(2, max_length=64)
rows.follow(np.array([0], np.int32), row(3, 4))
key = rows.caches(0).key
key[0, 31] = 1.0
print("inside", int(key[0, 32:].abs().sum()), flush=True)
key[0, 32] = 1.0
print("not reached")
"""
    ended = run(program)
    assert ended.returncode == -signal.SIGSEGV
    assert ended.stdout == "inside 0\n"


def test_a_child_process_cannot_write_into_its_parents_pages(run: Run) -> None:
    program = """
made = storage(4)
rows = made.open_rows(1, max_length=32)
rows.follow(np.array([0], np.int32), row(1, 2))
made.tier()[:] = 1.0
for write in (lambda: made.tier().zero_(), lambda: rows.caches(0).key.zero_()):
    child = os.fork()
    if not child:
        write()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.WTERMSIG(status), bool((made.tier() == 1.0).all()), bool(rows.caches(0).key.all()))
"""
    ended = run(program)
    assert ended.stdout == f"{int(signal.SIGSEGV)} True True\n" * 2, ended.stderr


def test_memory_goes_back_to_the_system(run: Run) -> None:
    program = """
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssShmem"))
made = storage(2_000)
rows = made.open_rows(1, max_length=32_000)
before = resident()
made.tier()[:] = 1.0
rows.follow(np.array([0], np.int32), np.arange(2_000, dtype=np.int32)[None])
rows.caches(0).key.sum()
full = resident()
made.shrink(100)
print(before, full, resident(), made.nbytes >> 10)
del made, rows
import gc; gc.collect()
print(resident())
"""
    lines = run(program).stdout.split("\n")
    before, full, shrunk, kept = map(int, lines[0].split())
    written = 2_000 * 16 * 2 * 2 * 32 * 4 >> 10
    assert full - before >= written
    assert shrunk - before <= 2 * kept + 64  # shown at two addresses
    assert int(lines[1]) <= before + 64


def test_mappings_stay_below_the_bound_that_is_checked() -> None:
    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    pool = PagePool(300, PAGE)
    addresses = pool.open_range(300, 301)
    before = mappings()
    for at, page in enumerate(torch.randperm(300).tolist()):
        pool.map(addresses.address + at * PAGE, page)
    assert mappings() - before <= 300 + 1
    addresses.unmap(0, 300 * PAGE)
    assert mappings() <= before + 1
