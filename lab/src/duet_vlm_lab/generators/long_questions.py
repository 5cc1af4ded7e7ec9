"""Questions about long clips, which look for something brief among much that says nothing.

| kind | asks | what it takes |
| --- | --- | --- |
| beside | what is right before (after) the star? | the star, and the nearest thing or word on that side, be it a
hundred frames away |
| when | in what scene does the star appear? (1 to 4) | the star, and how much of the clip came before it |
| order | does the star appear before (after) the moon? | two things, and which was first |
| read | what is the first (last) word? | two or three words show for two frames each |
| count | how many arrows appear? (0 to 4) | each shows for two frames |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from duet_vlm.evaluation.tiny.assets import WORDS
from duet_vlm.evaluation.tiny.questions import PLURALS
from duet_vlm.evaluation.tiny.scenes import SHAPES
from duet_vlm_lab.generators.long_clips import ROWS, Event, LongClip, center

KINDS = ("beside", "when", "order", "read", "count")
# what is reached without looking, nearly
CHANCE = {"beside": 1 / 10, "when": 1 / 4, "order": 1 / 2, "read": 1 / 12, "count": 1 / 5}


@dataclass(frozen=True)
class LongQuestion:
    """One question; ``needed`` (5 x frames,) bool: the middle of everything that the answer depends on, in the first
    frame where it shows."""

    text: str
    answer: str
    kind: str
    needed: np.ndarray


def name(event: Event) -> str:
    """Words for an event."""
    return (WORDS if event.actor.role == "word" else SHAPES)[event.actor.value]


class _LongAsker:
    """The questions of one clip."""

    def __init__(self, clip: LongClip, rng: np.random.Generator) -> None:
        self.clip, self.rng, self.events = clip, rng, clip.events

    def some(self, items: list[int]) -> int:
        return items[int(self.rng.integers(len(items)))]

    def made(self, text: str, answer: str, kind: str, *needed: int) -> LongQuestion:
        rows = np.zeros(self.clip.frames * ROWS, bool)
        rows[[center(self.events[i], self.events[i].first) for i in needed]] = True
        return LongQuestion(text, answer, kind, rows)

    def beside(self) -> LongQuestion:
        side, step = (("before", -1), ("after", 1))[int(self.rng.integers(2))]
        i = self.some([i for i in self.clip.played("guest") if 0 <= i + step < len(self.events)])
        return self.made(
            f"What is right {side} the {name(self.events[i])}?", name(self.events[i + step]), "beside", i, i + step
        )

    def when(self) -> LongQuestion:
        i = self.some(self.clip.played("guest"))
        return self.made(
            f"In what scene does the {name(self.events[i])} appear?",
            str(self.clip.scene_of(self.events[i]) + 1),
            "when",
            i,
        )

    def order(self) -> LongQuestion:
        a, b = (int(i) for i in self.rng.permutation(self.clip.played("guest"))[:2])
        side = ("before", "after")[int(self.rng.integers(2))]
        text = f"Does the {name(self.events[a])} appear {side} the {name(self.events[b])}?"
        return self.made(text, "yes" if (a < b) == (side == "before") else "no", "order", a, b)

    def read(self) -> LongQuestion:
        end, place = (("first", 0), ("last", -1))[int(self.rng.integers(2))]
        i = self.clip.played("word")[place]
        return self.made(f"What is the {end} word?", name(self.events[i]), "read", i)

    def count(self) -> LongQuestion:
        flashes = self.clip.played("flash")
        shape = self.events[flashes[0]].actor.value
        if self.rng.random() < 0.2:
            absent = sorted(
                set(range(len(SHAPES))) - {event.actor.value for event in self.events if event.actor.role != "word"}
            )
            shape, flashes = self.some(absent), []
        return self.made(f"How many {PLURALS[shape]} appear?", str(len(flashes)), "count", *flashes)


def question(clip: LongClip, kind: str, rng: np.random.Generator) -> LongQuestion:
    """One question of a kind."""
    if kind not in KINDS:
        raise ValueError(f"unknown question kind {kind!r}; use one of {', '.join(KINDS)}")
    asked: LongQuestion = getattr(_LongAsker(clip, rng), kind)()
    return asked
