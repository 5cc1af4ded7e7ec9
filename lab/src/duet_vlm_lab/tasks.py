"""The tasks of the lab: streams of generated questions, each with a small model that was trained to answer them.

``tiny-crowded``
    A harder test set for the weights of ``tiny``; training never showed such pictures. On the default stream the good
    methods stay within noise of the full model at 22 % of the tokens: 4 or 5 things can be asked about, and a small
    budget holds them all. A crowded picture shows 9, next to up to 4 counted ones. All are small (21 or 28 pixels) and
    carry a digit or a word: what may be asked about covers more patches than a small budget holds. Questions, their
    kinds and the balance of their answers are the same. The full model loses hardly anything but counting (it counts
    too many in a crowd), so read the kinds apart.
``tiny-chain``
    Questions that need one to three hops over a picture, or two pictures, next to the kinds of ``tiny``; the model
    learned from answers alone.
``tiny-page``
    Pages of four crops with small print, for a stock LLaVA-NeXT that learned to read them from answers alone.
``tiny-video``
    Clips of eight frames, for a stock Video-LLaVA.
``tiny-long``
    Clips of 64 to 256 frames in which what is asked about is over soon, for a stock Video-LLaVA.

>>> from duet_vlm_lab.tasks import chain, page
>>> item = chain.sample("test", 8)
>>> item.kind, len(item.images)
('hop2', 1)
>>> item = page.sample("test", 5)
>>> item.kind, item.image.size, item.needed.shape
('hop1', (448, 448), (1312,))
"""

from __future__ import annotations

from functools import partial

import numpy as np
from PIL import Image

from duet_vlm.api.embedded import EmbeddedTask, Sample
from duet_vlm.evaluation import tiny
from duet_vlm.evaluation.tiny.render import render
from duet_vlm_lab import models
from duet_vlm_lab.generators import (
    chain_questions,
    chain_scenes,
    clips,
    clips_questions,
    long_clips,
    long_questions,
    page_questions,
    page_scenes,
)

# samples of tiny-long with clips of one length, then come those of the next: batches that divide it hold equally long
# clips
TURN = 40


def draw_chain(split: str, seed: int, number: int, kind: str) -> Sample | None:
    """One or two pictures of 224 x 224; ``needed`` is (256 x pictures,): of a chain, everything it passes and what is
    read."""
    scenes = [chain_scenes.grid_scene(split, seed, 2 * number)]
    rng = scenes[0].generator(2)
    if kind in chain_questions.SINGLE:
        asked = chain_questions.question(scenes[0], kind, rng)
        needed = chain_questions.needed_of(scenes[0], asked) if asked else None
    else:
        scenes.append(chain_scenes.grid_scene(split, seed, 2 * number + 1))
        asked = chain_questions.pair_question((scenes[0], scenes[1]), kind, rng)
        needed = asked.needed if asked else None
    if asked is None or needed is None:
        return None
    return Sample(asked.text, asked.answer, kind, needed, tuple(Image.fromarray(render(scene)) for scene in scenes))


def draw_page(split: str, seed: int, number: int, kind: str) -> Sample | None:
    """A page of 448 x 448. ``needed`` is (1312,), as LLaVA-NeXT packs its visual tokens.

    First 256 of the overview, of which none is ever marked, then 32 lines of 32 patches of the page and a newline.
    Patches of two crops that lie side by side share a line.
    """
    drawn = page_scenes.page(split, seed, number)
    asked = page_questions.question(drawn, kind, drawn.generator(2))
    if asked is None:
        return None
    picture = Image.fromarray(page_scenes.render_page(drawn))
    return Sample(asked.text, asked.answer, kind, page_questions.needed_of(drawn, asked), (picture,))


def draw_clip(split: str, seed: int, number: int, kind: str) -> Sample:
    """Eight frames of 112 x 112; ``needed``, frame by frame: CLS, then 64 patches row by row."""
    drawn = clips.clip(split, seed, number)
    return clip_sample(clips.render(drawn), clips_questions.question(drawn, kind, drawn.generator(2)))


def draw_long(split: str, seed: int, number: int, kind: str) -> Sample:
    """64 to 256 frames of 28 x 28; ``needed``, frame by frame: CLS, then 4 patches. Every ``TURN`` samples the length
    of clips changes."""
    drawn = long_clips.long_clip(split, seed, number, long_clips.LENGTHS[number // TURN % len(long_clips.LENGTHS)])
    return clip_sample(long_clips.render(drawn), long_questions.question(drawn, kind, drawn.generator(2)))


def clip_sample(pixels: np.ndarray, asked: clips_questions.ClipQuestion | long_questions.LongQuestion) -> Sample:
    """A clip (frames, height, width, 3) with a question about it."""
    return Sample(asked.text, asked.answer, asked.kind, asked.needed, frames=tuple(map(Image.fromarray, pixels)))


crowded = EmbeddedTask("tiny-crowded", tiny.MODEL, tiny.TASK.kinds, partial(tiny.draw, crowded=True), tiny.TRIES)
chain = EmbeddedTask("tiny-chain", models.chain, chain_questions.KINDS, draw_chain, tries=64)
page = EmbeddedTask("tiny-page", models.page, page_questions.KINDS, draw_page, tries=16)
video = EmbeddedTask("tiny-video", models.video, clips_questions.KINDS, draw_clip, media="<video>")
long = EmbeddedTask("tiny-long", models.long, long_questions.KINDS, draw_long, media="<video>")
