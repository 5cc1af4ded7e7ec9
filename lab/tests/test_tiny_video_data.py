"""The procedural clips and their questions: reproducible, right, and not to be answered without time."""

import dataclasses
import hashlib
import re

import numpy as np
import pytest

from duet_vlm.evaluation.tiny.assets import WORDS
from duet_vlm.evaluation.tiny.questions import PLURALS, split_words
from duet_vlm.evaluation.tiny.scenes import COLOR_NAMES, SHAPES
from duet_vlm_lab.generators.clips import CLIP_ROWS, FRAMES, HIDDEN, PATCH, ROWS, Clip, center, clip, covered, render
from duet_vlm_lab.generators.clips_questions import CHANCE, KINDS, ORDERLESS, question, questions
from duet_vlm_lab.networks.video_network import VIDEO_TOKEN
from duet_vlm_lab.tasks import video

PINNED = "7174ee6cc9a30eb108d92f56a723568ad34ae2e740db98b98b53d59a42cadaa1"
MIRRORED = [kind for kind in KINDS if kind != "count"]


def test_twenty_clips_are_pinned():
    digest = hashlib.sha256()
    for item in video.samples("test", 20):
        for frame in item.frames:
            digest.update(frame.tobytes())
        digest.update(f"{item.question}|{item.answer}|{item.kind}".encode())
        digest.update(np.packbits(item.needed).tobytes())
    assert digest.hexdigest() == PINNED


def test_same_index_same_sample():
    a, b = video.sample("validation", 5, seed=3), video.samples("validation", 6, seed=3)[5]
    assert (a.question, a.answer, [f.tobytes() for f in a.frames]) == (
        b.question,
        b.answer,
        [f.tobytes() for f in b.frames],
    )
    assert (
        all(frame.size == (112, 112) and frame.mode == "RGB" for frame in a.frames)
        and len(a.frames) == 8
        and a.needed.shape == (520,)
    )


def test_streams_are_disjoint():
    clips = [clip(split, seed, i) for split in ("train", "validation", "test") for seed in (0, 1) for i in range(10)]
    assert len({render(c).tobytes() for c in clips}) == len({c.actors for c in clips}) == len(clips)


def answer_from_description(text: str, shown: Clip) -> str:
    """Read a question with regular expressions and answer it from what every frame shows: nothing shared with the
    generator."""
    things = [[(SHAPES[a.value], COLOR_NAMES[a.colors[f]], a.places[f]) for a in shown.actors if a.role != "word" and a.colors[f] != HIDDEN]
              for f in range(FRAMES)]  # fmt: skip
    words = [
        [WORDS[a.value] for a in shown.actors if a.role == "word" and a.colors[f] != HIDDEN] for f in range(FRAMES)
    ]

    def seen(name: str) -> list:  # (frame, colour, place) of the thing, in order
        return [(f, color, place) for f in range(FRAMES) for shape, color, place in things[f] if shape == name]

    if m := re.fullmatch(r"Where does the (\w+) move\?", text):
        (_, _, (x0, y0)), (_, _, (x1, y1)) = seen(m[1])[0], seen(m[1])[-1]
        return ("right" if x1 > x0 else "left") if x1 != x0 else ("down" if y1 > y0 else "up")
    if m := re.fullmatch(r"Does the (\w+) appear (before|after) the (\w+)\?", text):
        sooner = seen(m[1])[0][0] < seen(m[3])[0][0]
        return "yes" if sooner == (m[2] == "before") else "no"
    if m := re.fullmatch(r"What is the (first|last) color of the (\w+)\?", text):
        return seen(m[2])[0 if m[1] == "first" else -1][1]
    if m := re.fullmatch(r"What is the (first|last) word\?", text):
        return [word for frame in words for word in frame][0 if m[1] == "first" else -1]
    m = re.fullmatch(r"How many (\w+) appear\?", text)
    return str(len(seen(SHAPES[PLURALS.index(m[1])])))  # each shows in one frame


@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_from_the_description(kind):
    for i in range(150):
        drawn = clip("test", 5, i)
        found = question(drawn, kind, drawn.generator(2))
        assert answer_from_description(found.text, drawn) == found.answer


def test_answers_cannot_be_guessed():
    drawn = [clip("validation", 0, i) for i in range(600)]
    asked = [q for d in drawn for q in questions(d, KINDS, d.generator(2))]
    for kind in KINDS:
        answers = [q.answer for q in asked if q.kind == kind]
        most = max(answers.count(a) for a in set(answers)) / len(answers)
        assert most < CHANCE[kind] + 0.08 and CHANCE[kind] <= ORDERLESS[kind], (kind, most)


def test_backwards_means_the_same_pictures():
    drawn = clip("test", 2, 0)
    assert np.array_equal(render(drawn.reversed()), render(drawn)[::-1])


@pytest.mark.parametrize("kind", MIRRORED)
def test_no_frame_answers_what_depends_on_order(kind):
    """Every frame of a clip is a frame of the clip played backwards, where the answer is another one."""
    for i in range(100):
        drawn = clip("test", 6, i)
        found = question(drawn, kind, drawn.generator(2))
        assert answer_from_description(found.text, drawn.reversed()) != found.answer


def test_no_frame_answers_how_many_appear():
    """For every frame there is a clip with the same frame and another count: one thing fewer or one more elsewhere."""
    for i in range(100):
        drawn = clip("test", 7, i)
        flashes = [a for a in drawn.actors if a.role == "flash"]
        assert [len(a.frames) for a in flashes] == [1] * len(flashes) and len({a.frames[0] for a in flashes}) == len(
            flashes
        )
        text = f"How many {PLURALS[flashes[0].value]} appear?"
        for frame in range(FRAMES):
            elsewhere = [a for a in flashes if a.frames != [frame]]
            if elsewhere:
                other = [a for a in drawn.actors if a is not elsewhere[0]]
            else:
                other = [
                    *drawn.actors,
                    dataclasses.replace(flashes[0], colors=flashes[0].colors[-1:] + flashes[0].colors[:-1]),
                ]
            twin = dataclasses.replace(drawn, actors=tuple(other))
            assert scenery(twin, frame) == scenery(drawn, frame)
            assert answer_from_description(text, twin) != answer_from_description(text, drawn)


def scenery(drawn: Clip, frame: int) -> set:
    return {
        (a.role == "word", a.value, a.colors[frame], a.places[frame], a.variant)
        for a in drawn.actors
        if a.colors[frame] != HIDDEN
    }


def test_words_and_flashes_are_brief():
    for i in range(100):
        for actor in clip("train", 0, i).actors:
            assert len(actor.frames) <= {"word": 2, "flash": 1, "comer": 3}.get(actor.role, FRAMES)


def test_covered_rows_hold_the_ink():
    """Where a frame changes when an actor comes or goes, the rows that it covers are; CLS shows nothing by itself."""
    for i in range(30):
        drawn = clip("test", 1, i)
        for actor in drawn.actors:
            rows = covered(actor)
            assert not rows[:, 0].any() and rows.any(1).tolist() == [color != HIDDEN for color in actor.colors]
            for frame in actor.frames:
                x, y = actor.places[frame]
                box = {1 + r * 8 + c for r in range(y // PATCH, (y + actor.height - 1) // PATCH + 1)
                       for c in range(x // PATCH, (x + actor.width - 1) // PATCH + 1)}  # fmt: skip
                assert set(np.flatnonzero(rows[frame])) <= box and rows[frame, center(actor, frame)]


def test_evidence_is_enough_for_the_answer():
    """The needed rows, and nothing else, answer the question by the independent reader."""
    for i in range(100):
        drawn = clip("test", 8, i)
        for q in questions(drawn, KINDS, drawn.generator(2)):
            assert q.needed.shape == (CLIP_ROWS,) and q.needed.any() == (q.answer != "0")
            shown = []
            for actor in drawn.actors:
                frames = [f for f in actor.frames if q.needed[f * ROWS + center(actor, f)]]
                if frames:
                    colors = tuple(c if f in frames else HIDDEN for f, c in enumerate(actor.colors))
                    shown.append(dataclasses.replace(actor, colors=colors))
            assert answer_from_description(q.text, dataclasses.replace(drawn, actors=tuple(shown))) == q.answer


def test_all_words_are_known_and_mentions_point_at_names():
    names = {*SHAPES, *PLURALS, "word"}
    for i in range(50):
        drawn = clip("train", 0, i)
        for q in questions(drawn, KINDS, drawn.generator(2)):
            words = split_words(q.text)
            assert all(w in VIDEO_TOKEN for w in [*words, q.answer])
            assert all(words[place] in names for place, _ in q.mentions)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: video.sample("tset", 0), "unknown split 'tset'"),
        (lambda: video.sample("test", -1), "index must be 0 or more"),
        (lambda: video.samples("test", -1), "n must be 0 or more"),
        (lambda: question(clip("test", 0, 0), "colour", np.random.default_rng(0)), "unknown question kind 'colour'"),
    ],
)
def test_mistakes_are_explained(call, words):
    with pytest.raises(ValueError, match=words):
        call()
