"""Short clips: eight frames of a small scene in which things move, appear, change colour, and words flash up.

A clip is a pure function of (split, seed, index), like a scene. It is made of actors, each with a place and a colour
per frame; what an actor does is what may be asked. Background, shapes, colours and words are those of the pictures.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from duet_vlm.evaluation.tiny.assets import WORD_HEIGHT, WORDS, word_width
from duet_vlm.evaluation.tiny.backgrounds import window
from duet_vlm.evaluation.tiny.labels import SHOWN
from duet_vlm.evaluation.tiny.render import shape_mask, tag_mask
from duet_vlm.evaluation.tiny.scenes import CELL, COLORS, PATCH, SHAPES, Tag, _place, _variant, generator

FRAMES = 8
SIDE = 112  # pixels: things keep the size in patches that the tower knows from pictures
GRID = SIDE // PATCH  # 8 x 8 patches
ROWS = GRID * GRID + 1  # visual rows per frame: CLS, then the patches row by row
CLIP_ROWS = FRAMES * ROWS
SIZES = (21, 28)
CLIP_STREAM = 20  # added to the purpose of random numbers: clips share none with pictures
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
HIDDEN = -1
_COLOR_TABLE = np.array(list(COLORS.values()), np.float32)


@dataclass(frozen=True)
class Actor:
    """A thing, or a word, and what it does.

    Attributes
    ----------
    role : str
        "mover", "changer", "comer", "flash", "still" or "word".
    value : int
        Number of the shape, or of the word.
    width, height : int
        Pixels.
    colors : tuple of int
        Colour in every frame, ``HIDDEN`` where it does not show; words have colour 0.
    places : tuple of (int, int)
        Left upper corner (x, y) in every frame, in pixels.
    variant : int
        Which bitmap a word is printed with.
    """

    role: str
    value: int
    width: int
    height: int
    colors: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    variant: int = 0

    @property
    def frames(self) -> list[int]:
        """Frames in which it shows."""
        return [f for f, color in enumerate(self.colors) if color != HIDDEN]


@dataclass(frozen=True)
class Clip:
    """Actors in one clip, and where it stands in its stream."""

    split: str
    seed: int
    index: int
    actors: tuple[Actor, ...]

    def generator(self, purpose: int) -> np.random.Generator:
        """Random numbers of this clip: 0 layout, 1 picture, 2 questions, 3 training noise."""
        return generator(self.split, self.seed, self.index, purpose + CLIP_STREAM)

    def played(self, role: str) -> list[int]:
        """Numbers of the actors of a role, those that show first in front."""
        return sorted((i for i, a in enumerate(self.actors) if a.role == role), key=lambda i: self.actors[i].frames[0])

    def reversed(self) -> Clip:
        """The same frames in the opposite order."""
        turned = [dataclasses.replace(a, colors=a.colors[::-1], places=a.places[::-1]) for a in self.actors]
        return dataclasses.replace(self, actors=tuple(turned))


class _ClipStage:
    """Free cells of every frame, and the actors placed so far; None among them where no room was left."""

    def __init__(self, split: str, rng: np.random.Generator) -> None:
        self.split, self.rng = split, rng
        self.free = np.ones((FRAMES, SIDE // CELL, SIDE // CELL), bool)
        self.actors: list[Actor | None] = []

    def pick(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high))

    def room(self, width: int, height: int, frames: range) -> tuple[int, int] | None:
        """Corner (x, y) of a box that is free in all ``frames``, which is then taken."""
        spot = _place(self.free[frames.start : frames.stop].all(0), width // CELL, height // CELL, self.rng)
        if spot is None:
            return None
        self.free[frames.start : frames.stop, spot[0] : spot[0] + height // CELL, spot[1] : spot[1] + width // CELL] = (
            False
        )
        return spot[1] * CELL, spot[0] * CELL

    def add(self, role: str, value: int, colors: list[int], path: list[tuple[int, int]], around: int = 0) -> None:
        """Place an actor on a ``path`` of cells relative to its place; nothing else may come there ``around`` frames
        before or after."""
        width = height = SIZES[self.pick(0, len(SIZES))]
        variant = 0
        if role == "word":
            width, height, variant = word_width(WORDS[value]), WORD_HEIGHT, _variant(self.rng, 20, self.split)
        xs, ys = [x * CELL for x, _ in path], [y * CELL for _, y in path]
        shown = [f for f, color in enumerate(colors) if color != HIDDEN]
        frames = range(max(0, shown[0] - around), min(FRAMES, shown[-1] + around + 1))
        corner = self.room(width + max(xs) - min(xs), height + max(ys) - min(ys), frames)
        if corner is None:
            self.actors.append(None)
            return
        places = tuple((corner[0] + x - min(xs), corner[1] + y - min(ys)) for x, y in zip(xs, ys, strict=True))
        self.actors.append(Actor(role, value, width, height, tuple(colors), places, variant))


def _shown(color: int, first: int, n: int) -> list[int]:
    """A colour in ``n`` frames from ``first`` on."""
    return [color if first <= f < first + n else HIDDEN for f in range(FRAMES)]


def _play(stage: _ClipStage) -> None:
    """Place all actors: largest claims first."""
    rng, pick = stage.rng, stage.pick
    shapes, stay = [int(s) for s in rng.permutation(len(SHAPES))], [(0, 0)] * FRAMES
    for _ in range(1 + int(rng.random() < 0.4)):
        dx, dy = list(STEPS.values())[pick(0, len(STEPS))]
        far = pick(4, 8)
        path = [(dx * round(far * f / (FRAMES - 1)), dy * round(far * f / (FRAMES - 1))) for f in range(FRAMES)]
        stage.add("mover", shapes.pop(), [pick(0, len(COLORS))] * FRAMES, path)
    before, after = (int(c) for c in rng.permutation(len(COLORS))[:2])
    change = pick(2, FRAMES - 1)
    stage.add("changer", shapes.pop(), [before] * change + [after] * (FRAMES - change), stay)
    length = pick(1, 4)
    for first in rng.permutation(FRAMES - length + 1)[:3]:
        stage.add("comer", shapes.pop(), _shown(pick(0, len(COLORS)), int(first), length), stay)
    for _ in range(pick(0, 3)):
        stage.add("still", shapes.pop(), [pick(0, len(COLORS))] * FRAMES, stay)
    early = pick(0, 3)
    gap = early + pick(1, 3)  # the first word leaves here
    late = pick(gap, FRAMES)
    one, other = (int(w) for w in rng.permutation(len(WORDS))[:2])
    stage.add("word", one, _shown(0, early, gap - early), stay)
    stage.add("word", other, _shown(0, late, min(pick(1, 3), FRAMES - late)), stay)
    shape = shapes.pop()
    for first in rng.permutation(FRAMES)[: pick(1, 5)]:
        stage.add("flash", shape, _shown(pick(0, len(COLORS)), int(first), 1), stay, around=1)


def clip(split: str, seed: int, index: int) -> Clip:
    """Clip number ``index`` of a stream.

    Parameters
    ----------
    split : str
        "train", "validation" or "test": disjoint by construction, as for pictures.
    seed, index : int
    """
    rng = generator(split, seed, index, CLIP_STREAM)
    while True:
        stage = _ClipStage(split, rng)
        _play(stage)
        if None not in stage.actors:
            return Clip(split, seed, index, tuple(a for a in stage.actors if a is not None))


def pixels(actor: Actor, color: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Appearance of an actor in a colour: ink (height, width, 3) and how much of it covers, (height, width, 1)."""
    if actor.role != "word":
        tone = _COLOR_TABLE[color] * np.float32(rng.uniform(0.85, 1.08)) + rng.normal(0, 8, 3).astype(np.float32)
        grain = rng.standard_normal((actor.height, actor.width, 1), np.float32) * np.float32(10)
        return tone + grain, shape_mask(actor.value, actor.width)[..., None]
    ink, paper = (
        (rng.uniform(0, 60), rng.uniform(180, 255))
        if rng.random() < 0.5
        else (rng.uniform(190, 255), rng.uniform(0, 70))
    )
    mask = tag_mask(Tag("word", actor.value, actor.variant, 0, 0, actor.width, actor.height))[..., None]
    tint = rng.normal(0, 5, 3).astype(np.float32)
    return np.float32(paper) + mask * np.float32(ink - paper) + tint, np.full_like(mask, 0.88)


def render(shown: Clip) -> np.ndarray:
    """Draw a clip: the camera stands still.

    Returns
    -------
    ndarray, (8, 112, 112, 3) uint8
    """
    rng = shown.generator(1)
    frames = np.repeat(window(shown.split, SIDE, rng)[None], FRAMES, 0)
    for actor in shown.actors:
        looks = {color: pixels(actor, color, rng) for color in sorted(set(actor.colors) - {HIDDEN})}
        for f in actor.frames:
            (x, y), (ink, cover) = actor.places[f], looks[actor.colors[f]]
            view = frames[f, y : y + actor.height, x : x + actor.width]
            view += cover * (ink - view)
    return frames.clip(0, 255).astype(np.uint8)


def covered(actor: Actor) -> np.ndarray:
    """Visual rows that show an actor, (8, 65) bool; row 0 of a frame is CLS and shows nothing by itself."""
    out = np.zeros((FRAMES, ROWS), bool)
    mask = (
        np.ones((actor.height, actor.width), np.float32)
        if actor.role == "word"
        else shape_mask(actor.value, actor.width)
    )
    for f in actor.frames:
        x, y = actor.places[f]
        page = np.zeros((SIDE, SIDE), np.float32)
        page[y : y + actor.height, x : x + actor.width] = mask
        out[f, 1:] = (page.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)) > SHOWN).ravel()
        out[f, center(actor, f)] = True
    return out


def center(actor: Actor, frame: int) -> int:
    """The row of a frame under the middle of an actor."""
    x, y = actor.places[frame]
    return 1 + (y + actor.height // 2) // PATCH * GRID + (x + actor.width // 2) // PATCH
