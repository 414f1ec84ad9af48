"""What tests of kvpager, and of code built on it, can use: a real, tiny language model.

`tiny_llama` is a byte-level Llama of 1.14 million parameters trained on Python's own
documentation by `examples/train_tiny_llama.py`; it loads without a network.

For block managers, kvpager's and anybody else's:

    conformance    a pytest suite and a state machine for any manager behind a small adapter
    findings       the same as data, a verdict for each promise
    reference      a manager in plain Python, the specification of the verbs
    memory         the data plane in miniature, one integer for each token slot
    simulator      seeded random histories of kvpager's whole interface, shrunk when they fail
    simulation     random traffic through a scheduler and a model in miniature
    machine        the same operations as a Hypothesis state machine
    isolation      paired probes of what namespaces see of each other
    mutants        planted bugs, to see that all this notices them

`conformance`, `machine` and `strategies` need Hypothesis, `conformance` and `machine` pytest too;
nothing here needs torch.
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
