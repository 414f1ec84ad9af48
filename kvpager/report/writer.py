"""Write a report: the data of a recording, packed into the page."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path

from kvpager.report.data import packed_data
from kvpager.report.model import Run

BYTES_MAX = 500_000  # of a report
LIVES_MAX = 600
SCRIPTS = ("data", "page", "map", "sides", "charts", "tree", "life", "main")


def write_report(recording: str | Path, output: str | Path) -> int:
    """Write the report of a recording as one HTML file of at most 500 kB; return its bytes.

    The page loads nothing: its policy forbids every request, and its text cannot become markup.
    O(recording + frames * blocks).

    Raises: `OSError`; `ValueError`, which names the line, for a bad or an empty recording.
    """
    html = report(Path(recording))
    Path(output).write_bytes(html)
    return len(html)


def report(recording: Path) -> bytes:
    """Return the page of a recording. O(recording + frames * blocks). Raises: as `write_report`."""
    run = Run(recording)
    pool, reserved = run.reserve()
    stride, num_lives = 1, LIVES_MAX
    while True:
        html = page(packed_data(run, pool, reserved, stride, num_lives))
        if len(html) <= BYTES_MAX or len(run.moments) <= 2 * stride:
            return html
        stride, num_lives = stride + 1, num_lives // 2  # fewer steps


def page(data: bytes) -> bytes:
    """Return the page around packed data. O(data)."""
    style = _asset("style.css")
    scripts = "\n".join(_asset(f"{name}.js") for name in SCRIPTS)
    script = f'(() => {{\n"use strict";\n{scripts}}})();'
    parts = {
        "POLICY": _policy(style, script),
        "STYLE": style,
        "SCRIPT": script,
        # Base64 has no character that ends an element, whatever the recording says.
        "DATA": base64.b64encode(data).decode(),
    }
    html = _asset("page.html")
    for name, text in parts.items():
        before, after = html.split(f"@{name}@")
        html = before + text + after
    return html.encode()


def _asset(name: str) -> str:
    return resources.files("kvpager.report").joinpath("page", name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Return a policy that allows this style and this script, and no request."""
    style, script = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    )
    return (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
