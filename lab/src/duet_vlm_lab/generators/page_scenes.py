"""Layouts of ``tiny-page``: a page of 2 x 2 quarters, each as large as a picture of the tiny models and with things on
its 4 x 4 cells.

The things, their tags and the drawing are those of :mod:`duet_vlm.evaluation.tiny.scenes`; a layout is a pure function
of (split, seed, index).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from duet_vlm.evaluation.tiny.render import render
from duet_vlm.evaluation.tiny.scenes import COLORS, GRID, SHAPES, SceneObject, generator
from duet_vlm_lab.generators.chain_scenes import SIDE, TAGS, GridScene, thing_in

ACROSS = 2  # quarters in a row and in a column
QUARTERS = ACROSS * ACROSS
FILLED = 10  # things on a quarter
SINGLE, FILLERS = 5, 3  # shapes that are there once; shapes of whatever is left
STREAM, PAGE_STREAM = 50, 60  # added to the purpose of random numbers: pages share none with other pictures
WIDE = ACROSS * GRID  # patches in a row of the page
OVERVIEW = GRID * GRID
LINE = WIDE + 1  # rows of the packed page for one row of patches: these and a newline
ROWS = OVERVIEW + WIDE * LINE  # what the decoder is given


@dataclass(frozen=True)
class Quarter(GridScene):
    """A quarter of a page."""

    def generator(self, purpose: int) -> np.random.Generator:
        return generator(self.split, self.seed, self.index, purpose + STREAM)


@dataclass(frozen=True)
class ScenePage:
    """Four quarters, row by row. ``count`` is the answer that count questions should get; ``group``: the shape to
    count, if it repeats."""

    split: str
    seed: int
    index: int
    quarters: tuple[Quarter, ...]
    count: int
    group: int | None

    @property
    def things(self) -> tuple[SceneObject, ...]:
        """Everything on the page, quarter by quarter; places are those in the quarter."""
        return tuple(t for quarter in self.quarters for t in quarter.things)

    @property
    def where(self) -> tuple[int, ...]:
        """The quarter of each thing."""
        return tuple(number for number, quarter in enumerate(self.quarters) for _ in quarter.things)

    def generator(self, purpose: int) -> np.random.Generator:
        """Random numbers of this page."""
        return generator(self.split, self.seed, self.index, purpose + PAGE_STREAM)


def _shapes(rng: np.random.Generator) -> tuple[list[int], int, int | None]:
    """Shapes of the things: some once, one as often as is asked, the rest of three kinds, at least one not at all."""
    count, order = int(rng.integers(5)), [int(s) for s in rng.permutation(len(SHAPES))]
    many = count if count >= 2 else int(rng.integers(2, 5))
    rest = rng.integers(SINGLE + 1, SINGLE + 1 + FILLERS, FILLED * QUARTERS - SINGLE - many)
    return (
        [*order[:SINGLE], *many * [order[SINGLE]], *(order[i] for i in rest)],
        count,
        order[SINGLE] if count >= 2 else None,
    )


def page(split: str, seed: int, index: int) -> ScenePage:
    """The layout number ``index`` of a stream.

    Parameters
    ----------
    split : str
        "train", "validation" or "test".
    seed, index : int
        Stream and position in it.
    """
    rng = generator(split, seed, index, PAGE_STREAM)
    shapes, count, group = _shapes(rng)
    quarters = []
    for number, mine in enumerate(rng.permutation(shapes).reshape(QUARTERS, FILLED)):
        cells = [(int(c) // SIDE, int(c) % SIDE) for c in rng.permutation(SIDE * SIDE)[:FILLED]]
        looks = zip(cells, mine, rng.integers(len(COLORS), size=FILLED), rng.choice(3, FILLED, p=TAGS), strict=True)
        things = tuple(
            thing_in(cell, int(shape), int(color), int(tag), split, rng) for cell, shape, color, tag in looks
        )
        quarters.append(Quarter(split, seed, QUARTERS * index + number, things, 0, None, cells=tuple(cells)))
    return ScenePage(split, seed, index, tuple(quarters), count, group)


def render_page(drawn: ScenePage) -> np.ndarray:
    """Draw a page, (448, 448, 3) uint8."""
    seen = [render(quarter) for quarter in drawn.quarters]
    return np.concatenate([np.concatenate(seen[i : i + ACROSS], 1) for i in range(0, QUARTERS, ACROSS)])


def packed_rows(quarter: int) -> np.ndarray:
    """Positions of the patches of a quarter among the ``ROWS`` rows that LLaVA-NeXT packs: (256,) int, row by row of
    the quarter."""
    down, along = (n * GRID for n in divmod(quarter, ACROSS))
    at = np.arange(GRID)
    return (OVERVIEW + (down + at)[:, None] * LINE + along + at).ravel()


NEWLINES = OVERVIEW + np.arange(1, WIDE + 1) * LINE - 1  # rows that show nothing
