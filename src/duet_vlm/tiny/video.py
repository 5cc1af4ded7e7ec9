"""A second tiny model, for video: a stock Video-LLaVA that reads eight frames, and the questions that it answers.

>>> from duet_vlm.tiny import video
>>> model, processor = video.load()
>>> item = video.samples("test", 1)[0]
>>> inputs = processor(videos=[item.frames], text=video.prompt(item.question), return_tensors="pt")
>>> answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
>>> processor.decode(answer, skip_special_tokens=True) == item.answer
True
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from duet_vlm.tiny import first

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image
    from transformers import VideoLlavaForConditionalGeneration

    from duet_vlm.tiny.clips_questions import ClipQuestion
    from duet_vlm.tiny.long_questions import LongQuestion
    from duet_vlm.tiny.video_processor import TinyVideoProcessor

__all__ = ["ClipSample", "load", "path", "prompt", "sample", "samples"]

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class ClipSample:
    """One clip with one question.

    Attributes
    ----------
    frames : tuple of PIL.Image.Image
        Eight frames of 112 x 112; of ``tiny-long`` 64 to 256 of 28 x 28.
    question, answer, kind : str
    needed : numpy.ndarray, (rows of the clip,) bool
        The visual rows that prove the answer, frame by frame: CLS, then 64 (4) patches row by row. All False where the answer is none.
    """

    frames: tuple[Image.Image, ...]
    question: str
    answer: str
    kind: str
    needed: np.ndarray


def path() -> Path:
    """Folder of the shipped weights; works with ``from_pretrained``."""
    return _HERE / "video_weights"


def load(dtype: torch.dtype | None = None) -> tuple[VideoLlavaForConditionalGeneration, TinyVideoProcessor]:
    """The trained model in evaluation mode and its processor, from the package, without network; float32 unless ``dtype`` is given."""
    return load_from(path(), dtype)


def load_from(folder: Path, dtype: torch.dtype | None) -> tuple[VideoLlavaForConditionalGeneration, TinyVideoProcessor]:
    """A Video-LLaVA of the package, from its folder."""
    import torch
    from transformers import VideoLlavaForConditionalGeneration

    from duet_vlm.tiny.video_processor import TinyVideoProcessor

    model = VideoLlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype or torch.float32, local_files_only=True)
    return model.eval(), TinyVideoProcessor.from_pretrained(folder)


def prompt(question: str) -> str:
    """The text that goes to the processor together with one clip."""
    return f"USER: <video>\n{question} ASSISTANT:"


def sample(split: str, index: int, seed: int = 0) -> ClipSample:
    """Sample number ``index`` of the stream (split, seed); the kinds of question take turns.

    Parameters
    ----------
    split : str
        "train", "validation" or "test".
    index, seed : int
    """
    from duet_vlm.tiny.clips import clip, render
    from duet_vlm.tiny.clips_questions import KINDS, question

    if index < 0:
        raise ValueError(f"index must be 0 or more, got {index}")
    drawn = clip(split, seed, index)
    return shown(render(drawn), question(drawn, KINDS[index % len(KINDS)], drawn.generator(2)))


def shown(pixels: np.ndarray, asked: ClipQuestion | LongQuestion) -> ClipSample:
    """A clip (frames, height, width, 3) with a question about it."""
    from PIL import Image

    return ClipSample(tuple(map(Image.fromarray, pixels)), asked.text, asked.answer, asked.kind, asked.needed)


def samples(split: str, n: int, seed: int = 0) -> list[ClipSample]:
    """The first ``n`` samples of a stream; splits are disjoint by construction."""
    return first(n, lambda index: sample(split, index, seed))
