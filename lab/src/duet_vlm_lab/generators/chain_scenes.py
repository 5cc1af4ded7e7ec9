"""Layouts of ``tiny-chain``: things on a grid of 4 x 4 cells, a thing in every one, so that there are neighbours to go
to.

The things, their tags and the drawing are those of :mod:`duet_vlm.evaluation.tiny.scenes`; a layout is a pure function
of (split, seed, index, side).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from duet_vlm.evaluation.tiny.assets import WORDS
from duet_vlm.evaluation.tiny.scenes import (
    CELL,
    COLORS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    extent,
    generator,
    put,
    tag_size,
)

SIDE = 4  # cells in a row and in a column
CELLS = tuple(f"{column}{row}" for row in range(1, SIDE + 1) for column in "abcd"[:SIDE])  # their names, row by row
ROOM = 56  # pixels of a cell: four patches
BOX = ROOM - CELL  # what a thing and its tag may fill: things of two cells never touch
# by ``side``, added to the purpose of random numbers: these pictures share none with the others
STREAMS = {4: 20, 3: 30, 2: 40}
TAGS = (0.1, 0.45, 0.45)  # none, digit, word


@dataclass(frozen=True)
class GridScene(Scene):
    """A scene whose things stand in cells; ``cells`` gives (row, column) of each thing, ``side`` how many are in a row."""

    cells: tuple[tuple[int, int], ...] = ()
    side: int = SIDE

    def generator(self, purpose: int) -> np.random.Generator:
        return generator(self.split, self.seed, self.index, purpose + STREAMS[self.side])


def _shapes(side: int, rng: np.random.Generator) -> tuple[list[int], int, int | None]:
    """Shapes of the things (some once, some repeated, at least one not at all), the answer for counting and the shape
    counted."""
    count, order = int(rng.integers(3 if side == 2 else 5)), [int(s) for s in rng.permutation(len(SHAPES))]
    first = count if count >= 2 else int(rng.integers(2, 5))
    if side == 2:
        single, sizes = (2, (2,)) if count == 2 else (4, ())
    elif side == 3:
        single, sizes = 5, (first, 4 - first)
    else:
        second = int(rng.integers(3, 8 - first))
        single, sizes = 6, (first, second, 10 - first - second)
    shapes = order[:single] + [shape for shape, n in zip(order[single:], sizes, strict=False) for _ in range(n)]
    return shapes, count, order[single] if count >= 2 else None


def _colors(n: int, rng: np.random.Generator) -> list[int]:
    """Colours of ``n`` things, none more than twice, so that "the same color" leads to one other thing."""
    pairs = int(rng.integers(max(0, n - len(COLORS)), n // 2 + 1))
    order = rng.permutation(len(COLORS))[: n - pairs]
    return [int(c) for c in rng.permutation([*order, *order[:pairs]])]


def thing_in(
    cell: tuple[int, int], shape: int, color: int, kind: int, split: str, rng: np.random.Generator
) -> SceneObject:
    """A thing with its tag (kind 0 none, 1 digit, 2 word) somewhere in a cell."""
    value = int(rng.integers(10 if kind == 1 else len(WORDS)))
    below = bool(rng.random() < 0.5)
    tag = tag_size(kind, value)
    if kind == 2 and SIZES[0] + tag[0] > BOX:
        below = True
    fitting = [size for size in SIZES if max(extent(size, tag, below)) <= BOX]
    size = fitting[int(rng.integers(len(fitting)))]
    width, height = extent(size, tag, below)
    x, y = (
        ROOM * at + CELL * int(rng.integers((BOX - n) // CELL + 1)) for at, n in ((cell[1], width), (cell[0], height))
    )
    return put(x, y, below, (shape, color, size), (kind, value), split, rng)


def grid_scene(split: str, seed: int, index: int, side: int = SIDE) -> GridScene:
    """The layout number ``index`` of a stream: a thing in each of the 16 cells.

    Parameters
    ----------
    split : str
        "train", "validation" or "test".
    seed, index : int
        Stream and position in it.
    side : int
        2 or 3: only a block of so many cells in a row and in a column is filled, somewhere. The first lessons of
        training.
    """
    rng = generator(split, seed, index, STREAMS[side])
    shapes, count, group = _shapes(side, rng)
    top, left = (int(n) for n in rng.integers(SIDE - side + 1, size=2))
    cells = [(top + int(c) // side, left + int(c) % side) for c in rng.permutation(side * side)]
    colors = _colors(len(shapes), rng)
    kinds = rng.choice(3, len(shapes), p=TAGS)
    things = tuple(
        thing_in(c, s, k, int(t), split, rng) for c, s, k, t in zip(cells, shapes, colors, kinds, strict=True)
    )
    return GridScene(split, seed, index, things, count, group, cells=tuple(cells), side=side)
