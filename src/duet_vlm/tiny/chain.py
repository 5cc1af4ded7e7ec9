"""``tiny-chain``: questions that need one to three hops over a picture, or two pictures, next to the kinds of the tiny model; and a model
that learned to answer them from answers alone.

>>> from duet_vlm.tiny import chain
>>> item = chain.sample("test", 8)
>>> item.kind, len(item.images)
('hop2', 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from duet_vlm.tiny import first, load_from

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = ["ChainSample", "load", "path", "prompt", "sample", "samples"]

_TRIES = 64  # pictures looked at for one question; a picture does not offer every kind


@dataclass(frozen=True)
class ChainSample:
    """One question about one picture or about two.

    Attributes
    ----------
    images : tuple of PIL.Image.Image
        One or two, 224 x 224.
    question, answer, kind : str
    needed : numpy.ndarray, (256 x images,) bool
        The patches that the answer needs, picture by picture, row by row: of a chain, everything it goes through and what is read.
    """

    images: tuple[Image.Image, ...]
    question: str
    answer: str
    kind: str
    needed: np.ndarray


def path() -> Path:
    """Folder of the shipped weights; works with ``from_pretrained``."""
    return Path(__file__).parent / "chain_weights"


def load(dtype: torch.dtype | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The trained model in evaluation mode and its processor, from the package, without network; float32 unless ``dtype`` is given."""
    return load_from(path(), dtype)


def prompt(question: str, images: int = 1) -> str:
    """The text that goes to the processor together with the pictures."""
    return "USER: " + "<image>\n" * images + f"{question} ASSISTANT:"


def sample(split: str, index: int, seed: int = 0) -> ChainSample:
    """Sample number ``index`` of the stream (split, seed); the kinds of question take turns.

    Parameters
    ----------
    split : str
        "train", "validation" or "test".
    index, seed : int
    """
    from PIL import Image

    from duet_vlm.tiny.chain_questions import KINDS, SINGLE, needed_of, pair_question, question
    from duet_vlm.tiny.chain_scenes import grid_scene
    from duet_vlm.tiny.render import render

    if index < 0:
        raise ValueError(f"index must be 0 or more, got {index}")
    kind, first = KINDS[index % len(KINDS)], 2 * _TRIES * index
    for attempt in range(_TRIES):
        scenes = [grid_scene(split, seed, first + 2 * attempt)]
        rng = scenes[0].generator(2)
        if kind in SINGLE:
            asked = question(scenes[0], kind, rng)
            needed = needed_of(scenes[0], asked) if asked else None
        else:
            scenes.append(grid_scene(split, seed, first + 2 * attempt + 1))
            asked = pair_question((scenes[0], scenes[1]), kind, rng)
            needed = asked.needed if asked else None
        if asked and needed is not None:
            return ChainSample(tuple(Image.fromarray(render(s)) for s in scenes), asked.text, asked.answer, kind, needed)
    raise RuntimeError(f"none of {_TRIES} pictures offers a {kind} question (split {split!r}, seed {seed}, index {index})")


def samples(split: str, n: int, seed: int = 0) -> list[ChainSample]:
    """The first ``n`` samples of a stream; splits are disjoint by construction."""
    return first(n, lambda index: sample(split, index, seed))
