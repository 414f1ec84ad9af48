"""The kernels' one face: operations on paged tensors, for any framework's own blocks.

    from kvpager.ops import append_kv, copy_blocks, gather_kv, paged_attention

Each runs a native kernel where there is one for the device, and else plain torch operations that
compute the same (`kvpager env` shows which). docs/kernels.md compares them.
"""

from kvpager.kernels.append_kv import append_kv
from kvpager.kernels.attention_args import AttentionArgs
from kvpager.kernels.copy_blocks import copy_blocks
from kvpager.kernels.gather_kv import gather_kv
from kvpager.kernels.host_rows import HostRows
from kvpager.kernels.paged_attention import attend, paged_attention

__all__ = [
    "AttentionArgs",
    "HostRows",
    "append_kv",
    "attend",
    "copy_blocks",
    "gather_kv",
    "paged_attention",
]
