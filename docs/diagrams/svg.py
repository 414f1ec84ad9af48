"""A small SVG canvas: boxes, words and arrows, written as plain text that is equal on every run."""

from __future__ import annotations

from html import escape

INK, LINE, PAPER, MUTED = "#1f2937", "#6b7280", "#ffffff", "#6b7280"
BLUE, GREEN, AMBER, RED, GREY = "#bfdbfe", "#bbf7d0", "#fde68a", "#fecaca", "#e5e7eb"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


class Canvas:
    """A drawing of a fixed size on a white card, so that it reads on a dark page, too."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" font-family="{FONT}" font-size="13">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0L10 5L0 10z" fill="{LINE}"/></marker>'
            "</defs>",
            f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>',
        ]

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        text: str = "",
        *,
        fill: str = PAPER,
        dashed: bool = False,
        size: int = 13,
    ) -> None:
        """Draw a rounded rectangle with a centred text, whose lines are separated by newlines."""
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        self._lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" '
            f'fill="{fill}" stroke="{LINE}"{dashes}/>'
        )
        lines = text.split("\n") if text else []
        first = y + height / 2 + size * 0.35 - (len(lines) - 1) * size * 0.65
        for number, line in enumerate(lines):
            self.text(x + width / 2, first + number * size * 1.3, line, anchor="middle", size=size)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "start",
        size: int = 13,
        bold: bool = False,
        colour: str = INK,
    ) -> None:
        """Write one line of text with its baseline at `y`."""
        weight = ' font-weight="600"' if bold else ""
        self._lines.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}"{weight} '
            f'fill="{colour}">{escape(text)}</text>'
        )

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """Draw a line through `points` with a head at its end."""
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._lines.append(
            f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="1.5"'
            f'{dashes} marker-end="url(#head)"/>'
        )

    def cells(
        self, x: float, y: float, words: list[str], *, fill: str, width: float = 44, slots: int = 0
    ) -> None:
        """Draw adjacent cells of one block: empty strings are unused slots, `slots` pads them."""
        words = words + [""] * (slots - len(words))
        for number, word in enumerate(words):
            colour = fill if word else PAPER
            self.box(x + number * width, y, width, 26, word, fill=colour, size=11)

    def svg(self) -> str:
        """Return the whole drawing."""
        return "\n".join([*self._lines, "</svg>", ""])
