"""Questions about clips, which no single frame answers.

| kind | asks | why a frame is not enough |
| --- | --- | --- |
| motion | where does the star move? | the same place is passed in either direction |
| order | does the moon appear before the ring? | each shows for a while and leaves again: a frame with one of them fits
both orders |
| change | what is the first (last) color of the heart? | a frame shows a colour, but not whether another one came
before or after |
| read | what is the first (last) word? | two words flash up one after the other |
| count | how many arrows appear? | they flash up one at a time |

Played backwards, a clip has the same frames and, for all kinds but ``count``, the other answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from duet_vlm.evaluation.tiny.assets import WORDS
from duet_vlm.evaluation.tiny.questions import PLURALS
from duet_vlm.evaluation.tiny.scenes import COLOR_NAMES, SHAPES
from duet_vlm_lab.generators.clips import CLIP_ROWS, FRAMES, STEPS, Clip, center, covered

KINDS = ("motion", "order", "change", "read", "count")
# What is reached without looking, and by a reader who sees every frame but not in which order they come.
CHANCE = {"motion": 1 / 4, "order": 1 / 2, "change": 1 / 8, "read": 1 / 16, "count": 1 / 5}
ORDERLESS = {"motion": 1 / 2, "order": 1 / 2, "change": 1 / 2, "read": 1 / 2, "count": 1.0}
NONE = (math.nan,) * 3


@dataclass(frozen=True)
class ClipQuestion:
    """One question about a clip.

    Attributes
    ----------
    text, answer, kind : str
    needed : ndarray (520,) bool
        Rows that prove the answer.
    looks : tuple of two ndarray (520,) bool
        Rows that show what is asked about, for the first and the second part of a comparison; training may point there.
    mentions : tuple of (int, ndarray (520,) bool)
        For each naming word, its place among the words of the text, and the rows that show what it names.
    counted : ndarray (520,) bool
        One row per thing to be counted.
    gaps : tuple of three floats
        What a comparison compares: right and down in units of four cells, later in units of three frames; NaN
        elsewhere.
    """

    text: str
    answer: str
    kind: str
    needed: np.ndarray
    looks: tuple[np.ndarray, np.ndarray]
    mentions: tuple[tuple[int, np.ndarray], ...]
    counted: np.ndarray
    gaps: tuple[float, float, float] = NONE


class _ClipAsker:
    """The questions of one clip."""

    def __init__(self, clip: Clip, rng: np.random.Generator) -> None:
        self.clip, self.rng = clip, rng
        self.shown = [covered(a) for a in clip.actors]  # (8, 65) each

    def pick(self, items: list):
        return items[int(self.rng.integers(len(items)))]

    def name(self, i: int) -> str:
        return SHAPES[self.clip.actors[i].value]

    def rows(self, i: int, frames: list[int]) -> np.ndarray:
        """Rows of actor ``i`` in ``frames``, (520,) bool."""
        out = np.zeros_like(self.shown[i])
        out[frames] = self.shown[i][frames]
        return out.ravel()

    def make(self, kind: str, pieces: list, answer: str, needed: np.ndarray, looks: tuple, **more) -> ClipQuestion:
        """Join pieces to a question; a (word, rows) piece is a mention."""
        words: list[str] = []
        mentions = []
        for piece in pieces:
            if isinstance(piece, tuple):
                mentions.append((len(words), piece[1]))
                words.append(piece[0])
            else:
                words += piece.split()
        text = " ".join(words)
        more.setdefault("counted", np.zeros(CLIP_ROWS, bool))
        return ClipQuestion(text[0].upper() + text[1:] + "?", answer, kind, needed, looks, tuple(mentions), **more)

    def motion(self) -> ClipQuestion:
        i = self.pick(self.clip.played("mover"))
        (x0, y0), (x1, y1) = self.clip.actors[i].places[0], self.clip.actors[i].places[-1]
        way = next(name for name, (dx, dy) in STEPS.items() if dx * (x1 - x0) + dy * (y1 - y0) > 0)
        looks = self.rows(i, [0, 1, 2]), self.rows(i, [5, 6, 7])
        pieces = ["where does the", (self.name(i), self.shown[i].ravel()), "move"]
        return self.make(
            "motion", pieces, way, self.rows(i, [0, FRAMES - 1]), looks, gaps=((x1 - x0) / 28, (y1 - y0) / 28, math.nan)
        )

    def order(self) -> ClipQuestion:
        a, b = (int(i) for i in self.rng.permutation(self.clip.played("comer"))[:2])
        starts = [self.clip.actors[i].frames[0] for i in (a, b)]
        before, yes = bool(self.rng.random() < 0.5), bool(self.rng.random() < 0.5)
        if ((starts[0] < starts[1]) == before) != yes:  # yes and no are equally likely for any clip
            a, b, starts = b, a, starts[::-1]
        looks = self.shown[a].ravel(), self.shown[b].ravel()
        pieces = [
            "does the",
            (self.name(a), looks[0]),
            f"appear {'before' if before else 'after'} the",
            (self.name(b), looks[1]),
        ]
        needed = self.rows(a, [starts[0]]) | self.rows(b, [starts[1]])
        return self.make(
            "order",
            pieces,
            "yes" if yes else "no",
            needed,
            looks,
            gaps=(math.nan, math.nan, (starts[0] - starts[1]) / 3),
        )

    def change(self) -> ClipQuestion:
        i, end = self.pick(self.clip.played("changer")), self.end()
        colors = self.clip.actors[i].colors
        frame = 0 if end == "first" else FRAMES - 1
        look = self.rows(i, [f for f in range(FRAMES) if colors[f] == colors[frame]])
        pieces = [f"what is the {end} color of the", (self.name(i), look)]
        return self.make("change", pieces, COLOR_NAMES[colors[frame]], self.rows(i, [frame]), (look, look))

    def read(self) -> ClipQuestion:
        end = self.end()
        i = self.clip.played("word")[0 if end == "first" else -1]
        look = self.shown[i].ravel()
        return self.make(
            "read", [f"what is the {end}", ("word", look)], WORDS[self.clip.actors[i].value], look, (look, look)
        )

    def count(self) -> ClipQuestion:
        flashes, look, one = (
            self.clip.played("flash"),
            np.zeros(CLIP_ROWS, bool),
            np.zeros((FRAMES, len(self.shown[0][0])), bool),
        )
        shape, n = self.clip.actors[flashes[0]].value, len(flashes)
        if self.rng.random() < 0.2:
            shape, n = (
                self.pick(sorted(set(range(len(SHAPES))) - {a.value for a in self.clip.actors if a.role != "word"})),
                0,
            )
        for i in flashes[:n]:
            frame = self.clip.actors[i].frames[0]
            look |= self.shown[i].ravel()
            one[frame, center(self.clip.actors[i], frame)] = True
        return self.make(
            "count", ["how many", (PLURALS[shape], look), "appear"], str(n), look, (look, look), counted=one.ravel()
        )

    def end(self) -> str:
        return "first" if self.rng.random() < 0.5 else "last"


def question(clip: Clip, kind: str, rng: np.random.Generator) -> ClipQuestion:
    """One question of a kind."""
    if kind not in KINDS:
        raise ValueError(f"unknown question kind {kind!r}; use one of {', '.join(KINDS)}")
    ask: Callable[[], ClipQuestion] = getattr(_ClipAsker(clip, rng), kind)
    return ask()


def questions(clip: Clip, kinds: tuple[str, ...], rng: np.random.Generator) -> list[ClipQuestion]:
    """One question of every kind named, which may be named again."""
    asker = _ClipAsker(clip, rng)
    return [getattr(asker, kind)() for kind in kinds]
