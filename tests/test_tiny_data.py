"""The procedural pictures and questions: reproducible, disjoint, and right."""

import hashlib
import re

import numpy as np
import pytest

from duet_vlm.evaluation import tiny
from duet_vlm.evaluation.tiny import assets, backgrounds
from duet_vlm.evaluation.tiny.labels import LABELS, body_patches, center_patch, patch_labels, tag_patches
from duet_vlm.evaluation.tiny.questions import CHANCE, KINDS, PLURALS, needed_patches, question, questions, split_words
from duet_vlm.evaluation.tiny.render import render
from duet_vlm.evaluation.tiny.scenes import COLOR_NAMES, IMAGE_SIZE, SHAPES, generator, scene
from duet_vlm.evaluation.tiny.text import TOKEN

PINNED = "70d0d8c193bfd718c20cd5b7a3009b411c1a9dccaaf61f7460a3f2cfcee18c8a"


def stream_hash() -> str:
    digest = hashlib.sha256()
    for i in range(20):
        item = tiny.sample("test", i)
        digest.update(item.image.tobytes())
        digest.update(f"{item.question}|{item.answer}|{item.kind}".encode())
        digest.update(np.packbits(item.needed).tobytes())
    return digest.hexdigest()


def test_twenty_scenes_are_pinned():
    assert stream_hash() == PINNED


def test_same_index_same_sample():
    a, b = tiny.sample("validation", 5, seed=3), tiny.samples("validation", 6, seed=3)[5]
    assert (a.question, a.answer, a.image.tobytes()) == (b.question, b.answer, b.image.tobytes())


def test_streams_are_disjoint():
    streams = [
        (split, seed, crowded)
        for split in ("train", "validation", "test")
        for seed in (0, 1)
        for crowded in (False, True)
    ]
    scenes = [scene(split, seed, i, crowded=crowded) for split, seed, crowded in streams for i in range(10)]
    assert len({render(s).tobytes() for s in scenes}) == len({s.things for s in scenes}) == len(scenes)
    numbers = [generator("test", 0, 0, purpose).random() for purpose in range(4)] + [
        s.generator(2).random() for s in scenes
    ]
    assert len(set(numbers)) == len(numbers) - 1  # the questions of (test, 0, 0) stand in both lists


def test_test_stream_has_its_own_glyphs_and_backgrounds():
    def variants(split: str) -> set[int]:
        return {t.tag.variant for i in range(60) for t in scene(split, 0, i).things if t.tag and t.tag.kind == "digit"}

    assert max(variants("train") | variants("validation")) < 500 <= min(variants("test"))
    train = {f[::16, ::16].tobytes() for f in backgrounds.fields("train")}
    assert not train & {f[::16, ::16].tobytes() for f in backgrounds.fields("test")}


def test_assets_are_what_the_script_draws():
    rng = np.random.default_rng(0)
    with np.load(assets.FILE) as z:
        assert z["digits"].shape == (10, assets.DIGIT_VARIANTS, 28, 28)
        assert np.array_equal(z["digits"][0, :3], np.stack([assets.digit_glyph(0, rng) for _ in range(3)]))


def answer_from_description(text: str, things) -> str:
    """Read a question with regular expressions and answer it from the list of things: nothing shared with the
    generator."""
    described = [(SHAPES[t.shape], COLOR_NAMES[t.color], t) for t in things]

    def only(name: str):
        (found,) = [d for d in described if d[0] == name]
        return found

    if m := re.fullmatch(r"What color is the (\w+)\?", text):
        return only(m[1])[1]
    if m := re.fullmatch(r"What shape is the (\w+) object\?", text):
        (found,) = [d for d in described if d[1] == m[1]]
        return found[0]
    if m := re.fullmatch(r"Is there a (\w+) (\w+)\?", text):
        return "yes" if any(d[:2] == (m[2], m[1]) for d in described) else "no"
    if m := re.fullmatch(r"What (number|word) is next to the (\w+)\?", text):
        tag = only(m[2])[2].tag
        return str(tag.value) if m[1] == "number" else assets.WORDS[tag.value]
    if m := re.fullmatch(r"How many (\w+) are there\?", text):
        return str(sum(PLURALS[SHAPES.index(d[0])] == m[1] for d in described))
    if m := re.fullmatch(r"Is the (\w+) (left of|right of|above|below) the (\w+)\?", text):
        (ax, ay), (bx, by) = only(m[1])[2].center, only(m[3])[2].center
        return "yes" if {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[m[2]] else "no"
    if m := re.fullmatch(r"Is the (\w+) larger than the (\w+)\?", text):
        return "yes" if only(m[1])[2].size > only(m[2])[2].size else "no"
    m = re.fullmatch(r"Do the (\w+) and the (\w+) have the same color\?", text)
    return "yes" if only(m[1])[1] == only(m[2])[1] else "no"


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_from_the_description(kind, crowded):
    asked = 0
    for i in range(80):
        drawn = scene("test", 5, i, crowded=crowded)
        found = question(drawn, kind, drawn.generator(2))
        if found:
            asked += 1
            assert answer_from_description(found.text, drawn.things) == found.answer
    assert asked > 40


@pytest.mark.parametrize("crowded", [False, True])
def test_answers_cannot_be_guessed(crowded):
    drawn = [scene("validation", 0, i, crowded=crowded) for i in range(500)]
    asked = [q for d in drawn for q in questions(d, 6, d.generator(2))]
    for kind in KINDS:
        answers = [q.answer for q in asked if q.kind == kind]
        most = max(answers.count(a) for a in set(answers)) / len(answers)
        assert most < CHANCE[kind] + 0.12, (kind, most)


def test_all_words_are_known_and_mentions_point_at_names():
    names = {*SHAPES, *PLURALS, "object"}
    for i in range(50):
        for q in questions(scene("train", 0, i), 10, generator("train", 0, i, 2)):
            words = split_words(q.text)
            assert all(w in TOKEN for w in [*words, q.answer])
            assert all(words[place] in names for place, _ in q.mentions)


def test_needed_patches_cover_things_and_tags():
    for i in range(60):
        drawn = scene("test", 1, i)
        for q in questions(drawn, 6, generator("test", 1, i, 2)):
            needed = needed_patches(drawn, q)
            assert needed.any() == bool(q.needed)
            for t in (drawn.things[n] for n in q.needed):
                assert needed[center_patch(t)] and (needed >= body_patches(t)).all()
                assert not q.reads or (needed >= tag_patches(t)).all()


def boxes(things) -> np.ndarray:
    """(n, 4) x, y, width, height of things and tags."""
    parts = [(t.x, t.y, t.size, t.size) for t in things] + [
        (t.tag.x, t.tag.y, t.tag.width, t.tag.height) for t in things if t.tag
    ]
    return np.array(parts)


def test_crowded_pictures_hold_more_than_a_small_budget():
    asked_about = []
    for i in range(100):
        plain, crowded = scene("test", 0, i), scene("test", 0, i, crowded=True)
        shapes = [t.shape for t in crowded.things]
        single = [t for t in crowded.things if shapes.count(t.shape) == 1]
        assert len(single) >= 9 > sum([t.shape for t in plain.things].count(s.shape) == 1 for s in plain.things)
        assert all(t.tag for t in crowded.things) and {t.size for t in crowded.things} <= {21, 28}
        asked_about.append(np.any([body_patches(t) | tag_patches(t) for t in single], 0).sum())
        corners = boxes(crowded.things)
        assert corners[:, :2].min() >= 0 and (corners[:, :2] + corners[:, 2:]).max() <= IMAGE_SIZE
        covered = np.zeros((IMAGE_SIZE, IMAGE_SIZE), int)
        for x, y, w, h in corners:
            covered[y : y + h, x : x + w] += 1
        assert covered.max() == 1
    assert min(asked_about) > 0.11 * 256 and np.mean(asked_about) > 0.22 * 256


def test_crowded_answers_are_balanced():
    drawn = [scene("validation", 1, i, crowded=True) for i in range(1000)]
    counts = [d.count for d in drawn]
    assert all(abs(counts.count(n) / 1000 - 0.2) < 0.05 for n in range(5))  # four standard errors
    for kind in ("existence", "spatial", "compare"):
        answers = [q.answer for d in drawn if (q := question(d, kind, d.generator(2)))]
        assert len(answers) > 950 and abs(answers.count("yes") / len(answers) - 0.5) < 0.065


def test_labels_of_centres_and_tags():
    drawn = scene("train", 0, 3)
    labels = patch_labels(drawn)
    assert labels.shape == (256, len(LABELS)) and (labels < list(LABELS.values())).all()
    for t in drawn.things:
        assert tuple(labels[center_patch(t), :3]) == (2, t.shape + 1, t.color + 1)
        assert not t.tag or (labels[tag_patches(t), 1] == t.shape + 1).any()


def test_pictures_have_the_expected_form():
    picture = render(scene("test", 0, 0))
    assert picture.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and picture.dtype == np.uint8
    assert render(scene("train", 0, 0), plain=1.0).std() < 90


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tiny.sample("tests", 0), "unknown split 'tests'"),
        (lambda: tiny.sample("test", -1), "index must be 0 or more"),
        (lambda: tiny.samples("test", -2), "n must be 0 or more"),
        (lambda: question(scene("test", 0, 0), "riddle", generator("test", 0, 0)), "unknown question kind 'riddle'"),
    ],
)
def test_mistakes_are_explained(call, words):
    with pytest.raises(ValueError, match=words):
        call()
