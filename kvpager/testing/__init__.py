"""Test tools for kvpager and for code built on it, with a tiny language model.

`tiny_llama` is a byte-level Llama of 1.14 million parameters trained on Python's own
documentation by `examples/train_tiny_llama.py`; it loads without a network.

For any block manager behind a small adapter:

    properties          the properties, and the members of an adapter
    conformance         a pytest suite and a state machine that check them
    results             the same checks, with the results as data

For any store of cached blocks:

    stores              a pytest suite of the properties of a `BlockStore`

For kvpager's block managers:

    simulator           seeded random histories of kvpager's whole interface, shrunk when they fail
    memory              a miniature data plane, one integer for each token slot
    mutants             mutation tests: known bugs that these tools must detect

`conformance` and `strategies` need Hypothesis; `conformance` and `stores` need pytest. Nothing here
needs torch.
"""

from __future__ import annotations

from pathlib import Path


def tiny_llama_path() -> Path:
    """Return the folder of the bundled byte-level Llama, for `from_pretrained`. O(1).

    >>> tiny_llama_path().name
    'tiny_llama'
    """
    return Path(__file__).parent / "tiny_llama"
