"""Public entry points of the kernels: operations on paged tensors of any framework.

    from kvpager.ops import append_kv, copy_blocks, gather_kv, paged_attention

Each runs a native kernel if the device has one, or else a reference kernel in plain torch with the
same results. `kvpager env` shows the choice, docs/kernels.md compares the kernels.
"""

from kvpager.kernels.append_kv import append, append_kv
from kvpager.kernels.attention_args import AttentionArgs
from kvpager.kernels.copy_blocks import copy_blocks
from kvpager.kernels.gather_kv import gather_kv
from kvpager.kernels.host_rows import HostRows
from kvpager.kernels.layer_caches import LayerCaches
from kvpager.kernels.paged_attention import attend, paged_attention

__all__ = [
    "AttentionArgs",
    "HostRows",
    "LayerCaches",
    "append",
    "append_kv",
    "attend",
    "copy_blocks",
    "gather_kv",
    "paged_attention",
]
