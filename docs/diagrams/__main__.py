"""Draw the diagrams of the documentation into docs/images.

python docs/diagrams            # write every file
python docs/diagrams --check    # exit with 1 if a file is not what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path

from figures import FIGURES

IMAGES = Path(__file__).resolve().parents[1] / "images"


def main() -> int:
    """Write or check every figure and return the exit code."""
    stale = []
    for name, draw in FIGURES.items():
        path, drawing = IMAGES / f"{name}.svg", draw().svg()
        if "--check" not in sys.argv:
            path.write_text(drawing, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != drawing:
            stale.append(path.name)
    if stale:
        print(f"not current: {', '.join(stale)}. Run `make diagrams`.")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
