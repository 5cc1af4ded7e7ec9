"""The lessons that only training asks: read with regular expressions and answered from what is drawn."""

import re

import numpy as np
import pytest
from test_tiny_chain_data import by_cell

from duet_vlm.evaluation.tiny.assets import WORDS
from duet_vlm.evaluation.tiny.questions import split_words
from duet_vlm.evaluation.tiny.scenes import COLOR_NAMES
from duet_vlm_lab.generators.chain_questions import KINDS
from duet_vlm_lab.generators.chain_scenes import grid_scene
from duet_vlm_lab.networks.chain_network import CHAIN_TOKEN
from duet_vlm_lab.recipe.chain_lessons import LESSONS, ChainTeacher, questions
from duet_vlm_lab.tasks import chain


def place(name: str) -> tuple[int, int]:
    """ "b3" -> (row 2, column 1)."""
    return int(name[1]) - 1, "abcd".index(name[0])


def answered(text: str, scene) -> str:
    """Slowly, from the words and the cells."""
    cells = by_cell(scene)
    if asked := re.fullmatch(r"Is (\w\d) (.*) (\w\d)\?", text):
        (r1, c1), (r2, c2) = place(asked[1]), place(asked[3])
        return (
            "yes" if {"left of": c1 < c2, "right of": c1 > c2, "above": r1 < r2, "below": r1 > r2}[asked[2]] else "no"
        )
    start, moves, read = re.fullmatch(r"(\w+)((?:, [\w ]+)*): (?:what )?(\w+ ?\w*)\?", text).groups()
    named = [cell for cell, (shape, _, _) in cells.items() if shape == start.lower()]
    (at,) = named or [place(start.lower())]
    for move in filter(None, moves.split(", ")):
        if move in ("right", "above"):
            at = (at[0], at[1] + 1) if move == "right" else (at[0] - 1, at[1])
            continue
        color = move if move in COLOR_NAMES else cells[at][1]
        (at,) = [cell for cell, (_, other, _) in cells.items() if other == color and cell != at]
    shape, color, thing = cells[at]
    if read == "how many":
        return str(sum(other == shape for other, _, _ in cells.values()))
    tag = thing.tag and (str(thing.tag.value) if thing.tag.kind == "digit" else WORDS[thing.tag.value])
    return {"shape": shape, "color": color, "tag": tag, "cell": f"{'abcd'[at[1]]}{at[0] + 1}"}[read]


@pytest.mark.parametrize("side", [2, 3, 4])
@pytest.mark.parametrize("kind", LESSONS)
def test_lessons_have_right_answers_in_known_words(kind: str, side: int) -> None:
    found = 0
    for i in range(40):
        scene = grid_scene("train", 5, i, side)
        asked = getattr(ChainTeacher(scene, scene.generator(2)), kind)()
        if asked is not None:
            found += 1
            assert asked.kind == kind and asked.answer == answered(asked.text, scene), asked.text
            assert {*split_words(asked.text), asked.answer} <= CHAIN_TOKEN.keys()
    assert found >= (20 if side > 2 else 4)


def test_yes_and_no_are_as_frequent() -> None:
    said = [
        questions(scene, ["order"], scene.generator(2))[0].answer
        for scene in (grid_scene("train", 6, i) for i in range(300))
    ]
    assert 0.42 < np.mean([answer == "yes" for answer in said]) < 0.58


def test_the_task_asks_no_lesson() -> None:
    asked = [chain.sample("test", i, 9) for i in range(2 * len(KINDS))]
    assert {item.kind for item in asked} == set(KINDS) and not set(KINDS) & set(LESSONS)
    assert not any(
        re.search(r"\b[a-d][1-4]\b|what cell|what color", item.question.lower())
        for item in asked
        if item.kind.startswith("hop")
    )
