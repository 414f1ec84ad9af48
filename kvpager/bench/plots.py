"""What all plots share: series that differ without colour, a title with a subtitle, saving."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Dark enough to print, and each with its own line and marker.
_LOOKS = (
    ("tab:blue", "-", "o"),
    ("tab:orange", "--", "s"),
    ("tab:green", "-.", "^"),
    ("tab:red", ":", "D"),
    ("tab:purple", (0, (5, 1, 1, 1, 1, 1)), "v"),
    ("tab:brown", (0, (1, 1)), "P"),
    ("tab:grey", (0, (8, 2)), "X"),
    ("black", (0, (3, 3)), "*"),
)


def looks() -> Iterator[dict[str, Any]]:
    """Yield the arguments of `Axes.plot` for series after series, without end."""
    while True:
        for colour, line, marker in _LOOKS:
            yield {"color": colour, "linestyle": line, "marker": marker, "markersize": 4}


@contextlib.contextmanager
def saved(file: str | Path, inches: tuple[float, float]) -> Iterator[Any]:
    """Yield a matplotlib figure to draw on, then write it as .svg or .png. Raises `OSError`.

    The same figures give the same file: text stays text, and nothing depends on chance or date.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kvpager"}):
        figure = Figure(figsize=inches, layout="constrained")
        yield figure
        metadata = {"Date": None} if Path(file).suffix == ".svg" else None
        figure.savefig(file, metadata=metadata)


def titles(figure: Any, title: str, subtitle: str) -> None:
    """Set the title, and under it a smaller line about hardware and model. O(1)."""
    figure.suptitle(title, fontsize="medium")
    figure.axes[0].set_title(subtitle, fontsize="small", color="0.3")
