"""``tiny-long``: clips of 64 to 256 frames in which what is asked about is over soon, and a stock Video-LLaVA that learned to answer.

>>> from duet_vlm.tiny import long
>>> model, processor = long.load()
>>> item = long.sample("test", 3)
>>> len(item.frames), item.question, item.answer
(64, 'What is the last word?', 'bank')
>>> inputs = processor(videos=[item.frames], text=long.prompt(item.question), return_tensors="pt")
>>> answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
>>> processor.decode(answer, skip_special_tokens=True) == item.answer
True
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from duet_vlm.tiny import first
from duet_vlm.tiny.video import ClipSample, load_from, prompt, shown

if TYPE_CHECKING:
    import torch
    from transformers import VideoLlavaForConditionalGeneration

    from duet_vlm.tiny.video_processor import TinyVideoProcessor

__all__ = ["TURN", "load", "path", "prompt", "sample", "samples"]

TURN = 40  # so many samples have clips of one length, then come those of the next: batches that divide it hold equally long clips


def path() -> Path:
    """Folder of the shipped weights; works with ``from_pretrained``."""
    return Path(__file__).parent / "long_weights"


def load(dtype: torch.dtype | None = None) -> tuple[VideoLlavaForConditionalGeneration, TinyVideoProcessor]:
    """The trained model in evaluation mode and its processor, from the package, without network; float32 unless ``dtype`` is given."""
    return load_from(path(), dtype)


def sample(split: str, index: int, seed: int = 0) -> ClipSample:
    """Sample number ``index`` of the stream (split, seed); the kinds of question take turns, and every ``TURN`` samples the lengths of clips.

    Parameters
    ----------
    split : str
        "train", "validation" or "test".
    index, seed : int
    """
    from duet_vlm.tiny.long_clips import LENGTHS, long_clip, render
    from duet_vlm.tiny.long_questions import KINDS, question

    if index < 0:
        raise ValueError(f"index must be 0 or more, got {index}")
    drawn = long_clip(split, seed, index, LENGTHS[index // TURN % len(LENGTHS)])
    return shown(render(drawn), question(drawn, KINDS[index % len(KINDS)], drawn.generator(2)))


def samples(split: str, n: int, seed: int = 0) -> list[ClipSample]:
    """The first ``n`` samples of a stream; splits are disjoint by construction."""
    return first(n, lambda index: sample(split, index, seed))
