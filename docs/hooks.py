"""Hooks of mkdocs: what mkdocstrings reads, and links that stay inside the site.

Pages link files of the repository, which works in a checkout as it stands. In the site, README.md
is the front page, SECURITY.md and CHANGELOG.md are pages, and each linked source file is a page
that shows it.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = {
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"\]\(([^()\s#:]+)(#[^()\s]*)?\)")
LEXERS = {".cpp": "cpp", ".h": "cpp", ".ipynb": "json", ".jsonl": "json", ".py": "python"}


def on_startup(**_: object) -> None:
    """Copy the package for mkdocstrings, which finds no module in a folder without __init__.py."""
    copy = ROOT / "build" / "api" / "kvpager"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(
        ROOT / "kvpager", copy, ignore=shutil.ignore_patterns("__pycache__", "tiny_llama")
    )
    for folder in (copy / "kernels", copy / "integrations"):
        (folder / "__init__.py").touch()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the repository's root, and a page for each linked source file."""
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text("utf-8")))
    pages = {
        _in_site(file.src_uri, address) or ""
        for file in files.documentation_pages()
        for address, _ in LINK.findall(file.content_string)
    }
    for page in sorted(page for page in pages if page.startswith("source/")):
        content = _source_page(page.removeprefix("source/").removesuffix(".md"))
        level = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, page, content=content, inclusion=level))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point each relative link at the page of the file that it names."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown

    def in_site(match: re.Match[str]) -> str:
        there = _in_site(here, match[1])
        if there is None:
            return match[0]
        return f"]({posixpath.relpath(there, posixpath.dirname(here) or '.')}{match[2] or ''})"

    return LINK.sub(in_site, markdown)


def _in_site(page: str, address: str) -> str | None:
    """Return the page or image that a link leads to, None where there is no such file."""
    folder = "" if page in ROOT_PAGES.values() else f"docs/{posixpath.dirname(page)}"
    path = posixpath.normpath(posixpath.join(folder, address))
    if path in ROOT_PAGES:
        return ROOT_PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}.md" if (ROOT / path).is_file() else None


def _source_page(path: str) -> str:
    """Return a page that shows a file, which the search leaves out."""
    lexer = LEXERS.get(posixpath.splitext(path)[1], "text")
    text = (ROOT / path).read_text("utf-8")
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n``````{lexer}\n{text}\n``````\n"
