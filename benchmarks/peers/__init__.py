"""kvpager's peers on this machine, where they are installed: one module each.

A module has `NAME`, `available()` - None, or why the peer cannot be measured here - and
`figures()`, which yields (name, value, unit). `python -m benchmarks.peers` prints them all.
"""

MODULES = ("vllm_blocks", "sglang_pages", "transformers_blocks", "nano_vllm_blocks")
