"""Layouts of ``tiny-chain``: things on a grid of 4 x 4 cells, so that every thing has neighbours to go to.

The things, their tags and the drawing are those of :mod:`duet_vlm.tiny.scenes`; a layout is a pure function of (split, seed, index, few).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .assets import DIGIT_SIZE, DIGIT_VARIANTS, WORD_HEIGHT, WORD_VARIANTS, WORDS, word_width
from .scenes import CELL, COLORS, SHAPES, SIZES, Scene, Tag, Thing, _variant, generator

SIDE = 4  # cells in a row and in a column
ROOM = 56  # pixels of a cell: four patches
BOX = ROOM - CELL  # what a thing and its tag may fill: things of two cells never touch
STREAM, FEW_STREAM = 20, 30  # added to the purpose of random numbers: these pictures share none with the others
TAGS = (0.15, 0.45, 0.4)  # none, digit, word


@dataclass(frozen=True)
class GridScene(Scene):
    """A scene whose things stand in cells; ``cells`` gives (row, column) of each thing. ``few`` are the first lessons of training."""

    cells: tuple[tuple[int, int], ...] = ()
    few: bool = False

    def generator(self, purpose: int) -> np.random.Generator:
        return generator(self.split, self.seed, self.index, purpose + (FEW_STREAM if self.few else STREAM))


def _cells(n: int, few: bool, rng: np.random.Generator) -> list[tuple[int, int]]:
    """``n`` cells in random order; with ``few`` they fill a block, so that neighbours are not rare."""
    if not few:
        return [divmod(int(c), SIDE) for c in rng.permutation(SIDE * SIDE)[:n]]
    rows, columns = (2, 3) if rng.random() < 0.5 else (3, 2)
    top, left = int(rng.integers(SIDE - rows + 1)), int(rng.integers(SIDE - columns + 1))
    block = [(top + r, left + c) for r in range(rows) for c in range(columns)]
    return [block[int(i)] for i in rng.permutation(len(block))[:n]]


def _colors(n: int, rng: np.random.Generator) -> list[int]:
    """Colours of ``n`` things: as many as possible in pairs, so that "the same color" leads to one other thing."""
    pairs = int(rng.integers(max(0, n - len(COLORS)), n // 2 + 1))
    order = rng.permutation(len(COLORS))[: n - pairs]
    return [int(c) for c in rng.permutation([*order, *order[:pairs]])]


def _thing(cell: tuple[int, int], shape: int, color: int, kind: int, split: str, rng: np.random.Generator) -> Thing:
    """A thing with its tag (kind 0 none, 1 digit, 2 word) somewhere in a cell."""
    value = int(rng.integers(10 if kind == 1 else len(WORDS)))
    below = bool(rng.random() < 0.5)
    tag_w, tag_h = ((0, 0), (DIGIT_SIZE, DIGIT_SIZE), (word_width(WORDS[value]), WORD_HEIGHT))[kind]
    if kind == 2 and SIZES[0] + tag_w > BOX:
        below = True
    room = BOX - ((tag_h if below else tag_w) if kind else 0)
    fitting = [s for s in SIZES if s <= room]
    size = fitting[int(rng.integers(len(fitting)))]
    width, height = (max(size, tag_w), size + tag_h) if below else (size + tag_w, max(size, tag_h))
    x, y = (
        ROOM * at + CELL * int(rng.integers((BOX - extent) // CELL + 1)) for at, extent in ((cell[1], width), (cell[0], height))
    )

    def middle(space: int) -> int:
        return space // (2 * CELL) * CELL

    if below:
        body, corner = (x + middle(width - size), y), (x + middle(width - tag_w), y + size)
    else:
        body, corner = (x, y + middle(height - size)), (x + size, y + middle(height - tag_h))
    if not kind:
        return Thing(shape, color, size, *body)
    drawn = _variant(rng, DIGIT_VARIANTS if kind == 1 else WORD_VARIANTS, split)
    return Thing(shape, color, size, *body, Tag("digit" if kind == 1 else "word", value, drawn, *corner, tag_w, tag_h))


def grid_scene(split: str, seed: int, index: int, few: bool = False) -> GridScene:
    """The layout number ``index`` of a stream.

    Parameters
    ----------
    split : str
        "train", "validation" or "test".
    seed, index : int
        Stream and position in it.
    few : bool
        Five or six things in a block instead of eight to thirteen anywhere: the first lessons of training.
    """
    rng = generator(split, seed, index, FEW_STREAM if few else STREAM)
    count = int(rng.integers(0, 3 if few else 5))
    order = [int(s) for s in rng.permutation(len(SHAPES))]
    single = (4 if few else 8) if count >= 2 else (6 if few else 9)
    group = order[single] if count >= 2 else None
    shapes = order[:single] + [order[single]] * (count if count >= 2 else 0)
    cells = _cells(len(shapes), few, rng)
    colors = _colors(len(shapes), rng)
    kinds = rng.choice(3, len(shapes), p=TAGS)
    things = tuple(_thing(c, s, k, int(t), split, rng) for c, s, k, t in zip(cells, shapes, colors, kinds, strict=True))
    return GridScene(split, seed, index, things, count, group, cells=tuple(cells), few=few)
