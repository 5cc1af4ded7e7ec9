"""The generator of ``tiny-chain``: pinned, right, and no hop of a chain can be skipped."""

import functools
import hashlib
import re

import numpy as np
import pytest

from duet_vlm.evaluation.tasks import task
from duet_vlm.evaluation.tiny.assets import WORDS
from duet_vlm.evaluation.tiny.labels import body_patches, tag_patches
from duet_vlm.evaluation.tiny.questions import PLURALS, split_words
from duet_vlm.evaluation.tiny.scenes import COLOR_NAMES, SHAPES
from duet_vlm_lab.generators.chain_questions import (
    CHAINS,
    CHANCE,
    KINDS,
    MOVES,
    PAIRS,
    SINGLE,
    needed_of,
    neighbours,
    pair_question,
    question,
    readable,
    walk,
)
from duet_vlm_lab.generators.chain_scenes import BOX, ROOM, SIDE, grid_scene
from duet_vlm_lab.networks.chain_network import CHAIN_TOKEN
from duet_vlm_lab.tasks import chain

PINNED = "27f0dd8bddecddb386dd63d71e9bc96578e1acd77ecf282743babe2bdd94a61e"


def stream_hash() -> str:
    digest = hashlib.sha256()
    for i in range(len(KINDS)):
        item = chain.sample("test", i)
        for image in item.images:
            digest.update(image.tobytes())
        digest.update(f"{item.question}|{item.answer}|{item.kind}".encode())
        digest.update(np.packbits(item.needed).tobytes())
    return digest.hexdigest()


def test_twelve_samples_are_pinned():
    assert stream_hash() == PINNED


@functools.cache
def asked_of(kind: str, n: int = 400, split: str = "validation", seed: int = 3) -> list:
    """(scene, question) of the first ``n`` pictures that offer ``kind``."""
    drawn = (grid_scene(split, seed, i) for i in range(n))
    return [(s, q) for s in drawn if (q := question(s, kind, s.generator(2)))]


def by_cell(scene) -> dict:
    """(row, column) -> (shape, colour, thing), from pixels alone."""
    return {
        (int(t.center[1]) // ROOM, int(t.center[0]) // ROOM): (SHAPES[t.shape], COLOR_NAMES[t.color], t)
        for t in scene.things
    }


def follow(text: str, scene, skip: int | None = None) -> str | None:
    """Read a chain with regular expressions and walk it on the cells; ``skip``: leave out this hop. None where that
    leads nowhere."""
    start, moves, read = re.fullmatch(r"(\w+), (.*): what (\w+)\?", text).groups()
    cells = by_cell(scene)
    (at,) = [cell for cell, (shape, _, _) in cells.items() if shape == start.lower()]
    for n, move in enumerate(moves.split(", ")):
        if n == skip:
            continue
        if move == "same color":
            others = [cell for cell in cells if cells[cell][1] == cells[at][1] and cell != at]
            at = others[0] if len(others) == 1 else None
        else:
            at = {"right": (at[0], at[1] + 1), "above": (at[0] - 1, at[1])}[move]
        if at not in cells:
            return None
    return reading(cells[at], read)


def reading(found, read: str) -> str | None:
    shape, _, thing = found
    if read == "shape":
        return shape
    return ("0123456789" if thing.tag.kind == "digit" else WORDS)[thing.tag.value] if thing.tag else None


@pytest.mark.parametrize("kind", CHAINS)
def test_chains_lead_where_they_say(kind):
    asked = asked_of(kind)
    assert len(asked) > 370
    for scene, q in asked:
        assert follow(q.text, scene) == q.answer
        assert len(set(q.path)) == len(q.moves) + 1 == CHAINS[kind] + 1
        needed, last = needed_of(scene, q), scene.things[q.path[-1]]
        shown = np.any([body_patches(scene.things[i]) for i in q.path], 0)
        assert np.array_equal(needed, shown if q.read == "shape" else shown | tag_patches(last))


@pytest.mark.parametrize("kind", CHAINS)
def test_no_hop_can_be_skipped(kind):
    """Answerers that see the picture perfectly but leave out one hop, read the thing named or any other, or follow the
    moves from anywhere."""
    asked, rng = asked_of(kind), np.random.default_rng(0)
    assert len(asked) > 370

    def share(answers) -> float:
        return float(np.mean([answer == q.answer for answer, (_, q) in zip(answers, asked, strict=True)]))

    def one_of(told: list) -> str:
        told = [answer for answer in told if answer]
        return told[rng.integers(len(told))]

    for hop in range(CHAINS[kind]):
        assert share([follow(q.text, s, skip=hop) for s, q in asked]) < 0.1, hop
    assert share([reading(by_cell(s)[s.cells[q.path[0]]], q.read) for s, q in asked]) < 0.1
    assert share([one_of([reading(found, q.read) for found in by_cell(s).values()]) for s, q in asked]) < 0.15
    steps = [{move: neighbours(s, move) for move in MOVES} for s, _ in asked]
    ends = [[walk(step, i, q.moves) for i in range(16)] for step, (_, q) in zip(steps, asked, strict=True)]
    anywhere = [
        one_of([readable(s, path[-1], q.read) for path in paths if path])
        for paths, (s, q) in zip(ends, asked, strict=True)
    ]
    assert abs(share(anywhere) - CHANCE[kind]) < 0.05  # the best guess that looks at no name


def test_moves_and_answers_are_balanced():
    for kind in CHAINS:
        asked = [q for _, q in asked_of(kind)]
        for n in range(CHAINS[kind]):
            share = {move: np.mean([q.moves[n] == move for q in asked]) for move in MOVES}
            by_color = share.pop("same color")
            assert min(share.values()) > 0.15 and max(share.values()) < 0.6, (kind, share)
            assert by_color == 0.0 if n + 1 < CHAINS[kind] else 0.15 < by_color < 0.6  # it comes last
        for read in ("tag", "shape"):
            said = [q.answer for q in asked if q.read == read]
            assert 0.25 < len(said) / len(asked) < 0.75
            assert max(said.count(a) for a in set(said)) / len(said) < 0.2


def test_things_keep_to_their_cells_and_never_touch():
    for i in range(120):
        scene = grid_scene("test", 0, i, side=2 + i % 3)
        assert len(set(scene.cells)) == len(scene.things) == scene.side**2
        for (row, column), t in zip(scene.cells, scene.things, strict=True):
            boxes = [(t.x, t.y, t.size, t.size)] + ([(t.tag.x, t.tag.y, t.tag.width, t.tag.height)] if t.tag else [])
            for x, y, width, height in boxes:
                assert (
                    ROOM * column <= x
                    and x + width <= ROOM * column + BOX
                    and ROOM * row <= y
                    and y + height <= ROOM * row + BOX
                )
            assert 0 <= row < SIDE and 0 <= column < SIDE


def test_pair_questions_need_both_pictures():
    answers = {kind: [] for kind in PAIRS}
    alone = {kind: [] for kind in PAIRS}
    for i in range(400):
        scenes = grid_scene("validation", 1, 2 * i), grid_scene("validation", 1, 2 * i + 1)
        for kind in PAIRS:
            q = pair_question(scenes, kind, scenes[0].generator(2))
            if not q:
                continue
            (many,) = [m for m in PLURALS if m in split_words(q.text)]
            shape = PLURALS.index(many)
            found = [[t for t in s.things if t.shape == shape] for s in scenes]
            if kind == "pair_count":
                assert q.answer == str(len(found[0]) + len(found[1]))
                alone[kind].append(q.answer == str(len(found[0])))
            else:
                (a,), (b,) = found
                assert q.answer == ("yes" if a.color == b.color else "no")
            assert q.needed.shape == (512,)
            assert all(part.any() == bool(seen) for part, seen in zip(np.split(q.needed, 2), found, strict=True))
            answers[kind].append(q.answer)
    for kind, said in answers.items():
        assert len(said) > 100 and max(said.count(a) for a in set(said)) / len(said) < CHANCE[kind] + 0.16, (
            kind,
            len(said),
        )
    assert np.mean(alone["pair_count"]) < 0.35


def test_samples_take_turns_and_are_reproducible():
    items = chain.samples("test", len(KINDS))
    assert tuple(i.kind for i in items) == KINDS
    assert all(
        len(i.images) == (2 if i.kind in PAIRS else 1) and i.needed.shape == (256 * len(i.images),) for i in items
    )
    again = chain.sample("test", 9)
    assert (again.question, [x.tobytes() for x in again.images]) == (
        items[9].question,
        [x.tobytes() for x in items[9].images],
    )
    assert chain.sample("test", 9, seed=1).images[0].tobytes() != again.images[0].tobytes()
    assert all(word in CHAIN_TOKEN for i in items for word in [*split_words(i.question), i.answer])
    asked = task("tiny-chain").ask(0, 9)
    assert (asked.text, asked.answers, asked.kind) == (again.question, (again.answer,), again.kind)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: chain.sample("tests", 0), "unknown split 'tests'"),
        (lambda: chain.sample("test", -1), "index must be 0 or more"),
        (lambda: chain.samples("test", -2), "n must be 0 or more"),
        (
            lambda: question(grid_scene("test", 0, 0), "riddle", np.random.default_rng(0)),
            "unknown question kind 'riddle'",
        ),
        (
            lambda: pair_question((grid_scene("test", 0, 0),) * 2, "hop1", np.random.default_rng(0)),
            "unknown question kind 'hop1'",
        ),
    ],
)
def test_mistakes_are_explained(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_every_kind_has_a_chance_level():
    assert set(CHANCE) == set(KINDS) == {*SINGLE, *PAIRS}
