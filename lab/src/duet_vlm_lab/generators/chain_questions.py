"""Questions of ``tiny-chain``: the kinds of the tiny model, chains of one to three hops, and questions over two
pictures.

A chain names a thing and goes from neighbour to neighbour: "Star, right, same color: what tag?" starts at the star,
goes to the thing in the next cell on the right, then to the only other thing of that colour, and reads the number or
word there. Every hop is one such step. No step can be left out, nor can the start: the same moves lead from other
things to other answers. The move by colour comes last, in half of the chains of two and three hops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from duet_vlm.evaluation.tiny import questions as plain
from duet_vlm.evaluation.tiny.assets import WORDS
from duet_vlm.evaluation.tiny.labels import body_patches, tag_patches
from duet_vlm.evaluation.tiny.questions import PLURALS, SceneQuestion, needed_patches
from duet_vlm.evaluation.tiny.scenes import COLOR_NAMES, SHAPES
from duet_vlm_lab.generators.chain_scenes import CELLS, SIDE, GridScene

MOVES = ("right", "above", "same color")
STEPS = {"right": (0, 1), "above": (-1, 0)}  # (rows, columns)
CHAINS = {"hop1": 1, "hop2": 2, "hop3": 3}
SINGLE = (*plain.KINDS, *CHAINS)
PAIRS = ("pair_compare", "pair_count")
KINDS = (*SINGLE, *PAIRS)
CHANCE = {**plain.CHANCE, "hop1": 0.13, "hop2": 0.15, "hop3": 0.14, "pair_compare": 0.5, "pair_count": 0.2}
# what a chain of so many hops may be; those that end by colour stand there twice, since there are half as many
WAYS = {
    1: tuple((move,) for move in MOVES),
    **{
        hops: (*product(STEPS, repeat=hops), *(2 * [(*way, "same color") for way in product(STEPS, repeat=hops - 1)]))
        for hops in (2, 3)
    },
}
READS = ("tag", "tag", "shape")  # a tag is a number or a word
# by ``side``: share of the ends of the same moves from anywhere that may have the right answer
LIMITS = {4: 0.25, 3: 0.34, 2: 0.5}
PAIR_COUNTS = (1, 2, 3, 4, 5)  # answers of "in both pictures"


@dataclass(frozen=True)
class Chain(SceneQuestion):
    """A chain question: ``path`` are the things gone through, the named one first and the one that is read last;
    ``read`` what is read."""

    path: tuple[int, ...] = ()
    moves: tuple[str, ...] = ()
    read: str = ""


def neighbours(scene: GridScene, move: str) -> list[int | None]:
    """For each thing, the one that ``move`` leads to, or None where there is none or more than one."""
    if move in STEPS:
        down, along = STEPS[move]
        at = {cell: i for i, cell in enumerate(scene.cells)}
        return [at.get((row + down, column + along)) for row, column in scene.cells]
    colors = [t.color for t in scene.things]
    others = [[j for j, color in enumerate(colors) if color == mine and j != i] for i, mine in enumerate(colors)]
    return [found[0] if len(found) == 1 else None for found in others]


def walk(steps: dict[str, list[int | None]], start: int, moves: tuple[str, ...]) -> tuple[int, ...] | None:
    """The things that ``moves`` lead through from ``start``, or None where a step leads nowhere or back; ``steps``:
    :func:`neighbours`."""
    path = [start]
    for move in moves:
        found = steps[move][path[-1]]
        if found is None or found in path:
            return None
        path.append(found)
    return tuple(path)


def readable(scene: GridScene, i: int, read: str) -> str | None:
    """Property ``read`` of thing ``i`` in words, or None where it has no such tag."""
    thing, (row, column) = scene.things[i], scene.cells[i]
    if read == "cell":
        return CELLS[row * SIDE + column]
    if read == "color":
        return COLOR_NAMES[thing.color]
    if read == "shape":
        return SHAPES[thing.shape]
    if thing.tag is None:
        return None
    return str(thing.tag.value) if thing.tag.kind == "digit" else WORDS[thing.tag.value]


class ChainAsker(plain.Asker):
    """The single-picture questions of one scene."""

    scene: GridScene

    def __init__(self, scene: GridScene, rng: np.random.Generator):
        super().__init__(scene, rng)
        self.steps = {move: neighbours(scene, move) for move in MOVES}

    def chain(
        self,
        hops: int,
        reads: tuple[str, ...] = READS,
        limit: float | None = None,
        ways: Sequence[tuple[str, ...]] = (),
    ) -> Chain | None:
        """Draw a chain: what is read and the moves come first, so that neither depends on where things stand."""
        read, limit = reads[int(self.rng.integers(len(reads)))], limit or LIMITS[self.scene.side]
        ways = ways or WAYS[hops]
        for n in self.rng.permutation(len(ways)):
            paths = [path for i in range(len(self.things)) if (path := walk(self.steps, i, ways[n]))]
            said = [readable(self.scene, path[-1], read) for path in paths]
            shown = [answer for answer in said if answer]
            fair = [
                p
                for p, a in zip(paths, said, strict=True)
                if a and p[0] in self.unique and shown.count(a) <= limit * len(shown)
            ]
            if fair:
                return self.asked(self.pick(fair), ways[n], read)
        return None

    def asked(self, path: tuple[int, ...], moves: tuple[str, ...], read: str) -> Chain:
        name = SHAPES[self.scene.things[path[0]].shape]
        text = f"{name.capitalize()}, {', '.join(moves)}: what {read}?"
        answer = readable(self.scene, path[-1], read)
        return Chain(text, answer, f"hop{len(moves)}", path, read == "tag", (), path, moves, read)

    def hop1(self) -> Chain | None:
        return self.chain(1)

    def hop2(self) -> Chain | None:
        return self.chain(2)

    def hop3(self) -> Chain | None:
        return self.chain(3)


def question(scene: GridScene, kind: str, rng: np.random.Generator) -> SceneQuestion | None:
    """One question about one picture, or None when the scene offers none of this kind."""
    if kind not in SINGLE:
        raise ValueError(f"unknown question kind {kind!r}; use one of {', '.join(SINGLE)}")
    return getattr(ChainAsker(scene, rng), kind)()


def needed_of(scene: GridScene, asked: SceneQuestion) -> np.ndarray:
    """Patches that show what the answer needs, (256,) bool: of a chain everything it goes through, and the tag that is
    read."""
    if not isinstance(asked, Chain):
        return needed_patches(scene, asked)
    tag = tag_patches(scene.things[asked.path[-1]]) if asked.reads else False
    return np.any([body_patches(scene.things[i]) for i in asked.path], 0) | tag


@dataclass(frozen=True)
class PairQuestion:
    """A question over two pictures; ``needed`` (512,) bool over the patches of the first and then of the second."""

    text: str
    answer: str
    kind: str
    needed: np.ndarray


def pair_question(scenes: tuple[GridScene, GridScene], kind: str, rng: np.random.Generator) -> PairQuestion | None:
    """One question over two pictures, or None when they offer none. The answer is drawn first, so that all are equally
    frequent."""
    if kind not in PAIRS:
        raise ValueError(f"unknown question kind {kind!r}; use one of {', '.join(PAIRS)}")
    found = [
        [[i for i, t in enumerate(scene.things) if t.shape == shape] for shape in range(len(SHAPES))]
        for scene in scenes
    ]
    if kind == "pair_count":
        wanted = PAIR_COUNTS[int(rng.integers(len(PAIR_COUNTS)))]
        shapes = [s for s in range(len(SHAPES)) if len(found[0][s]) + len(found[1][s]) == wanted]
        text, answer = "How many {many} are there in both pictures?", str(wanted)
    else:
        yes = bool(rng.random() < 0.5)
        both = [s for s in range(len(SHAPES)) if len(found[0][s]) == len(found[1][s]) == 1]
        same = {s: scenes[0].things[found[0][s][0]].color == scenes[1].things[found[1][s][0]].color for s in both}
        if len(set(same.values())) < 2:
            return None  # the answer would be the same for every shape of these pictures
        shapes = [s for s in both if same[s] == yes]
        text, answer = "Do both {many} have the same color?", "yes" if yes else "no"
    if not shapes:
        return None
    shape = shapes[int(rng.integers(len(shapes)))]
    needed = [
        needed_patches(scene, SceneQuestion("", "", kind, tuple(seen[shape]), False, ()))
        for scene, seen in zip(scenes, found, strict=True)
    ]
    return PairQuestion(text.format(many=PLURALS[shape]), answer, kind, np.concatenate(needed))
