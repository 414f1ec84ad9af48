"""Modes of managing KV memory, behind one interface: paged, virtual and reserved.

    paged     blocks anywhere in the pool; attention follows block tables
    virtual   blocks anywhere in the pool, and mapped into a range of addresses for each row: so
              attention reads a row as one tensor (vAttention, Prabhu et al. 2024); on a GPU too
    reserved  one region for each row, as long as the longest sequence: what paging replaced

`BlockStorage(mode=...)` chooses one.
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

    Raises: `ValueError` for an unknown one; "virtual" on a GPU: errors of `VirtualOnGpu`.
    """
    if name not in _MODES:
        raise ValueError(f"mode={name!r}: expected one of {listed(_MODES)}")
    place = torch.device(device)
    if name == Virtual.name and place.type == "cuda":
        return VirtualOnGpu(place)
    return _MODES[name]()
