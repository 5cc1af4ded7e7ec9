"""``tiny-page``: pages of four crops with small print, and a stock LLaVA-NeXT that learned to read them from answers alone.

>>> from duet_vlm.tiny import page
>>> item = page.sample("test", 5)
>>> item.kind, item.image.size, item.needed.shape
('hop1', (448, 448), (1312,))
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from duet_vlm.tiny import first
from duet_vlm.tiny.text import prompt

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

__all__ = ["PageSample", "load", "path", "prompt", "sample", "samples"]

_TRIES = 16  # pages looked at for one question; a page does not offer every kind


@dataclass(frozen=True)
class PageSample:
    """One question about one page.

    Attributes
    ----------
    image : PIL.Image.Image
        448 x 448.
    question, answer, kind : str
    needed : numpy.ndarray, (1312,) bool
        The visual rows that the answer needs, as LLaVA-NeXT packs them: 256 of the overview, of which none is ever marked, then 32 lines of 32
        patches of the page and a newline. Patches of two crops that lie side by side share a line.
    """

    image: Image.Image
    question: str
    answer: str
    kind: str
    needed: np.ndarray


def path() -> Path:
    """Folder of the shipped weights; works with ``from_pretrained``."""
    return Path(__file__).parent / "page_weights"


def load(dtype: torch.dtype | None = None) -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    """The trained model in evaluation mode and its processor, from the package, without network; float32 unless ``dtype`` is given."""
    import torch
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration.from_pretrained(path(), dtype=dtype or torch.float32, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(path(), local_files_only=True)


def sample(split: str, index: int, seed: int = 0) -> PageSample:
    """Sample number ``index`` of the stream (split, seed); the kinds of question take turns.

    Parameters
    ----------
    split : str
        "train", "validation" or "test".
    index, seed : int
    """
    from PIL import Image

    from duet_vlm.tiny.page_questions import KINDS, needed_of, question
    from duet_vlm.tiny.page_scenes import page, render_page

    if index < 0:
        raise ValueError(f"index must be 0 or more, got {index}")
    kind = KINDS[index % len(KINDS)]
    for attempt in range(_TRIES):
        drawn = page(split, seed, index * _TRIES + attempt)
        asked = question(drawn, kind, drawn.generator(2))
        if asked:
            return PageSample(Image.fromarray(render_page(drawn)), asked.text, asked.answer, kind, needed_of(drawn, asked))
    raise RuntimeError(f"none of {_TRIES} pages offers a {kind} question (split {split!r}, seed {seed}, index {index})")


def samples(split: str, n: int, seed: int = 0) -> list[PageSample]:
    """The first ``n`` samples of a stream; splits are disjoint by construction."""
    return first(n, lambda index: sample(split, index, seed))
