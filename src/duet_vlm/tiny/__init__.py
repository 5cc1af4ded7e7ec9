"""A small LLaVA that ships inside the package, trained by us on procedural pictures: for tests, demos and honest benchmarks.

>>> from duet_vlm import tiny
>>> model, processor = tiny.load()
>>> item = tiny.samples("test", 1)[0]
>>> inputs = processor(images=item.image, text=tiny.prompt(item.question), return_tensors="pt")
>>> answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
>>> processor.decode(answer, skip_special_tokens=True) == item.answer
True
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = ["DemoImage", "Sample", "demo_images", "load", "path", "prompt", "sample", "samples"]

_HERE = Path(__file__).parent
Drawn = TypeVar("Drawn")
_TRIES = 16  # scenes looked at for one question; a scene does not offer every kind


@dataclass(frozen=True)
class Sample:
    """One picture with one question.

    Attributes
    ----------
    image : PIL.Image.Image
        224 x 224.
    question, answer, kind : str
    needed : numpy.ndarray, (256,) bool
        The patches that the answer needs, row by row; all False where the right answer is that something is absent.
    """

    image: Image.Image
    question: str
    answer: str
    kind: str
    needed: np.ndarray


@dataclass(frozen=True)
class DemoImage:
    """One shipped picture with (question, answer) pairs."""

    name: str
    image: Image.Image
    questions: tuple[tuple[str, str], ...]


def path() -> Path:
    """Folder of the shipped weights; works with ``from_pretrained``."""
    return _HERE / "weights"


def load(dtype: torch.dtype | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The trained model in evaluation mode and its processor, from the package, without network.

    Parameters
    ----------
    dtype : torch.dtype, optional
        float32 unless given; the file is in float16.
    """
    return load_from(path(), dtype)


def load_from(folder: Path, dtype: torch.dtype | None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA of the package, from its folder."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype or torch.float32, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)


def prompt(question: str) -> str:
    """The text that goes to the processor together with one image."""
    from duet_vlm.tiny.text import prompt as build

    return build(question)


def sample(split: str, index: int, seed: int = 0, crowded: bool = False) -> Sample:
    """Sample number ``index`` of the stream (split, seed, crowded); the kinds of question take turns.

    Parameters
    ----------
    split : str
        "train", "validation" or "test".
    index, seed : int
    crowded : bool
        A harder test set for the same weights; training never showed such pictures. On the default stream the good methods stay
        within noise of the full model at 22 % of the tokens: 4 or 5 things can be asked about, and a small budget holds them
        all. A crowded picture shows 9, next to up to 4 counted ones. All are small (21 or 28 pixels) and carry a digit or a
        word: what may be asked about covers more patches than a small budget holds. Questions, their kinds and the balance of
        their answers are the same. The full model loses hardly anything but counting (it counts too many in a
        crowd), so read the kinds apart.
    """
    from PIL import Image

    from duet_vlm.tiny.questions import KINDS, needed_patches, question
    from duet_vlm.tiny.render import render
    from duet_vlm.tiny.scenes import scene

    if index < 0:
        raise ValueError(f"index must be 0 or more, got {index}")
    kind = KINDS[index % len(KINDS)]
    for attempt in range(_TRIES):
        drawn = scene(split, seed, index * _TRIES + attempt, crowded=crowded)
        asked = question(drawn, kind, drawn.generator(2))
        if asked:
            return Sample(Image.fromarray(render(drawn)), asked.text, asked.answer, kind, needed_patches(drawn, asked))
    raise RuntimeError(f"none of {_TRIES} scenes offers a {kind} question (split {split!r}, seed {seed}, index {index})")


def samples(split: str, n: int, seed: int = 0, crowded: bool = False) -> list[Sample]:
    """The first ``n`` samples of a stream.

    Parameters
    ----------
    split : str
        "train", "validation" or "test": disjoint by construction, the split is part of the random seed.
    n : int
    seed : int
    crowded : bool
        The harder stream, see :func:`sample`.
    """
    return first(n, lambda index: sample(split, index, seed, crowded))


def first(n: int, drawn: Callable[[int], Drawn]) -> list[Drawn]:
    """Numbers 0 to ``n`` - 1 of a stream."""
    if n < 0:
        raise ValueError(f"n must be 0 or more, got {n}")
    return [drawn(index) for index in range(n)]


def demo_images() -> list[DemoImage]:
    """The shipped demo pictures with their questions and right answers."""
    from duet_vlm.inputs.images import open_image

    listed = json.loads((_HERE / "demo" / "questions.json").read_text())
    out = []
    for name, pairs in listed.items():
        out.append(DemoImage(name, open_image(_HERE / "demo" / name), tuple((q, a) for q, a in pairs)))
    return out
