"""Take the picture of the report of `kvpager demo` for the README and the guide.

python docs/diagrams/pictures.py build/demo.html    # needs playwright and Chromium
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).resolve().parents[1] / "images"
WIDTH = 1120


def main(report: Path) -> int:
    """Write report.png; return the exit code."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        print("make pictures: no chromium; `make setup-services` installs it", file=sys.stderr)
        return 1
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        size = {"width": WIDTH, "height": 900}
        page = browser.new_page(viewport=size, device_scale_factor=1.25)
        page.goto(report.resolve().as_uri())
        page.locator("html[data-ready=yes]").wait_for()
        take(page, IMAGES / "report.png")
        browser.close()
    return 0


def take(page: Any, file: Path) -> None:
    """Take the comparison: from the headline to the legend of the maps."""
    page.locator("#player").evaluate("player => player.remove()")
    box = page.locator("#legend").bounding_box()
    size = {"width": WIDTH, "height": box["y"] + box["height"] + 20}
    page.screenshot(path=file, full_page=True, clip={"x": 0, "y": 0, **size})


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
