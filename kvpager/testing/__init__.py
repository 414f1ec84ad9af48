"""What tests of kvpager, and of code built on it, can use: a real, tiny language model.

`tiny_llama` is a byte-level Llama of 1.14 million parameters trained on Python's own
documentation by `examples/train_tiny_llama.py`; it loads without a network.
"""

from __future__ import annotations

from pathlib import Path


def tiny_llama_path() -> Path:
    """Folder of the bundled byte-level Llama, loadable by `AutoModelForCausalLM.from_pretrained`.

    O(1).

    >>> tiny_llama_path().name
    'tiny_llama'
    """
    return Path(__file__).parent / "tiny_llama"
