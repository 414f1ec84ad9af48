"""Traffic compiles few variants of the Triton kernels, and none after an engine's warm-up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")


def variants(what: str) -> Any:
    """Count with `kernel_variants.py`, in a process without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    script = [sys.executable, "-m", "tests.support.kernel_variants", what]
    ran = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.slow
def test_copies_of_any_size_and_offset_have_few_variants() -> None:
    assert variants("copies") == {
        "append_vectors": 1,
        "gather_vectors": 1,
        "copy_runs": 4,  # up to 1, 8, 64 and 256 pairs
        "stage_runs": 2,  # into the buffer and out of it
        "step_rows": 1,
        "drop_rows": 1,
    }


@pytest.mark.slow
def test_no_request_waits_for_a_compiler_after_warm_up() -> None:
    pytest.importorskip("transformers")
    found = variants("engine")
    assert {"attend_items", "merge_parts", "append_vectors", "copy_runs"} <= set(found)
    assert {name: after for name, (_, after) in found.items()} == {
        name: before for name, (before, _) in found.items()
    }
    assert found["attend_items"][0] <= 8  # of layers with a window and without
