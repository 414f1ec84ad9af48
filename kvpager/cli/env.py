"""The command `kvpager env`: what a bug report needs to know."""

from __future__ import annotations

from kvpager.cli.errors import one_line_errors
from kvpager.cli.files import check_writable, write_json
from kvpager.cli.options import JsonFile


def env(json_file: JsonFile = None) -> None:
    """Show versions, devices, and which kernels run where and why."""
    from kvpager.bench import environment

    with one_line_errors():
        check_writable(json_file)
        found = environment.collect()
    write_json(json_file, found)
    if json_file != "-":
        environment.show(found)
