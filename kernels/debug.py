"""Debug mode: check every index before a kernel uses it.

    KVPAGER_DEBUG=1 python serve.py

Kernels trust the values of block tables, slots and lengths, because checking them would wait for
the GPU. A wrong value reads or writes memory of another sequence. In debug mode each entry point
checks all values first, on every device. It raises `ValueError` with the index, the value and the
bound before any memory is touched. The variable is read once, at import. Every call waits for the
device, so CUDA graphs cannot be captured in debug mode.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from kvpager.kernels.args import short_mask
from kvpager.kernels.attention_args import AttentionArgs
from kvpager.kernels.host_rows import HostRows

_enabled = os.environ.get("KVPAGER_DEBUG", "").lower() not in ("", "0", "false", "no", "off")


def enabled() -> bool:
    """Return True if the entry points check values. O(1)."""
    return _enabled


def check_slots(slots: Tensor, key_cache: Tensor) -> None:
    """Raise `ValueError` unless all slots exist and differ; skip negative slots. O(n log n)."""
    num_slots = key_cache.shape[0] * key_cache.shape[1]
    _refuse("slots", slots, slots >= num_slots, f"the cache has slots 0 to {num_slots - 1}")
    twice = _twice(slots)
    if twice is not None:
        first, second = twice
        raise ValueError(
            f"slots[{first}] and slots[{second}] are both {int(slots[first])}; "
            "give every token a slot of its own"
        )


def check_attention(query: Tensor, key_cache: Tensor, args: AttentionArgs) -> None:
    """Raise `ValueError` if a value of `args` exceeds the query or cache. O(table entries)."""
    if args.host_rows is not None:
        _check_host_rows(args.host_rows, args, key_cache.shape[1])
    check_rows(args.block_tables, args.seq_lens, key_cache)
    if args.cu_seqlens_q is not None:
        _check_queries(len(query), args.cu_seqlens_q, args.mask)
    if args.kv_starts is not None:
        is_wrong = args.kv_starts < 0
        _refuse("kv_starts", args.kv_starts, is_wrong, "the first token of a row is 0")


def check_rows(block_tables: Tensor, seq_lens: Tensor, cache: Tensor) -> None:
    """Raise `ValueError` unless lengths fit their tables and used blocks exist. O(entries)."""
    num_blocks, block_size = cache.shape[:2]
    columns = block_tables.shape[1]
    room = columns * block_size
    bound = f"block_tables has room for 0 to {room} tokens per row"
    _refuse("seq_lens", seq_lens, (seq_lens < 0) | (seq_lens > room), bound)
    starts = torch.arange(columns, device=seq_lens.device) * block_size
    wrong = (block_tables < -1) | (block_tables >= num_blocks)
    # Entries past a row's last token are never followed, so they may hold anything.
    wrong &= starts < seq_lens[:, None]
    bound = f"the cache has blocks 0 to {num_blocks - 1}, and -1 is none"
    _refuse("block_tables", block_tables, wrong, bound)


def _check_host_rows(rows: HostRows, args: AttentionArgs, block_size: int) -> None:
    """Raise `ValueError` unless `rows` has the values of the tensors. O(entries)."""
    for name in ("seq_lens", "block_tables", "cu_seqlens_q"):
        tensor, array = getattr(args, name), getattr(rows, name)
        if tensor is None or array is None:
            continue
        found = tensor.cpu()
        wrong = found != torch.from_numpy(array)
        if name == "block_tables":  # entries past a row's last token are never followed
            last = (args.seq_lens.cpu()[:, None] - 1) // block_size
            wrong &= torch.arange(found.shape[1]) <= last
        _refuse(name, found, wrong, "host_rows has another value there")


def _check_queries(tokens: int, cu_seqlens_q: Tensor, mask: Tensor | None) -> None:
    """Raise `ValueError` unless `cu_seqlens_q` rises from 0 to the query tokens. O(rows)."""
    wrong = torch.zeros_like(cu_seqlens_q, dtype=torch.bool)
    wrong[0] |= cu_seqlens_q[0] != 0
    wrong[-1] |= cu_seqlens_q[-1] != tokens
    bound = f"must rise from 0 to the {tokens} tokens of query"
    _refuse("cu_seqlens_q", cu_seqlens_q, wrong, bound)
    wrong[1:] = cu_seqlens_q.diff() < 0
    _refuse("cu_seqlens_q", cu_seqlens_q, wrong, "expected at least that of the row before")
    longest = int(cu_seqlens_q.diff().max()) if len(cu_seqlens_q) > 1 else 0
    if mask is not None and mask.shape[2] < longest:
        raise short_mask(mask, longest)


def check_copies(copies: Tensor, storage: Tensor) -> None:
    """Raise `ValueError` for an unknown block or a destination of two pairs. O(n log n)."""
    num_blocks = storage.shape[0]
    bound = f"the storage has blocks 0 to {num_blocks - 1}"
    kept = (copies >= 0).all(1)
    _refuse("copies", copies, (copies >= num_blocks) & kept[:, None], bound)
    twice = _twice(copies[:, 1].where(kept, -1))
    if twice is not None:
        first, second = twice
        raise ValueError(
            f"copies[{first}] and copies[{second}] both write block {int(copies[first, 1])}; "
            "give every block one source"
        )


def _refuse(name: str, tensor: Tensor, wrong: Tensor, bound: str) -> None:
    """Raise `ValueError` for the first element that is `wrong`."""
    if not bool(wrong.any()):
        return
    place = wrong.nonzero()[0].tolist()
    value = tensor[tuple(place)].item()
    raise ValueError(f"{name}[{', '.join(map(str, place))}]={value}: {bound}")


def _twice(indices: Tensor) -> tuple[int, int] | None:
    """Return two places in `indices` [n] with equal values of at least 0, or None."""
    ordered, order = indices.sort(stable=True)
    same = ((ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)).nonzero()
    if len(same) == 0:
        return None
    first = int(same[0])
    return int(order[first]), int(order[first + 1])
