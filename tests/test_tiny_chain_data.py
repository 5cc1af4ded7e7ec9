"""The generator of ``tiny-chain``: pinned, right, and no hop of a chain can be skipped."""

import hashlib
import re

import numpy as np
import pytest

from duet_vlm.evaluate.tasks import task
from duet_vlm.tiny import chain
from duet_vlm.tiny.assets import WORDS
from duet_vlm.tiny.chain_network import CHAIN_TOKEN
from duet_vlm.tiny.chain_questions import CHAINS, CHANCE, KINDS, MOVES, PAIRS, SINGLE, needed_of, pair_question, question
from duet_vlm.tiny.chain_scenes import BOX, ROOM, SIDE, grid_scene
from duet_vlm.tiny.labels import body_patches, tag_patches
from duet_vlm.tiny.questions import PLURALS, split_words
from duet_vlm.tiny.scenes import COLOR_NAMES, SHAPES

PINNED = ""


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


def asked_of(kind: str, n: int = 400, split: str = "validation", seed: int = 3) -> list:
    """(scene, question) of the first ``n`` pictures that offer ``kind``."""
    drawn = (grid_scene(split, seed, i) for i in range(n))
    return [(s, q) for s in drawn if (q := question(s, kind, s.generator(2)))]


def by_cell(scene) -> dict:
    """(row, column) -> (shape, colour, thing), from pixels alone."""
    return {(int(t.center[1]) // ROOM, int(t.center[0]) // ROOM): (SHAPES[t.shape], COLOR_NAMES[t.color], t) for t in scene.things}


def follow(text: str, scene, skip: int | None = None) -> str | None:
    """Read a chain with regular expressions and walk it on the cells; ``skip``: leave out this hop. None where that leads nowhere."""
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
    kind, names = ("digit", "0123456789") if read == "number" else ("word", WORDS)
    return names[thing.tag.value] if thing.tag and thing.tag.kind == kind else None


@pytest.mark.parametrize("kind", CHAINS)
def test_chains_lead_where_they_say(kind):
    asked = asked_of(kind)
    assert len(asked) > 350
    for scene, q in asked:
        assert follow(q.text, scene) == q.answer
        assert len(set(q.path)) == len(q.moves) + 1 == CHAINS[kind] + 1
        needed, last = needed_of(scene, q), scene.things[q.path[-1]]
        shown = np.any([body_patches(scene.things[i]) for i in q.path], 0)
        assert np.array_equal(needed, shown if q.read == "shape" else shown | tag_patches(last))


@pytest.mark.parametrize("kind", CHAINS)
def test_no_hop_can_be_skipped(kind):
    """Answerers that know the picture perfectly but leave out one hop, or read the thing named, or any tag of the right sort."""
    asked, rng = asked_of(kind, 1200), np.random.default_rng(0)
    chance = CHANCE[kind]
    for hop in range(CHAINS[kind]):
        assert np.mean([follow(q.text, s, skip=hop) == q.answer for s, q in asked]) < chance + 0.03, hop
    first = [reading(by_cell(s)[s.cells[q.path[0]]], q.read) == q.answer for s, q in asked]
    assert np.mean(first) < chance
    anything = []
    for s, q in asked:
        tags = [r for found in by_cell(s).values() if (r := reading(found, q.read))]
        anything.append(tags[rng.integers(len(tags))] == q.answer)
    assert np.mean(anything) < 0.25  # one of the three to six that are there


def test_moves_and_what_is_read_are_balanced():
    for kind in CHAINS:
        asked = [q for _, q in asked_of(kind, 900)]
        for n in range(CHAINS[kind]):
            share = [np.mean([q.moves[n] == move for q in asked]) for move in MOVES]
            assert min(share) > 0.2 and max(share) < 0.5, (kind, share)
        for read, answers in (("number", 10), ("word", 16), ("shape", 10)):
            said = [q.answer for q in asked if q.read == read]
            assert 0.25 < len(said) / len(asked) < 0.42
            assert max(said.count(a) for a in set(said)) / len(said) < 1 / answers + 0.08


def test_things_keep_to_their_cells_and_never_touch():
    for i in range(120):
        scene = grid_scene("test", 0, i, few=i % 2 == 1)
        assert len(set(scene.cells)) == len(scene.things) <= 13
        for (row, column), t in zip(scene.cells, scene.things, strict=True):
            boxes = [(t.x, t.y, t.size, t.size)] + ([(t.tag.x, t.tag.y, t.tag.width, t.tag.height)] if t.tag else [])
            for x, y, width, height in boxes:
                assert ROOM * column <= x and x + width <= ROOM * column + BOX and ROOM * row <= y and y + height <= ROOM * row + BOX
            assert 0 <= row < SIDE and 0 <= column < SIDE


def test_pair_questions_need_both_pictures():
    answers = {kind: [] for kind in PAIRS}
    alone = {kind: [] for kind in PAIRS}
    for i in range(600):
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
        assert len(said) > 150 and max(said.count(a) for a in set(said)) / len(said) < CHANCE[kind] + 0.16, (kind, len(said))
    assert np.mean(alone["pair_count"]) < 0.35


def test_samples_take_turns_and_are_reproducible():
    items = chain.samples("test", len(KINDS))
    assert tuple(i.kind for i in items) == KINDS
    assert all(len(i.images) == (2 if i.kind in PAIRS else 1) and i.needed.shape == (256 * len(i.images),) for i in items)
    again = chain.sample("test", 9)
    assert (again.question, [x.tobytes() for x in again.images]) == (items[9].question, [x.tobytes() for x in items[9].images])
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
        (lambda: question(grid_scene("test", 0, 0), "riddle", np.random.default_rng(0)), "unknown question kind 'riddle'"),
        (lambda: pair_question((grid_scene("test", 0, 0),) * 2, "hop1", np.random.default_rng(0)), "unknown question kind 'hop1'"),
    ],
)
def test_mistakes_are_explained(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_every_kind_has_a_chance_level():
    assert set(CHANCE) == set(KINDS) == {*SINGLE, *PAIRS}
