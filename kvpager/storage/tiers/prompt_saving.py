"""Saves the blocks of a prompt at once, for another process that continues it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from kvpager.blocks.manager import BlockManager
from kvpager.blocks.sequences import KeyParts
from kvpager.plans import Int32
from kvpager.storage.keys import ContentKeying
from kvpager.storage.tiers.asking import is_bypassed
from kvpager.storage.tiers.followers import Followers
from kvpager.storage.tiers.protocol import BlockStore
from kvpager.storage.tiers.saving import Saver, StagedBlock
from kvpager.storage.tiers.slot_memory import Lease, SlotMemory

_BATCH = 32  # blocks that stores answer within one deadline


@dataclass(eq=False, slots=True)
class PromptSave:
    """A prompt whose full blocks go to stores.

    Attributes:
        tokens: the prompt.
        identity: what its keys cover besides the tokens.
        num_copied: leading blocks that were copied into staging.
        is_copied: True if no block is left to copy.
        work: done when stores have answered for the last block that was copied.
    """

    tokens: Int32
    identity: KeyParts
    num_copied: int = 0
    is_copied: bool = False
    work: Future[None] | None = None

    @property
    def is_done(self) -> bool:
        """True if stores have answered for all blocks."""
        return self.is_copied and (self.work is None or self.work.done())


class PromptSaver:
    """Offers the blocks of prompts to the stores that other processes read.

    Each block is offered, also one that is clean: a server does not report the blocks it lost.
    A block that a store has costs no transfer. One thread, between steps, calls `save`.
    """

    def __init__(
        self,
        manager: BlockManager,
        staging: SlotMemory,
        stores: Sequence[BlockStore],
        keying: ContentKeying,
        saver: Saver,
        followers: Followers,
    ) -> None:
        self._manager = manager
        self._staging = staging
        self._stores = stores
        self._keying = keying
        self._saver = saver
        self._followers = followers

    def save(self, prompt: PromptSave) -> None:
        """Copy the cached blocks of a prompt that are left, as many as staging has room for.

        A thread saves them then. Blocks that left the prefix cache end the copying.
        O(tokens + bytes copied).
        """
        stores, tokens = self._asked(), prompt.tokens
        if any(self._manager.windows):
            tokens = tokens[:-1]  # the last token is computed, so a prompt continues before it
        found = self._manager.match_prefix(tokens, blocks=True, **prompt.identity)
        blocks = found.whole(self._manager.block_size)[prompt.num_copied :]
        while stores and len(blocks):
            if not (count := self._offer(blocks[:_BATCH], stores, prompt)):
                return
            blocks = blocks[count:]
        prompt.is_copied = True

    def _asked(self) -> list[int]:
        """Return the numbers of the stores that other processes read and that answer now."""
        return [
            number
            for number, store in enumerate(self._stores)
            if not getattr(store, "is_private", False) and not is_bypassed(store)
        ]

    def _offer(self, blocks: Int32, stores: list[int], prompt: PromptSave) -> int:
        """Copy blocks into staging, and offer them; return how many."""
        with Lease(self._staging) as lease:
            slots = lease.take(len(blocks))
            blocks = blocks[: len(slots)]
            if not slots:
                return 0
            keys = self._manager.cached.keys(blocks, self._keying)
            self._staging.read(blocks.tolist(), slots)
            self._manager.cached.mark_offered(blocks)
            namespace = prompt.identity["namespace"]
            pairs = zip(keys, slots, strict=True)
            staged = [StagedBlock(key, namespace, slot, stores) for key, slot in pairs]
            self._followers.save(blocks, staged)  # before stores may drop some again
            lease.slots = []
            prompt.work = self._saver.submit(staged)
        prompt.num_copied += len(slots)
        return len(slots)
