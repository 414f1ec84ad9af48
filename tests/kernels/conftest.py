"""What several tests of kernels share."""

from __future__ import annotations

import pytest

from tests.support.kernel_cases import IMPLEMENTATIONS, Kernels


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Kernels:
    return IMPLEMENTATIONS[request.param]
