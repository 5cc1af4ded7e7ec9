"""Questions about a layout, with one-word answers that cannot be guessed and the things that each answer needs."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from duet_vlm.evaluation.tiny.assets import WORDS
from duet_vlm.evaluation.tiny.kinds import KINDS as KINDS
from duet_vlm.evaluation.tiny.labels import body_patches, tag_patches
from duet_vlm.evaluation.tiny.scenes import COLOR_NAMES, GRID, SHAPES, Scene

CHANCE = {
    "attribute": 0.125,
    "existence": 0.5,
    "read_digit": 0.1,
    "read_word": 1 / 16,
    "count": 0.2,
    "spatial": 0.5,
    "compare": 0.5,
}
PLURALS = tuple("crosses" if s == "cross" else s + "s" for s in SHAPES)
RELATIONS = (("left of", "right of"), ("above", "below"))
MIN_DISTANCE = 28  # pixels between centres for "left of" and the like: two patches, no borderline cases
MIN_SIZE_STEP = 7  # pixels of size difference for "larger"


@dataclass(frozen=True)
class SceneQuestion:
    """One question.

    Attributes
    ----------
    text, answer, kind : str
    needed : tuple of int
        Things that must be seen to answer; empty where the answer is "nothing like that here".
    reads : bool
        Whether the tag of the needed thing must be seen, too.
    mentions : tuple of (int, tuple of int)
        For each naming word, its place among the words of the text and the things it names.
    """

    text: str
    answer: str
    kind: str
    needed: tuple[int, ...]
    reads: bool
    mentions: tuple[tuple[int, tuple[int, ...]], ...]


def split_words(text: str) -> list[str]:
    """Lower-case words and punctuation marks: the tokenizer's view of a text."""
    return re.findall(r"\w+|[^\w\s]+", text.lower())


def question_tokens_of(scene_question: SceneQuestion, numbers: dict[str, int]) -> list[int]:
    """Token numbers of a question, without the prompt around it; equals what the tokenizer makes of it."""
    return [numbers[word] for word in split_words(scene_question.text)]


def _ask(
    parts: list[str | tuple[str, list[int]]], answer: str, kind: str, needed: list[int], reads: bool = False
) -> SceneQuestion:
    """Join pieces to a question; a (word, things) piece is a mention."""
    words: list[str] = []
    mentions = []
    for piece in parts:
        if isinstance(piece, tuple):
            words.append(piece[0])
            mentions.append((len(words) - 1, tuple(piece[1])))
        else:
            words += piece.split()
    text = " ".join(words)
    return SceneQuestion(text[0].upper() + text[1:] + "?", answer, kind, tuple(needed), reads, tuple(mentions))


class Asker:
    """The questions of one scene. ``unique`` are the things whose shape occurs once: only those are called "the star"."""

    def __init__(self, scene: Scene, rng: np.random.Generator):
        self.scene, self.things, self.rng = scene, scene.things, rng
        shapes, colors = [t.shape for t in self.things], [t.color for t in self.things]
        self.unique = [i for i, s in enumerate(shapes) if shapes.count(s) == 1]
        self.unique_color = [i for i, c in enumerate(colors) if colors.count(c) == 1]

    def pick(self, items: list):
        return items[int(self.rng.integers(len(items)))]

    def pair(self) -> tuple[int, int]:
        a, b = self.rng.permutation(self.unique)[:2]
        return int(a), int(b)

    def name(self, i: int) -> tuple[str, list[int]]:
        return SHAPES[self.things[i].shape], [i]

    def attribute(self) -> SceneQuestion:
        if self.unique_color and self.rng.random() < 0.4:
            i = self.pick(self.unique_color)
            words = ["what shape is the", COLOR_NAMES[self.things[i].color], ("object", [i])]
            return _ask(words, self.name(i)[0], "attribute", [i])
        i = self.pick(self.unique)
        return _ask(["what color is the", self.name(i)], COLOR_NAMES[self.things[i].color], "attribute", [i])

    def existence(self) -> SceneQuestion:
        have = {(t.shape, t.color) for t in self.things}
        shapes, colors = {s for s, _ in have}, {c for _, c in have}
        if self.rng.random() < 0.5:
            shape, color = self.pick(sorted(have))
            answer, seen = "yes", [i for i, t in enumerate(self.things) if (t.shape, t.color) == (shape, color)]
        else:  # most refusals join a shape and a colour that both occur, but not on one thing
            tricky = sorted((s, c) for s in shapes for c in colors if (s, c) not in have)
            plain = sorted((s, c) for s in set(range(len(SHAPES))) - shapes for c in range(len(COLOR_NAMES)))
            shape, color = self.pick(tricky if tricky and (not plain or self.rng.random() < 0.6) else plain)
            answer, seen = "no", [i for i, t in enumerate(self.things) if t.shape == shape]
        return _ask(["is there a", COLOR_NAMES[color], (SHAPES[shape], seen)], answer, "existence", seen)

    def read(self, kind: str) -> SceneQuestion | None:
        tagged = [i for i in self.unique if self.things[i].tag and self.things[i].tag.kind == kind]
        if not tagged:
            return None
        i = self.pick(tagged)
        value = self.things[i].tag.value
        answer = str(value) if kind == "digit" else WORDS[value]
        noun = "number" if kind == "digit" else "word"
        return _ask([f"what {noun} is next to the", self.name(i)], answer, f"read_{kind}", [i], reads=True)

    def read_digit(self) -> SceneQuestion | None:
        return self.read("digit")

    def read_word(self) -> SceneQuestion | None:
        return self.read("word")

    def count(self) -> SceneQuestion:
        present = {t.shape for t in self.things}
        if self.scene.count >= 2:
            shape = self.scene.group
        elif self.scene.count == 1:
            shape = self.things[self.pick(self.unique)].shape
        else:
            shape = self.pick(sorted(set(range(len(SHAPES))) - present))
        seen = [i for i, t in enumerate(self.things) if t.shape == shape]
        return _ask(["how many", (PLURALS[shape], seen), "are there"], str(self.scene.count), "count", seen)

    def spatial(self) -> SceneQuestion | None:
        for _ in range(20):
            a, b = self.pair()
            axis = int(self.rng.integers(2))
            gap = self.things[a].center[axis] - self.things[b].center[axis]
            if abs(gap) < MIN_DISTANCE:
                continue
            yes = bool(self.rng.random() < 0.5)
            relation = RELATIONS[axis][0 if (gap < 0) == yes else 1]
            return _ask(
                ["is the", self.name(a), relation, "the", self.name(b)], "yes" if yes else "no", "spatial", [a, b]
            )
        return None

    def compare(self) -> SceneQuestion | None:
        return self._compare_color() if self.rng.random() < 0.5 else self._compare_size()

    def _compare_color(self) -> SceneQuestion | None:
        pairs = [(a, b) for a in self.unique for b in self.unique if a != b]
        same = [p for p in pairs if self.things[p[0]].color == self.things[p[1]].color]
        differ = [p for p in pairs if p not in same]
        if not same or not differ:
            return None  # the answer would be the same for every pair of this picture
        yes = bool(self.rng.random() < 0.5)
        a, b = self.pick(same if yes else differ)
        words = ["do the", self.name(a), "and the", self.name(b), "have the same color"]
        return _ask(words, "yes" if yes else "no", "compare", [a, b])

    def _compare_size(self) -> SceneQuestion | None:
        for _ in range(20):
            a, b = self.pair()
            step = self.things[a].size - self.things[b].size
            if abs(step) >= MIN_SIZE_STEP:
                words = ["is the", self.name(a), "larger than the", self.name(b)]
                return _ask(words, "yes" if step > 0 else "no", "compare", [a, b])
        return None


def question(scene: Scene, kind: str, rng: np.random.Generator) -> SceneQuestion | None:
    """One question of a kind, or None when the scene offers none."""
    if kind not in KINDS:
        raise ValueError(f"unknown question kind {kind!r}; use one of {', '.join(KINDS)}")
    return getattr(Asker(scene, rng), kind)()


def questions(scene: Scene, n: int, rng: np.random.Generator, kinds: tuple[str, ...] = KINDS) -> list[SceneQuestion]:
    """``n`` questions of random kinds."""
    asker, out = Asker(scene, rng), []
    while len(out) < n:
        asked = getattr(asker, kinds[int(rng.integers(len(kinds)))])()
        if asked:
            out.append(asked)
    return out


def needed_patches(scene: Scene, scene_question: SceneQuestion) -> np.ndarray:
    """Patches that show what the answer needs, (256,) bool: the needed things and, for reading, their tags."""
    out = np.zeros(GRID * GRID, bool)
    for i in scene_question.needed:
        out |= body_patches(scene.things[i])
        if scene_question.reads:
            out |= tag_patches(scene.things[i])
    return out
