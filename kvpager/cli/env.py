"""The command `kvpager env`: the facts that a bug report needs."""

from __future__ import annotations

from kvpager.cli.files import check_writable, write_json
from kvpager.cli.options import JsonFile


def env(json_file: JsonFile = None) -> None:
    """Show versions, devices, and the kernel that each operation uses."""
    from kvpager.bench import environment

    check_writable(json_file)
    found = environment.collect()
    write_json(json_file, found)
    if json_file != "-":
        environment.show(found)
