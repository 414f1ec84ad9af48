"""Modes of managing KV memory, behind one interface: paged, virtual and reserved.

    paged     blocks anywhere in the pool; attention reads them through block tables
    virtual   the same blocks, also mapped into a range of addresses for each row, so that attention
              reads a row as one tensor (vAttention, Prabhu et al. 2024); on a CPU or a GPU
    reserved  a region of the maximum length for each row, as before paging

`BlockStorage(mode=...)` and `Engine(mode=...)` choose one.
"""

from typing import Literal

import torch

from kvpager._text import listed
from kvpager.modes.paged import Paged
from kvpager.modes.protocol import Mode
from kvpager.modes.reserved import Reserved
from kvpager.modes.virtual import Virtual
from kvpager.modes.virtual_gpu import VirtualOnGpu

ModeName = Literal["paged", "virtual", "reserved"]

_MODES: dict[str, type[Mode]] = {each.name: each for each in (Paged, Virtual, Reserved)}


def mode_named(name: str, device: torch.device | str = "cpu") -> Mode:
    """Return a mode by its name, for blocks on `device`. O(1).

    Raises: `ValueError` for an unknown name. For "virtual" on a GPU, also as `VirtualOnGpu`.
    """
    if name not in _MODES:
        raise ValueError(f"mode={name!r}: expected one of {listed(_MODES)}")
    place = torch.device(device)
    if name == Virtual.name and place.type == "cuda":
        return VirtualOnGpu(place)
    return _MODES[name]()
