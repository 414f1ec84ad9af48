"""Validation of arguments, in one place so that all messages read alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from itertools import islice
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvpager._text import counted
from kvpager.plans import Int32, Int64

_BYTES_MAX = 1 << 60
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("kmgt", start=1)}


_INT32 = np.iinfo(np.int32)
_NO_INTS = (bool, np.timedelta64)  # subclasses or relatives of int that are refused
COUNT_MAX = int(_INT32.max)  # blocks of a pool and tokens of a sequence have int32 numbers
PRIORITY_MAX = COUNT_MAX  # of a request; a float64 still orders these exactly
SECONDS_MAX = 10**9  # 31 years: within what Python's locks and clocks accept
_SHOWN_MAX = 80  # characters of a value in a message


def is_int(value: Any) -> bool:
    """Return True for an integer that is neither a bool nor a timedelta64."""
    # A timedelta64 is a NumPy integer.
    is_integral = type(value) is int or isinstance(value, Integral)
    return is_integral and not isinstance(value, _NO_INTS)


def shown(value: Any) -> str:
    """Return a short text of `value` for a message. Never raises."""
    try:
        text = repr(value)
    except Exception:  # from a caller's `__repr__`, or an int with too many digits to print
        text = f"of type {type(value).__name__}"
    return text if len(text) <= _SHOWN_MAX else f"{text[: _SHOWN_MAX - 3]}..."


def count(name: str, value: int, *, at_least: int = 0, at_most: int = COUNT_MAX) -> int:
    """Return `value` as an int within bounds: NumPy integers would overflow in arithmetic."""
    if not is_int(value):
        raise TypeError(f"{name}={shown(value)}: expected an int, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name}={shown(value)}: expected at least {at_least}")
    if value > at_most:
        raise ValueError(f"{name}={shown(value)}: expected at most {at_most}")
    return int(value)


def flag(name: str, value: bool) -> bool:
    """Return `value` if it is a bool: a string such as "no" would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)}: expected True or False")
    return value


def block_size(value: int) -> int:
    """Return a block size, which must be a power of two."""
    size = count("block_size", value, at_least=1)
    if size & (size - 1):
        raise ValueError(f"block_size={size}: expected a power of two, such as 16")
    return size


def number(
    name: str, value: float, *, at_least: float, at_most: float, is_open: bool = False
) -> float:
    """Return `value` as a float within bounds, which NaN is not. `is_open` excludes the lower."""
    if not (is_int(value) or isinstance(value, float | np.floating)):
        raise TypeError(f"{name}={shown(value)}: expected a number, got {type(value).__name__}")
    if not at_least <= value <= at_most or (is_open and value == at_least):
        allowed = f"more than {at_least:g}, at most" if is_open else f"{at_least:g} to"
        raise ValueError(f"{name}={shown(value)}: expected {allowed} {at_most:g}")
    return float(value)


def seconds(name: str, value: float, *, is_limit: bool = False) -> float:
    """Return a duration in seconds, from 0 to `SECONDS_MAX`; above 0 for a limit."""
    if not (is_int(value) or isinstance(value, float | np.floating)):
        raise TypeError(f"{name}={shown(value)}: expected seconds, got {type(value).__name__}")
    if not 0 <= value <= SECONDS_MAX or (is_limit and value == 0):
        limits = f"seconds, at least 0 and at most {SECONDS_MAX:,}"
        if is_limit:
            limits = f"more than 0 seconds, at most {SECONDS_MAX:,}, or None"
        raise ValueError(f"{name}={shown(value)}: expected {limits}")
    return float(value)


def within_one(name: str, value: int | None, length: int) -> None:
    """Raise `ValueError` for a token number beyond the end of a sequence."""
    if value is not None and value > length:
        raise ValueError(f"{name}={value}: the sequence has {counted(length, 'token')} only")


def within(name: str, value: int | Int64, lengths: Int64, thing: str = "token") -> None:
    """Raise `ValueError` if a value exceeds the sequence's length; `value`: one or one each."""
    beyond = np.flatnonzero(lengths < value)
    if len(beyond):
        wrong = np.broadcast_to(value, lengths.shape)[beyond[0]]
        length = counted(int(lengths[beyond[0]]), thing)
        raise ValueError(f"{name}={wrong}: the sequence has {length} only")


def counts(name: str, value: ArrayLike, num_sequences: int) -> Int64:
    """Return a count for each sequence, int64 [n]; a single count is broadcast."""
    numbers = integers(name, value)
    if numbers.shape not in ((), (num_sequences,)):
        raise ValueError(
            f"{name}={shown(value)}: expected one int, or one for each of {num_sequences}"
        )
    if numbers.size and (numbers.min() < 0 or numbers.max() > COUNT_MAX):
        raise ValueError(f"{name}={shown(value)}: expected 0 to {COUNT_MAX} each")
    return np.broadcast_to(numbers.astype(np.int64), (num_sequences,))


def swap(to: object, at_most: int | None, reserve: int) -> tuple[int | None, int]:
    """Return `at_most` and `reserve` as ints. Raises: `ValueError`, `TypeError`. O(1)."""
    if not isinstance(to, str) or to not in ("device", "host"):
        raise ValueError(f'to={to!r}: expected "device" or "host"')
    return None if at_most is None else count("at_most", at_most), count("reserve", reserve)


def label(name: str, value: str | None) -> None:
    """Raise unless a namespace, LoRA or tenant is None or a non-empty Unicode text.

    Otherwise 1, 1.0 and True would be the same tenant, and all tenants with an empty, missing name
    would share prompts. Content keys cover the name in UTF-8, which has no lone surrogates: a JSON
    request may contain them.
    """
    if value is not None and not isinstance(value, str):
        kind = type(value).__name__
        raise TypeError(f"{name}={shown(value)}: expected a str or None, got {kind}")
    if value == "":
        raise ValueError(f'{name}="": expected at least one character. Pass None for no {name}.')
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{name}={shown(value)}: expected Unicode text without lone surrogates. Replace them."
        ) from None


def parse_memory(memory: int | str | None, name: str = "memory") -> int | None:
    """Read `"4GiB"`, `"500 MB"` or a number of bytes; None stays None (no bound). O(1)."""
    if memory is None:
        return None
    if is_int(memory):
        return count(name, int(memory), at_least=1, at_most=_BYTES_MAX)
    if not isinstance(memory, str):
        raise TypeError(f"{name}={memory!r}: expected bytes or a text such as '4GiB'")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", memory.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{name}={memory!r}: expected a size such as '4GiB', '500MB' or 10**9")
    num_bytes = int(float(match[1]) * _UNITS[match[2]])
    return count(name, num_bytes, at_least=1, at_most=_BYTES_MAX)


def integers(name: str, value: Any) -> NDArray[np.integer[Any]]:
    """Return an array of the integers in `value`, of any shape. O(items).

    Masked arrays and bools are refused: NumPy would read masked values, and True as 1.
    Raises: `TypeError`, `ValueError`.
    """
    try:
        array = _read(value)
    except _UNREADABLE as error:
        raise _unreadable(name, value, error) from None
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got dtype {array.dtype}")
    return array if array.size else array.astype(np.int64)


class _NotInteger(Exception):
    """An item is not an integer, although NumPy would read it as one."""


# Errors of NumPy, torch and callers' objects. Others may come from a signal handler, so they are
# not caught.
_UNREADABLE = (
    _NotInteger, np.ma.MaskError, AttributeError, LookupError, NotImplementedError, OverflowError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip


def _unreadable(name: str, value: Any, error: Exception) -> Exception:
    if isinstance(error, _NotInteger):
        return TypeError(f"{name}: expected integers, got {error}")
    if isinstance(error, np.ma.MaskError):
        return ValueError(f"{name}: expected integers, but some are masked. Fill or drop them.")
    if isinstance(error, OverflowError):
        return ValueError(f"{name}: expected 32-bit integers, got more than 64 bits")
    if isinstance(error, ValueError) and _is_list(value):
        return ValueError(f"{name}: expected one flat list of ids, got several lengths")
    # Such as for a tensor on another device: keep its advice.
    kind, why = type(value).__name__, str(error).partition("\n")[0].rstrip(".")
    return TypeError(f"{name}: {kind} cannot be read: {why}. Pass a list of ints or a NumPy array.")


def _read(value: Any) -> NDArray[Any]:
    if type(value) is np.ndarray:
        return value
    if isinstance(value, str | bytes | Mapping | Set):
        raise _NotInteger(f"a {type(value).__name__}: {shown(value)}")
    mask = getattr(value, "mask", None)
    if isinstance(mask, np.ndarray | np.bool_ | bool) and np.any(mask):
        raise np.ma.MaskError
    if not _is_list(value):
        return np.asarray(value)
    items = value if isinstance(value, list | tuple) else list(islice(iter(value), len(value)))
    kinds = set(map(type, items))
    if all(issubclass(kind, Integral) and not issubclass(kind, _NO_INTS) for kind in kinds):
        array = np.asarray(items)
        # NumPy reads ints beyond 64 bits as floats or objects.
        return array if array.dtype.kind in "iu" else np.array([*map(int, items)], np.int64)
    for item in items:
        if not _is_list(item) and (array := _read(item)).size and array.dtype.kind not in "iu":
            raise _NotInteger(f"dtype {array.dtype}")
    return np.asarray(items)


def _is_list(value: Any) -> bool:
    """Return True for a sequence that NumPy would read item by item."""
    return (
        hasattr(value, "__len__")
        and hasattr(value, "__getitem__")
        and not hasattr(value, "__array__")
        and not isinstance(value, str | bytes)
    )


def token_ids(value: ArrayLike) -> Int32:
    """Return one-dimensional token ids as int32. O(tokens). Raises: `TypeError`, `ValueError`."""
    if type(value) is np.ndarray and value.dtype == np.int32 and value.ndim == 1:
        return value
    if value is None:
        raise TypeError("token ids: expected a list of ints, got None")
    ids = integers("token ids", value)
    if ids.ndim != 1:
        raise ValueError(f"token ids: expected one dimension, got shape {ids.shape}")
    if ids.size and (ids.max() > _INT32.max or ids.min() < _INT32.min):
        wrong = ids[(ids > _INT32.max) | (ids < _INT32.min)][0]
        raise ValueError(f"token ids: expected 32-bit integers, got {wrong}")
    return ids.astype(np.int32)


def prompt(value: int | ArrayLike) -> tuple[int, Int32 | None]:
    """Return a prompt's length, and its ids or None."""
    if is_int(value):
        return count("prompt", value), None  # type: ignore[arg-type]
    if isinstance(value, bool | float | str | bytes):
        raise TypeError(f"prompt={shown(value)}: expected token ids or a count of tokens")
    ids = token_ids(value)
    return len(ids), ids


def new_tokens(
    num_sequences: int | None, tokens: Any, new_counts: ArrayLike | None
) -> tuple[int | Int64, Int32 | None]:
    """Return how many tokens each sequence gets, and their concatenated ids or None.

    `num_sequences` is None for a single handle, whose ids are one list.
    """
    if new_counts is not None:
        if not (is_int(tokens) and tokens == 1):
            raise ValueError("tokens, counts: expected one of the two")
        return counts("counts", new_counts, num_sequences or 1), None
    if is_int(tokens):
        return count("tokens", tokens), None
    if isinstance(tokens, bool | float | str | bytes) or not isinstance(tokens, Iterable):
        raise TypeError(f"tokens={shown(tokens)}: expected a count or token ids")
    tokens = tokens if hasattr(tokens, "__len__") else list(tokens)
    if num_sequences is None or getattr(tokens, "ndim", 1) == 0:
        ids = token_ids(tokens)
        return len(ids), ids
    if len(tokens) != num_sequences:
        raise ValueError(
            f"tokens: got ids for {len(tokens)} sequences, expected {num_sequences}. "
            "Pass an id or a list of ids for each."
        )
    if isinstance(tokens, np.ndarray) and tokens.ndim <= 2:
        each = 1 if tokens.ndim == 1 else tokens.shape[1]
        return each, token_ids(tokens.reshape(-1))
    if all(map(is_int, tokens)):
        return 1, token_ids(tokens)
    rows = [token_ids(np.atleast_1d(integers("token ids", row))) for row in tokens]
    return np.array([len(row) for row in rows], np.int64), np.concatenate([_NO_IDS, *rows])


def accepted(num_sequences: int | None, kept: ArrayLike, tokens: Any) -> tuple[Int64, Int32 | None]:
    """Return how many speculative tokens each sequence keeps, and their concatenated ids or None.

    `num_sequences` is None for a single handle.
    """
    counted = counts("counts", kept, 1 if num_sequences is None else num_sequences)
    if tokens is None:
        return counted, None
    each, ids = new_tokens(num_sequences, tokens, None)
    if ids is None or np.any(counted != each):
        raise ValueError(f"counts={kept!r}: expected one token id for each kept token")
    return counted, ids


_NO_IDS: Int32 = np.empty(0, np.int32)
