"""Recordings of a run: which blocks each request held at each step, as JSON lines.

    recorder ──▶ writer ──▶ run.jsonl ──▶ reader ──▶ replay

`format` describes the lines. Nothing here imports torch. A recording holds numbers: no token ids,
texts, request ids, namespaces or paths.
"""
