"""Questions of ``tiny-page``: look-ups over the whole page, counting, and chains inside a quarter.

| kind | example | what it takes |
| --- | --- | --- |
| attribute | What color is the star? | a thing whose shape is there once on the page |
| existence | Is there a red star? | the same; the star is there, red or not |
| read_digit, read_word | What number is next to the star? | the same, and the small print beside it |
| count | How many rings are there? (0 to 4) | all quarters |
| hop1, hop2 | Star, right, above: what tag? | the thing, its quarter, and the small print in the cell that the moves
lead to |
"""

from __future__ import annotations

from itertools import product

import numpy as np

from duet_vlm.evaluation.tiny import questions as plain
from duet_vlm.evaluation.tiny.labels import body_patches, tag_patches
from duet_vlm.evaluation.tiny.questions import SceneQuestion
from duet_vlm.evaluation.tiny.scenes import COLOR_NAMES, SHAPES
from duet_vlm_lab.generators.chain_questions import STEPS, Chain, neighbours, readable, walk
from duet_vlm_lab.generators.page_scenes import QUARTERS, ROWS, ScenePage, packed_rows

KINDS = ("attribute", "existence", "read_digit", "read_word", "count", "hop1", "hop2")
HOPS = {"hop1": 1, "hop2": 2}
CHANCE = {
    "attribute": 1 / 8,
    "existence": 1 / 2,
    "read_digit": 1 / 10,
    "read_word": 1 / 16,
    "count": 1 / 5,
    "hop1": 0.05,
    "hop2": 0.05,
}


class PageAsker(plain.Asker):
    """The questions of one page."""

    def __init__(self, page: ScenePage, rng: np.random.Generator) -> None:
        super().__init__(page, rng)  # type: ignore[arg-type]  # it asks about things, wherever they are
        self.page, self.quarter = page, page.where
        firsts = [self.quarter.index(number) for number in range(QUARTERS)]
        self.steps = {
            move: [
                i if i is None else first + i
                for first, part in zip(firsts, page.quarters, strict=True)
                for i in neighbours(part, move)
            ]
            for move in STEPS
        }

    def readable(self, i: int, read: str) -> str | None:
        """Property ``read`` of thing ``i`` in words, or None where it has no such tag."""
        quarter = self.quarter[i]
        return readable(self.page.quarters[quarter], i - self.quarter.index(quarter), read)

    def existence(self) -> SceneQuestion:
        """Of a shape that is there once: how often a shape is there says nothing."""
        i, yes = self.pick(self.unique), bool(self.rng.random() < 0.5)
        color = self.things[i].color
        said = color if yes else self.pick([c for c in range(len(COLOR_NAMES)) if c != color])
        text = f"Is there a {COLOR_NAMES[said]} {SHAPES[self.things[i].shape]}?"
        return SceneQuestion(text, "yes" if yes else "no", "existence", (i,), False, ())

    def chain(self, hops: int, read: str = "tag") -> Chain | None:
        """The moves are drawn first, so that they do not depend on where things stand."""
        ways = list(product(STEPS, repeat=hops))
        for n in self.rng.permutation(len(ways)):
            paths = [
                path for i in self.unique if (path := walk(self.steps, i, ways[n])) and self.readable(path[-1], read)
            ]
            if paths:
                path = self.pick(paths)
                text = f"{SHAPES[self.things[path[0]].shape].capitalize()}, {', '.join(ways[n])}: what {read}?"
                return Chain(
                    text, self.readable(path[-1], read), f"hop{hops}", path, read == "tag", (), path, ways[n], read
                )
        return None

    def hop1(self) -> Chain | None:
        return self.chain(1)

    def hop2(self) -> Chain | None:
        return self.chain(2)


def question(page: ScenePage, kind: str, rng: np.random.Generator) -> SceneQuestion | None:
    """One question, or None when the page offers none of this kind."""
    if kind not in KINDS:
        raise ValueError(f"unknown question kind {kind!r}; use one of {', '.join(KINDS)}")
    return getattr(PageAsker(page, rng), kind)()


def needed_of(page: ScenePage, asked: SceneQuestion) -> np.ndarray:
    """Rows of the packed page that show what the answer needs, in the crops: (1312,) bool; of a chain everything it
    goes through."""
    rows, things, where = np.zeros(ROWS, bool), page.things, page.where
    for i in asked.needed:
        rows[packed_rows(where[i])[body_patches(things[i])]] = True
    if asked.reads:
        last = asked.needed[-1]
        rows[packed_rows(where[last])[tag_patches(things[last])]] = True
    return rows
