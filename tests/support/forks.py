"""What programs of tests do in a forked process, and what engines refuse there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable

import pytest

from kvpager.errors import EngineClosed


def in_a_fork(check: Callable[[], object], is_multiprocessing: bool = False) -> None:
    """Run `check` in a child; it ends as programs do, so that handlers of atexit run as well."""
    if is_multiprocessing:
        child = multiprocessing.get_context("fork").Process(target=check)
        child.start()
        child.join(60)
        assert child.exitcode == 0, child.exitcode
        return
    number = os.fork()
    if not number:
        signal.alarm(50)  # a call that hangs
        try:
            check()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        sys.exit(0)
    assert os.waitpid(number, 0)[1] == 0


def refuses(call: Callable[..., object], *args: object) -> None:
    """Check that a call says that engines do not work in a fork."""
    with pytest.raises(EngineClosed, match="fork"):
        call(*args)
