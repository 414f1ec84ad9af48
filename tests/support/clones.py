"""A second manager that is equal to a first one: what would happen, without its happening."""

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
    """Copy an array; a view of one that is copied too is a view of the copy."""
    base = array.base
    if not isinstance(base, np.ndarray):
        twin = array.copy()
    else:
        offset = array.ctypes.data - base.ctypes.data
        twin = np.ndarray(
            array.shape, array.dtype, copy.deepcopy(base, memo), offset, array.strides
        )
    memo[id(array)] = twin
    return twin


_COPIERS = {
    np.ndarray: _array,
    memoryview: lambda view, memo: copy.deepcopy(view.obj, memo).data,
    weakref.ref: lambda ref, memo: weakref.ref(copy.deepcopy(ref(), memo)),
    type(new_lock()): lambda lock, memo: new_lock(),
}


def twin_of(manager: BlockManager) -> BlockManager:
    """Return a manager that knows the same and shares nothing with `manager`.

    `handles_of` has the handles of its sequences.
    """
    with mock.patch.dict(copy._deepcopy_dispatch, _COPIERS):  # type: ignore[attr-defined]
        return copy.deepcopy(manager)
