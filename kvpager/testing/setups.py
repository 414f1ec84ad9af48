"""The settings of one simulated run, drawn from its seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from kvpager.blocks.manager import BlockManager
from kvpager.blocks.policies import POLICIES

# Names that a careless key function would confuse.
NAMESPACES = (None, " ", "acme", "Acme", "None", "acme\0")


@dataclass(frozen=True)
class Setup:
    """The settings of a manager, and the sizes of the arguments of operations."""

    num_blocks: int
    num_host_blocks: int
    block_size: int
    alphabet: int
    longest: int
    num_sequences_max: int
    namespaces: tuple[str | None, ...]
    eviction: str
    check_every: int
    null_block: bool = False
    fences: bool = False  # copies to the host may be completed later
    quotas: bool = False


MakeManager = Callable[[Setup], Any]


def draw_setup(random: Random) -> Setup:
    """Draw a setup: in one of ten cases a small pool, which is checked completely. O(1)."""
    is_small = random.random() < 0.1
    num_blocks = random.randint(1, 8) if is_small else random.choice((10, 16, 24, 40, 64, 128, 300))
    block_size = random.choice((1, 2, 4, 4, 8, 16))
    longest = max(2, int(block_size * random.choice((1.5, 3, 5, 9))))
    return Setup(
        num_blocks=num_blocks,
        num_host_blocks=random.choice((0, num_blocks // 2, num_blocks)),
        block_size=block_size,
        alphabet=random.choice((1, 2, 3, 50)),
        longest=longest,
        num_sequences_max=5 if is_small else random.choice((4, 8, 16, 32)),
        namespaces=NAMESPACES[: random.randint(1, len(NAMESPACES))],
        eviction=random.choice(sorted(POLICIES)),
        # Small pools are checked completely after every operation.
        check_every=1 if is_small else 250,
        null_block=num_blocks > 1 and random.random() < 0.2,
        fences=random.random() < 0.3,
        quotas=random.random() < 0.3,
    )


def make_block_manager(setup: Setup) -> BlockManager:
    """Make the manager of a setup. O(blocks)."""
    return BlockManager(
        setup.num_blocks,
        setup.block_size,
        setup.num_host_blocks,
        eviction=setup.eviction,
        null_block=setup.null_block,
        fences=setup.fences,
    )
