"""An agent with the calls of NIXL that the store makes, whose transfers a test can hold or fail."""

from __future__ import annotations

import ctypes
import fcntl
import os
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Handle:
    operation: str
    memory: tuple[int, int, int]
    region: tuple[int, int, int]
    held: bool
    ended: bool = False


@dataclass
class FakeAgent:
    """Move bytes between memory and a file, or an object for each device id."""

    kind: str = "FILE"
    name: str = "fake"
    refuses: str = ""  # the operation that fails when it begins
    fails: str = ""  # the operation that fails later
    moves_nothing: bool = False
    fails_direct: bool = False  # refuse files that are open for direct I/O
    interrupts: int = 0  # looks that raise KeyboardInterrupt
    hold: int = 0  # transfers to hold, from the next on
    held: list[Handle] = field(default_factory=list)
    running: int = 0
    registered: list[str] = field(default_factory=list)
    written: list[int] = field(default_factory=list)  # offsets or objects
    objects: dict[int, bytes] = field(default_factory=dict)

    def get_backend_mem_types(self, backend: str) -> list[str]:
        return [f"{self.kind}_SEG", "DRAM_SEG"]

    def register_memory(self, regions: list[Any], kind: str, backends: list[str]) -> str:
        assert all(len(region) == 4 for region in regions)
        self.registered.append(kind)
        return kind

    def deregister_memory(self, kind: str, backends: list[str]) -> None:
        assert not self.running
        self.registered.remove(kind)

    def get_xfer_descs(self, regions: list[Any], kind: str) -> Any:
        assert kind in self.registered
        [region] = regions
        return region

    def initialize_xfer(
        self, operation: str, memory: Any, region: Any, agent: str, note: bytes, backends: list[str]
    ) -> Handle:
        assert agent == self.name
        assert memory[1] == region[1]
        if operation == self.refuses:
            raise RuntimeError("NIXL_ERR_INVALID_PARAM")
        handle = Handle(operation, memory, region, held=self.hold > 0)
        if handle.held:
            self.hold -= 1
            self.held.append(handle)
        return handle

    def transfer(self, handle: Handle) -> str:
        self.running += 1
        return "PROC"

    def check_xfer_state(self, handle: Handle) -> str:
        assert not handle.ended
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        if handle.held:
            return "PROC"
        handle.ended = True
        self.running -= 1
        if handle.operation == self.fails or (self.fails_direct and self._is_direct(handle)):
            raise RuntimeError("NIXL_ERR_BACKEND")
        if not self.moves_nothing:
            self._move(handle)
        return "DONE"

    def release_xfer_handle(self, handle: Handle) -> None:
        assert handle.ended

    def let_go(self) -> None:
        """Let the held transfers end when they are looked at."""
        while self.held:
            self.held.pop().held = False

    def _is_direct(self, handle: Handle) -> bool:
        return bool(fcntl.fcntl(handle.region[2], fcntl.F_GETFL) & os.O_DIRECT)

    def _move(self, handle: Handle) -> None:
        address, size, _ = handle.memory
        offset, _, number = handle.region
        memory = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
        if handle.operation == "WRITE":
            self.written.append(offset if self.kind == "FILE" else number)
        if self.kind == "OBJ":
            if handle.operation == "WRITE":
                self.objects[number] = bytes(memory)
            else:
                memory[:] = self.objects[number]
        elif handle.operation == "WRITE":
            assert os.pwritev(number, [memory], offset) == size
        else:
            assert os.preadv(number, [memory], offset) == size
