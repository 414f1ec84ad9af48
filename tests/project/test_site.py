"""The documentation builds as a site that needs no network and shows every public name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvpager

ROOT = Path(__file__).resolve().parents[2]
# What a browser fetches by itself. A link that a reader may click is none of these.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=["']?(https?:|//)[^>]*"""
    r"""|<link\b(?![^>]*rel=["']?(?:canonical|next|prev))[^>]*\bhref=["']?(https?:|//)[^>]*"""
)
LOADED_BY_CSS = re.compile(r"""@import[^;]*(?:https?:|//)[^;]*|url\(["']?(?:https?:)?//[^)]*""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as `make docs` does, warnings being errors and the network being out."""
    folder = tmp_path_factory.mktemp("site")
    program = (
        "import socket, sys\n"
        "def refuse(*_): raise OSError('the build needs no network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from mkdocs.__main__ import cli\n"
        f"cli(['build', '--strict', '--site-dir', {str(folder)!r}])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.slow
def test_no_page_of_the_site_loads_from_a_network(site: Path) -> None:
    pages, sheets = list(site.rglob("*.html")), list(site.rglob("*.css"))
    assert len(pages) > 30
    loaded = [f"{page.name}: {m[0]}" for page in pages for m in LOADED.finditer(page.read_text())]
    loaded += [
        f"{css.name}: {m[0]}" for css in sheets for m in LOADED_BY_CSS.finditer(css.read_text())
    ]
    assert loaded == []


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site: Path) -> None:
    text = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    missing = [
        name
        for name in kvpager.__all__
        if re.search(rf'id="kvpager\.(errors\.)?{name}"', text) is None
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("html", "loads"),
    [
        ('<script src="https://cdn.example/x.js"></script>', True),
        ('<link rel="stylesheet" href="https://fonts.example/css">', True),
        ('<link rel="canonical" href="https://example.org/">', False),
        ('<a href="https://arxiv.org/abs/2508.09442">paper</a>', False),
        ('<script src="assets/x.js"></script>', False),
    ],
)
def test_the_search_for_loaded_addresses_knows_links_apart(html: str, loads: bool) -> None:
    assert bool(LOADED.search(html)) is loads


def test_the_diagrams_are_current() -> None:
    result = subprocess.run(
        [sys.executable, "docs/diagrams", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
