"""The colours of every picture of the project: plots, reports, patches on photographs.

Series and groups stay apart for eyes without one kind of cone (a test measures it), and each is also told by something
else: a marker, a dash, a number. The heat scale grows lighter all the way, so that it can be read without any colour.
"""

from __future__ import annotations

from typing import Any

Color = tuple[int, int, int]

# what a page replaces by its own variables, so that one SVG serves light and dark; no other colour of a plot may equal
# one of these
INK, MUTED, GRID, GROUND = "#1c2127", "#5a626c", "#dfe3e8", "#fefefd"
COLOURS = ("#000fff", "#b4870f", "#4b9687", "#872d00", "#d24bc3", "#1e4b3c", "#b44bff", "#87965a", "#690f69", "#4b0096")
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", GROUND: "ground"} | {
    colour: f"series-{i}" for i, colour in enumerate(COLOURS)
}
# on photographs; numbers tell groups of one apart
GROUPS = ("#1e69a5", "#ffb400", "#3ce1b4", "#ff5aff", "#e13c0f", "#a500ff", "#a5d278", "#f0c3ff")
HEAT = ("#14163c", "#26547c", "#3c9682", "#aac850", "#fff078")  # from the least to the most

RC: dict[str, Any] = {  # of matplotlib, for every plot
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a label is no formula, whatever it holds
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "figure.facecolor": GROUND,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "hatch.color": MUTED,
    "hatch.linewidth": 0.5,
    "path.simplify": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "duet-vlm",
}


def numbers(colour: str) -> Color:
    """``"#1e69a5"`` as three numbers of 0 to 255."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def group(number: int) -> Color:
    """The colour of the group with this number, counted from 0."""
    return numbers(GROUPS[number % len(GROUPS)])


def heat(share: float) -> Color:
    """The colour of a value in [0, 1] on the heat scale."""
    position = min(max(share, 0.0), 1.0) * (len(HEAT) - 1)
    start = min(int(position), len(HEAT) - 2)
    low, high = numbers(HEAT[start]), numbers(HEAT[start + 1])
    red, green, blue = (round(a + (b - a) * (position - start)) for a, b in zip(low, high, strict=True))
    return red, green, blue
