"""Lessons: questions that only training asks. They are the steps of an answer, in the form of the task's questions, by
answers alone.

Where a thing is, and what is in a cell; where moves lead; chains with the move by colour anywhere; that move alone,
with the colour said, from a cell, before or behind another move; which of two cells is left of the other.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np

from duet_vlm.evaluation.tiny.questions import SceneQuestion
from duet_vlm.evaluation.tiny.scenes import COLOR_NAMES, SHAPES
from duet_vlm_lab.generators.chain_questions import MOVES, READS, STEPS, Chain, ChainAsker, readable, walk
from duet_vlm_lab.generators.chain_scenes import CELLS, SIDE, GridScene

LESSONS = (
    "cell", "at", "paint", "land1", "land2", "land3", "twin", "other", "there", "mixed", "far", "tint", "order", "near", "any2", "any3",
    "tally",
)  # fmt: skip


class ChainTeacher(ChainAsker):
    """The questions of one scene, and the lessons."""

    def landing(self, hops: int) -> Chain | None:
        """In which cell moves lead."""
        found = self.chain(hops, ("cell",), 1.0, anywhere(hops))
        return found and replace(found, kind=f"land{hops}")

    def land1(self) -> Chain | None:
        return self.landing(1)

    def land2(self) -> Chain | None:
        return self.landing(2)

    def land3(self) -> Chain | None:
        return self.landing(3)

    def any2(self) -> Chain | None:
        found = self.chain(2, ways=anywhere(2))
        return found and replace(found, kind="any2")

    def any3(self) -> Chain | None:
        found = self.chain(3, ways=anywhere(3))
        return found and replace(found, kind="any3")

    def paint(self) -> SceneQuestion:
        """Knowledge that the move by colour from a cell needs first."""
        thing = int(self.rng.integers(len(self.things)))
        cell, color = readable(self.scene, thing, "cell"), COLOR_NAMES[self.things[thing].color]
        assert cell is not None
        return SceneQuestion(f"{cell.capitalize()}: what color?", color, "paint", (thing,), False, ())

    def twin(self) -> SceneQuestion | None:
        found = self.chain(1, (*READS, "cell"), 1.0, [("same color",)])
        return found and replace(found, kind="twin")

    def other(self) -> SceneQuestion | None:
        """The move by colour with the colour given: "Star, red" is the other red thing."""
        found = self.twin()
        if found is None:
            return None
        color = COLOR_NAMES[self.things[found.needed[0]].color]
        return replace(found, kind="other", text=found.text.replace("same color", color))

    def there(self) -> SceneQuestion | None:
        """The move by colour from a cell, as it is behind another move."""
        found = self.twin()
        if found is None:
            return None
        name, cell = (readable(self.scene, found.needed[0], read) for read in ("shape", "cell"))
        assert name is not None and cell is not None
        return replace(found, kind="there", text=found.text.replace(name.capitalize(), cell.capitalize()))

    def mixed(self) -> SceneQuestion | None:
        found = self.chain(2, (*READS, "cell"), 1.0, [way for way in anywhere(2) if "same color" in way])
        return found and replace(found, kind="mixed")

    def far(self) -> SceneQuestion | None:
        found = self.chain(2, (*READS, "cell"), 1.0, [(step, "same color") for step in STEPS])
        return found and replace(found, kind="far")

    def near(self) -> SceneQuestion | None:
        found = self.chain(2, (*READS, "cell"), 1.0, [("same color", step) for step in STEPS])
        return found and replace(found, kind="near")

    def tint(self) -> SceneQuestion | None:
        """Knowledge that this chain needs on its way."""
        found = self.chain(1, ("color",), 1.0, [(step,) for step in STEPS])
        return found and replace(found, kind="tint")

    def tally(self) -> Chain | None:
        """Number of things with the shape of the one that a move leads to: the answer is drawn first, of those that the
        picture offers."""
        shapes = [t.shape for t in self.things]
        (move,) = self.pick([(step,) for step in STEPS])
        paths = [path for i in range(len(self.things)) if (path := walk(self.steps, i, (move,)))]
        many = [shapes.count(shapes[path[-1]]) for path in paths]
        wanted = self.pick(sorted({n for n in many if many.count(n) <= len(many) / 2} or {0}))
        fair = [p for p, n in zip(paths, many, strict=True) if p[0] in self.unique and n == wanted]
        if not fair:
            return None
        path = self.pick(fair)
        alike = tuple(i for i, shape in enumerate(shapes) if shape == shapes[path[-1]])
        text = f"{SHAPES[shapes[path[0]]].capitalize()}, {move}: how many?"
        return Chain(text, str(wanted), "tally", (path[0], *alike), False, (), (path[0], *alike), (move,), "count")

    def order(self) -> SceneQuestion:
        """Two cells, which a spatial question would have to find first."""
        a, b = (int(n) for n in self.rng.permutation(SIDE * SIDE)[:2])
        beside = a % SIDE != b % SIDE and (a // SIDE == b // SIDE or self.rng.random() < 0.5)
        word = self.pick(["left of", "right of"] if beside else ["above", "below"])
        before = (a % SIDE < b % SIDE) if "of" in word else (a // SIDE < b // SIDE)
        yes = before == (word in ("left of", "above"))
        return SceneQuestion(f"Is {CELLS[a]} {word} {CELLS[b]}?", "yes" if yes else "no", "order", (), False, ())

    def cell(self) -> SceneQuestion:
        thing = self.pick(self.unique)
        text = f"{SHAPES[self.things[thing].shape].capitalize()}: what cell?"
        return SceneQuestion(text, readable(self.scene, thing, "cell"), "cell", (thing,), False, ())

    def at(self) -> SceneQuestion:
        """The way back: what is in a cell."""
        read = self.pick(list(READS))
        thing = self.pick([i for i in range(len(self.things)) if readable(self.scene, i, read)] or [0])
        read = read if readable(self.scene, thing, read) else "shape"
        text = f"{readable(self.scene, thing, 'cell').capitalize()}: what {read}?"
        return SceneQuestion(text, readable(self.scene, thing, read), "at", (thing,), read == "tag", ())


def anywhere(hops: int) -> list[tuple[str, ...]]:
    """All chains of so many moves, whatever their order."""
    return list(product(MOVES, repeat=hops))


def questions(scene: GridScene, kinds: list[str], rng: np.random.Generator) -> list[SceneQuestion]:
    """One question of each kind in ``kinds``; where the scene offers none, a "hop1" or an "attribute" instead."""
    asker = ChainTeacher(scene, rng)
    return [getattr(asker, kind)() or asker.hop1() or asker.attribute() for kind in kinds]
