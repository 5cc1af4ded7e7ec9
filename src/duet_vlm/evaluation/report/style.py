"""Style of series: colour, marker, dash; positions of labels, and labels that cannot disturb a plot."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any

from duet_vlm.viz.colors import COLOURS, INK, MUTED

MARKERS = ("o", "s", "^", "D", "v", "p", "<", ">", "h", "d")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)))
FLOORS = frozenset({"random", "uniform"})  # chance and habit: what a method must beat
ORACLE = "oracle"  # told what is needed; keeps one count throughout, so a method with a schedule may pass it
LONGEST = 48


@dataclass(frozen=True)
class Look:
    """Style of one series.

    Attributes
    ----------
    colour, marker : str
        Colour and marker.
    dash : Any
        Line style of matplotlib.
    width, size : float
        Width of the line, and size of the marker.
    filled : bool
        The marker is filled.
    order : int
        Drawing order.
    """

    colour: str
    marker: str
    dash: Any
    width: float
    size: float
    filled: bool = True
    order: int = 3


def looks(methods: dict[str, str]) -> dict[str, Look]:
    """Style of every label, from its method. References (oracle, baselines) are grey, thin and hollow; methods have
    colour."""
    out, coloured, floors = {}, 0, 0
    for label, method in methods.items():
        if method == ORACLE:
            out[label] = Look(INK, "*", (0, (1, 1.5)), 1.1, 9, filled=False, order=2)
        elif method in FLOORS:
            out[label] = Look(MUTED, MARKERS[floors % len(MARKERS)], (0, (1, 2)), 1.0, 4.5, filled=False, order=2)
            floors += 1
        else:
            dash = DASHES[coloured // len(COLOURS) % len(DASHES)]
            out[label] = Look(COLOURS[coloured % len(COLOURS)], MARKERS[coloured % len(MARKERS)], dash, 1.7, 5.5)
            coloured += 1
    return out


def one_line(text: str) -> str:
    """Text without line breaks and control characters."""
    return " ".join(
        "".join(" " if unicodedata.category(character)[0] in "CZ" else character for character in text).split()
    )


def plain(text: str) -> str:
    """A label as one short line."""
    line = one_line(text)
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def apart(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near as can be to the ``desired`` ones, in their order, at least ``gap`` apart, within [low, high]
    if there is room.

    Neighbours that collide form a block that is centred on the mean of the desired positions of its members.
    """
    blocks: list[tuple[float, list[int]]] = []  # (centre, members)
    for index in sorted(range(len(wanted)), key=lambda i: wanted[i]):
        members, centre = [index], wanted[index]
        while True:
            half = (len(members) - 1) * gap / 2
            centre = max(low + half, min(centre, high - half))
            if not blocks or blocks[-1][0] + (len(blocks[-1][1]) - 1) * gap / 2 + gap <= centre - half + 1e-12:
                break
            members = blocks.pop()[1] + members
            half = (len(members) - 1) * gap / 2
            centre = sum(wanted[i] for i in members) / len(members)
        blocks.append((centre, members))
    out = [0.0] * len(wanted)
    for centre, members in blocks:
        for number, index in enumerate(members):
            out[index] = centre + (number - (len(members) - 1) / 2) * gap
    return out
