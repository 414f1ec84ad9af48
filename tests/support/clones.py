"""Deep copies of a manager: try a call on the copy, and leave the original as it is."""

from __future__ import annotations

import copy
import weakref
from typing import Any
from unittest import mock

import numpy as np

from kvpager import BlockManager
from kvpager._atomic import new_lock

Memo = dict[int, Any]


def _array(array: np.ndarray, memo: Memo) -> np.ndarray:
    """Copy an array. If its base is copied too, the copy is a view of that copy."""
    base = array.base
    if not isinstance(base, np.ndarray):
        copied = array.copy()
    else:
        offset = array.ctypes.data - base.ctypes.data
        copied = np.ndarray(
            array.shape, array.dtype, copy.deepcopy(base, memo), offset, array.strides
        )
    memo[id(array)] = copied
    return copied


_COPIERS = {
    np.ndarray: _array,
    memoryview: lambda view, memo: copy.deepcopy(view.obj, memo).data,
    weakref.ref: lambda ref, memo: weakref.ref(copy.deepcopy(ref(), memo)),
    type(new_lock()): lambda lock, memo: new_lock(),
}


def clone_of(manager: BlockManager) -> BlockManager:
    """Return a deep copy of `manager`. `handles_of` returns the handles of its sequences."""
    with mock.patch.dict(copy._deepcopy_dispatch, _COPIERS):  # type: ignore[attr-defined]
        return copy.deepcopy(manager)
