"""Long clips: 64 to 256 small frames on which hardly anything happens, and what happens is over soon.

A clip is a pure function of (split, seed, index, frames), like all that is drawn here. Four scenes of equal length
follow one another, each with a background of its own. Things and words show one at a time, with nothing but the
background before and after, and the camera is a little noisy, so no two frames are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from duet_vlm.evaluation.tiny.assets import WORD_HEIGHT, WORDS, word_width
from duet_vlm.evaluation.tiny.backgrounds import window
from duet_vlm.evaluation.tiny.scenes import CELL, COLORS, PATCH, SHAPES, _variant, generator
from duet_vlm_lab.generators.clips import Actor, pixels

LENGTHS = (64, 128, 256)  # frames
SCENES = 4
SIDE = 28  # pixels
ROWS = (SIDE // PATCH) ** 2 + 1  # visual rows per frame: CLS, then the patches row by row
BRIEF = 2  # frames for which a word shows, and a thing that is to be counted
GUESTS = 5  # things that come once, and for a while
SIZES = (21, 28)
NOISE = 3.0
LONG_STREAM = 30  # added to the purpose of random numbers: shared with no other stream
FITTING = tuple(i for i, word in enumerate(WORDS) if word_width(word) <= SIDE)  # words narrow enough for a frame


@dataclass(frozen=True)
class Event:
    """Something shows from frame ``first`` on for ``frames`` frames; ``actor`` is how it looks in each of them."""

    actor: Actor
    first: int
    frames: int


@dataclass(frozen=True)
class LongClip:
    """The events of one clip, one after the other, and where it stands in its stream."""

    split: str
    seed: int
    index: int
    frames: int
    events: tuple[Event, ...]

    def generator(self, purpose: int) -> np.random.Generator:
        """Random numbers of this clip: 0 layout, 1 picture, 2 questions."""
        return generator(self.split, self.seed, self.index, purpose + LONG_STREAM)

    def played(self, role: str) -> list[int]:
        """Numbers of the events of a role ("guest", "flash" or "word"), in order."""
        return [i for i, event in enumerate(self.events) if event.actor.role == role]

    def scene_of(self, event: Event) -> int:
        """Number of the scene in which an event takes place, from 0."""
        return event.first * SCENES // self.frames


def _actor(role: str, value: int, split: str, rng: np.random.Generator) -> Actor:
    if role == "word":
        width, height, color, variant = word_width(WORDS[value]), WORD_HEIGHT, 0, _variant(rng, 20, split)
    else:
        width = height = int(rng.choice(SIZES))
        color, variant = int(rng.integers(len(COLORS))), 0
    x, y = (CELL * int(rng.integers((SIDE - side) // CELL + 1)) for side in (width, height))
    return Actor(role, value, width, height, (color,), ((x, y),), variant)


def _times(lasting: list[int], frames: int, rng: np.random.Generator) -> list[int]:
    """First frames of events that last so long: one after the other, at least a frame apart, none in two scenes."""
    while True:
        spare = frames - sum(lasting) - len(lasting)
        gaps = np.sort(rng.integers(0, spare + 1, len(lasting)))
        firsts = gaps + np.cumsum([0, *(n + 1 for n in lasting[:-1])])
        lasts = firsts + np.array(lasting) - 1
        if (firsts * SCENES // frames == lasts * SCENES // frames).all():
            return [int(first) for first in firsts]


def long_clip(split: str, seed: int, index: int, frames: int) -> LongClip:
    """Clip number ``index`` of a stream.

    Parameters
    ----------
    split : str
        "train", "validation" or "test": disjoint by construction, as for pictures.
    seed, index : int
    frames : int
        A multiple of 4, at least 64.
    """
    if frames % SCENES or frames < LENGTHS[0]:
        raise ValueError(f"frames={frames}: a long clip has a multiple of {SCENES} frames, at least {LENGTHS[0]}")
    rng = generator(split, seed, index, LONG_STREAM)
    shapes = [int(s) for s in rng.permutation(len(SHAPES))[: GUESTS + 1]]
    words = [int(w) for w in rng.permutation(FITTING)[: int(rng.integers(2, 4))]]
    cast = [("guest", shape) for shape in shapes[1:]] + [("word", word) for word in words]
    cast += [("flash", shapes[0])] * int(rng.integers(1, 5))
    actors = [_actor(*cast[i], split, rng) for i in rng.permutation(len(cast))]
    lasting = [int(rng.integers(2, frames // 16 + 1)) if a.role == "guest" else BRIEF for a in actors]
    firsts = _times(lasting, frames, rng)
    return LongClip(split, seed, index, frames, tuple(map(Event, actors, firsts, lasting)))


def render(shown: LongClip) -> np.ndarray:
    """Draw a clip.

    Returns
    -------
    ndarray, (frames, 28, 28, 3) uint8
    """
    rng = shown.generator(1)
    page = np.repeat(np.stack([window(shown.split, SIDE, rng) for _ in range(SCENES)]), shown.frames // SCENES, 0)
    for event in shown.events:
        actor = event.actor
        (ink, cover), (x, y) = pixels(actor, actor.colors[0], rng), actor.places[0]
        view = page[event.first : event.first + event.frames, y : y + actor.height, x : x + actor.width]
        view += cover * (ink - view)
    page += NOISE * rng.standard_normal(page.shape, np.float32)
    return page.clip(0, 255).astype(np.uint8)


def center(event: Event, frame: int) -> int:
    """The row of the clip under the middle of an event in ``frame``."""
    (x, y), side = event.actor.places[0], SIDE // PATCH
    return frame * ROWS + 1 + (y + event.actor.height // 2) // PATCH * side + (x + event.actor.width // 2) // PATCH
