"""Layouts: which things lie where. A layout is a pure function of (split, seed, index).

The split is part of the random seed, so the train, validation and test streams cannot share a scene. The test stream
also has digit and word bitmaps and background fields of its own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from duet_vlm.evaluation.tiny.assets import (
    DIGIT_SIZE,
    DIGIT_VARIANTS,
    FILE,
    TEST_SHARE,
    WORD_HEIGHT,
    WORD_VARIANTS,
    WORDS,
    word_width,
)

IMAGE_SIZE = 224
PATCH = 14
GRID = IMAGE_SIZE // PATCH  # 16 x 16 patches
CELL = 7  # every corner lies on a multiple of this: half a patch, so a patch is cut in only 4 ways
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "diamond", "ring", "moon", "arrow")
COLORS = {
    "red": (215, 35, 35),
    "green": (40, 165, 55),
    "blue": (40, 75, 220),
    "yellow": (240, 220, 40),
    "purple": (140, 45, 170),
    "orange": (245, 140, 25),
    "cyan": (50, 210, 220),
    "white": (245, 245, 245),
}
COLOR_NAMES = tuple(COLORS)
SIZES = (21, 28, 35, 42)
SPLITS = {"train": 1, "validation": 2, "test": 3}
CROWD = 9  # singly named things on a crowded picture; the tenth shape is left for counting
CROWD_SIZES = (21, 21, 28)
CROWD_STREAM = 10  # added to the purpose of random numbers: crowded pictures share none with the others


@dataclass(frozen=True)
class Tag:
    """A small print beside a thing: ``value`` indexes the digits or ``WORDS``; ``variant`` names the bitmap; box in
    pixels."""

    kind: str  # "digit" or "word"
    value: int
    variant: int
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class SceneObject:
    """A coloured shape at pixel (x, y), ``size`` pixels wide and high."""

    shape: int
    color: int
    size: int
    x: int
    y: int
    tag: Tag | None = None

    @property
    def center(self) -> tuple[float, float]:
        return self.x + self.size / 2, self.y + self.size / 2


@dataclass(frozen=True)
class Scene:
    """Things on one picture. ``count`` is the answer that count questions should get; ``group`` the repeated shape, if
    any."""

    split: str
    seed: int
    index: int
    things: tuple[SceneObject, ...]
    count: int
    group: int | None
    crowded: bool = False

    def generator(self, purpose: int) -> np.random.Generator:
        """Random numbers of this scene, see :func:`generator`."""
        return generator(self.split, self.seed, self.index, purpose + CROWD_STREAM * self.crowded)


def check_split(split: str) -> None:
    """Raise a ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")


def generator(split: str, seed: int, index: int, purpose: int = 0) -> np.random.Generator:
    """Random numbers of one scene; ``purpose`` separates layout (0), picture (1), questions (2) and training noise (3)."""
    check_split(split)
    return np.random.default_rng([SPLITS[split], seed, index, purpose])


@functools.cache
def glyphs() -> dict[str, np.ndarray]:
    """The shipped bitmaps, see :func:`duet_vlm.evaluation.tiny.assets.build`."""
    with np.load(FILE) as z:
        return {name: z[name] for name in z.files}


def _variant(rng: np.random.Generator, total: int, split: str) -> int:
    held_out = round(total * TEST_SHARE)
    return int(rng.integers(total - held_out, total) if split == "test" else rng.integers(total - held_out))


def _place(free: np.ndarray, width: int, height: int, rng: np.random.Generator) -> tuple[int, int] | None:
    """A random free corner in cells, or None. ``free`` (cells, cells) bool; a margin of one cell is kept around the
    box."""
    n = free.shape[0]
    taken = np.zeros((n + 3, n + 3), np.int32)
    taken[2 : n + 2, 2 : n + 2] = ~free
    total = taken.cumsum(0).cumsum(1)  # total[r, c] = taken cells above and left, border of one free cell included
    h, w = height + 2, width + 2
    box = total[h:, w:] - total[:-h, w:] - total[h:, :-w] + total[:-h, :-w]
    spots = np.flatnonzero(box[: n - height + 1, : n - width + 1] == 0)
    if not len(spots):
        return None
    return divmod(int(spots[rng.integers(len(spots))]), n - width + 1)


def tag_size(kind: int, value: int) -> tuple[int, int]:
    """Width and height of a tag in pixels (kind 0 none, 1 digit, 2 word)."""
    return (DIGIT_SIZE, DIGIT_SIZE) if kind == 1 else (word_width(WORDS[value]), WORD_HEIGHT) if kind == 2 else (0, 0)


def extent(size: int, tag: tuple[int, int], below: bool) -> tuple[int, int]:
    """Width and height of a thing with a tag below it or on its right."""
    return (max(size, tag[0]), size + tag[1]) if below else (size + tag[0], max(size, tag[1]))


def put(
    x: int, y: int, below: bool, looks: tuple[int, int, int], tag: tuple[int, int], split: str, rng: np.random.Generator
) -> SceneObject:
    """A thing of ``looks`` (shape, colour, size) with a ``tag`` (kind, value) in the box at (x, y); draws the tag's
    bitmap."""
    (shape, color, size), (kind, value) = looks, tag
    tag_w, tag_h = tag_size(kind, value)
    width, height = extent(size, (tag_w, tag_h), below)

    def middle(space: int) -> int:
        return space // (2 * CELL) * CELL

    if below:
        body, corner = (x + middle(width - size), y), (x + middle(width - tag_w), y + size)
    else:
        body, corner = (x, y + middle(height - size)), (x + size, y + middle(height - tag_h))
    if not kind:
        return SceneObject(shape, color, size, *body)
    variant = _variant(rng, DIGIT_VARIANTS if kind == 1 else WORD_VARIANTS, split)
    return SceneObject(
        shape, color, size, *body, Tag("digit" if kind == 1 else "word", value, variant, *corner, tag_w, tag_h)
    )


def _thing(
    free: np.ndarray, shape: int, color: int, kind: int, sizes: tuple[int, ...], split: str, rng: np.random.Generator
) -> SceneObject | None:
    """Place one thing with its tag (kind 0 none, 1 digit, 2 word) and mark its cells in ``free``."""
    size = sizes[int(rng.integers(len(sizes)))]
    value = int(rng.integers(10 if kind == 1 else len(WORDS)))
    below = bool(rng.random() < 0.5)
    width, height = extent(size, tag_size(kind, value), below)
    spot = _place(free, width // CELL, height // CELL, rng)
    if spot is None:
        return None
    free[spot[0] : spot[0] + height // CELL, spot[1] : spot[1] + width // CELL] = False
    return put(spot[1] * CELL, spot[0] * CELL, below, (shape, color, size), (kind, value), split, rng)


def _plan(dense: bool, rng: np.random.Generator) -> tuple[list[int], list[int], list[int], int, int | None]:
    """Shapes, colours and tag kinds of the things, the answer for counting and the repeated shape."""
    if dense:
        n = 13
        return (
            list(rng.integers(0, 10, n)),
            list(rng.integers(0, 8, n)),
            list(rng.choice(3, n, p=[0.2, 0.45, 0.35])),
            0,
            None,
        )
    count = int(rng.integers(0, 5))
    order = rng.permutation(len(SHAPES))
    single = int(rng.integers(4, 6))
    shapes, group = list(order[:single]), None
    if count >= 2:
        group = int(order[single])
        shapes += [group] * count
    colors = list(rng.integers(0, 8, len(shapes)))
    if rng.random() < 0.6:  # else two things of one colour would be rare, and "the same color ?" mostly no
        colors[1] = colors[0]
    tags = list(rng.choice(3, len(shapes), p=[0.3, 0.4, 0.3]))
    tags[:4] = rng.permutation([1, 1, 2, 2] if rng.random() < 0.5 else [1, 2, 1, 0])
    for i in range(single, len(shapes)):  # repeated things seldom carry a tag: nobody can be asked about it
        tags[i] = tags[i] if rng.random() < 0.3 else 0
    return shapes, colors, tags, count, group


def _crowd(rng: np.random.Generator) -> tuple[list[int], list[int], list[int], int, int | None]:
    """Like :func:`_plan`, with every shape but one named singly and a tag on everything."""
    count = int(rng.integers(0, 5))
    *shapes, last = (int(s) for s in rng.permutation(len(SHAPES))[: CROWD + 1])
    group = last if count >= 2 else None
    shapes += [last] * (count if group is not None else 0)
    colors = list(rng.integers(0, 8, len(shapes)))
    return shapes, colors, list(rng.integers(1, 3, len(shapes))), count, group


def scene(split: str, seed: int, index: int, dense: bool = False, crowded: bool = False) -> Scene:
    """The layout number ``index`` of a stream.

    Parameters
    ----------
    split : str
        "train", "validation" or "test".
    seed, index : int
        Stream and position in it.
    dense : bool
        About a dozen things and no questions: more labels per picture for the tower.
    crowded : bool
        A harder picture to ask about, see :func:`duet_vlm.evaluation.tiny.sample`.

    Returns
    -------
    Scene
    """
    rng = generator(split, seed, index, CROWD_STREAM * crowded)
    while True:
        shapes, colors, tags, count, group = _crowd(rng) if crowded else _plan(dense, rng)
        free = np.ones((IMAGE_SIZE // CELL,) * 2, bool)
        things = []
        for i in rng.permutation(len(shapes)):
            sizes = CROWD_SIZES if crowded else SIZES[:3] if shapes[i] == group else SIZES
            things.append(_thing(free, int(shapes[i]), int(colors[i]), int(tags[i]), sizes, split, rng))
        if dense or None not in things:
            return Scene(split, seed, index, tuple(t for t in things if t is not None), count, group, crowded)
