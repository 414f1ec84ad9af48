"""Reading what callers pass: one place for the checks, so that every message reads alike."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Contents = tuple[tuple[int, int, bytes, int], ...]

_INT32 = np.iinfo(np.int32)
_NO_IDS_BUT = (bool, float, str, bytes)  # iterable or not, these are no token ids
COUNT_MAX = int(_INT32.max)  # blocks of a pool and tokens of a sequence are numbered in int32


def is_int(value: Any) -> bool:
    """Whether `value` is a whole number and not a truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def count(name: str, value: int, *, at_least: int = 0, at_most: int = COUNT_MAX) -> int:
    """`value` as a plain int within bounds; NumPy's own wrap around in arithmetic."""
    if not is_int(value):
        raise TypeError(f"{name} {value!r}: expected an int, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} {value}: expected at least {at_least}")
    if value > at_most:
        raise ValueError(f"{name} {value}: expected at most {at_most}")
    return int(value)


def block_size(value: int) -> int:
    """A power of two of at least 1."""
    size = count("block_size", value, at_least=1)
    if size & (size - 1):
        raise ValueError(f"block_size {size}: expected a power of two, such as 16")
    return size


def seconds(name: str, value: float) -> float:
    """A time of at least 0, in seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name} {value!r}: expected seconds, got {type(value).__name__}")
    if not 0 <= value < np.inf:
        raise ValueError(f"{name} {value!r}: expected seconds, at least 0")
    return float(value)


def within_one(name: str, value: int | None, length: int) -> None:
    """Refuse a token number beyond the end of a sequence."""
    if value is not None and value > length:
        raise ValueError(f"{name} {value}: the sequence has {length} tokens only")


def within(name: str, value: int | Int64, lengths: Int64) -> None:
    """Refuse a token number beyond the end of a sequence; `value` is one for all, or one each."""
    beyond = np.flatnonzero(lengths < value)
    if len(beyond):
        wrong = np.broadcast_to(value, lengths.shape)[beyond[0]]
        raise ValueError(f"{name} {wrong}: the sequence has {lengths[beyond[0]]} tokens only")


def counts(name: str, value: ArrayLike, num_sequences: int) -> Int64:
    """One whole number of at least 0 for each sequence; a single one stands for all."""
    numbers = np.asarray(value)
    if numbers.shape not in ((), (num_sequences,)):
        raise ValueError(f"{name} {value!r}: expected one int, or one for each of {num_sequences}")
    if numbers.size and numbers.dtype.kind not in "iu":
        raise TypeError(f"{name} {value!r}: expected ints, got {numbers.dtype}")
    if numbers.size and (numbers.min() < 0 or numbers.max() > COUNT_MAX):
        raise ValueError(f"{name} {value!r}: expected 0 to {COUNT_MAX} each")
    return np.broadcast_to(numbers.astype(np.int64), (num_sequences,))


def label(name: str, value: str | None) -> None:
    """A namespace or adapter is a string, so that 1, 1.0 and True can never be the same tenant."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} {value!r}: expected a str or None, got {type(value).__name__}")


def contents(value: Iterable[tuple[int, int, bytes]], length: int) -> Contents:
    """What stands behind a prompt's placeholders; see `kvpager.radix.Contents`."""
    found = []
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"contents {value!r}: expected a list of (start, stop, digest)")
    for item in value:
        if not isinstance(item, tuple | list) or len(item) != 3:
            raise TypeError(f"content {item!r}: expected (start, stop, digest)")
        start, stop, digest = item
        if not isinstance(digest, bytes) or not digest:
            raise TypeError(
                f"content {item!r}: expected bytes that stand for it, such as a SHA-256"
            )
        start = count("content's first token", start)
        stop = count("content's end", stop, at_least=start + 1, at_most=length)
        found.append((start, stop, digest, stop))
    return tuple(sorted(found))


def token_ids(value: ArrayLike) -> Int32:
    """One-dimensional token ids as int32."""
    if isinstance(value, np.ndarray) and value.dtype == np.int32 and value.ndim == 1:
        return value
    if value is None:
        raise TypeError("token ids None: expected a list of ints, or a count")
    try:
        ids = np.asarray(value)
    except ValueError:
        raise ValueError("token ids of several lengths: expected one flat list of ids") from None
    if ids.ndim != 1:
        raise ValueError(f"token ids of shape {ids.shape}: expected one dimension")
    if not ids.size:
        return np.empty(0, np.int32)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"token ids of dtype {ids.dtype}: expected integers")
    if ids.max() > _INT32.max or ids.min() < _INT32.min:
        raise ValueError(f"token id {ids[np.abs(ids).argmax()]}: expected 32-bit integers")
    return ids.astype(np.int32)


def prompt(value: int | ArrayLike) -> tuple[int, Int32 | None]:
    """A prompt's length, and its ids where it has any."""
    if isinstance(value, np.ndarray):
        ids = token_ids(value)
        return len(ids), ids
    if is_int(value):
        return count("prompt", value, at_least=1), None  # type: ignore[arg-type]
    if isinstance(value, _NO_IDS_BUT):
        raise TypeError(f"prompt {value!r}: expected token ids or a count of tokens")
    ids = token_ids(value)
    return len(ids), ids


def new_tokens(
    num_sequences: int | None, tokens: Any, new_counts: ArrayLike | None
) -> tuple[int | Int64, Int32 | None]:
    """How many tokens to append to each sequence, and all their ids, where known, end to end.

    `num_sequences` is None where a single handle was named, whose ids stand in one plain list.
    """
    if new_counts is not None:
        if not (is_int(tokens) and tokens == 1):
            raise ValueError("give either tokens or counts, not both")
        return counts("counts", new_counts, num_sequences or 1), None
    if is_int(tokens):
        return count("tokens", tokens, at_least=1), None
    if isinstance(tokens, bool | float | str | bytes) or not isinstance(tokens, Iterable):
        raise TypeError(f"tokens {tokens!r}: expected a count or token ids")
    tokens = tokens if hasattr(tokens, "__len__") else list(tokens)
    if num_sequences is None:
        ids = token_ids(tokens)
        return len(ids), ids
    if len(tokens) != num_sequences:
        raise ValueError(
            f"token ids for {len(tokens)} sequences, but {num_sequences} were named; "
            "give one id, or one list of ids, for each"
        )
    if isinstance(tokens, np.ndarray) and tokens.ndim <= 2:
        each = 1 if tokens.ndim == 1 else tokens.shape[1]
        return each, token_ids(tokens.reshape(-1))
    if all(map(is_int, tokens)):
        return 1, token_ids(tokens)
    rows = [token_ids(np.atleast_1d(np.asarray(row))) for row in tokens]
    return np.array([len(row) for row in rows], np.int64), np.concatenate([_NO_IDS, *rows])


_NO_IDS: Int32 = np.empty(0, np.int32)
