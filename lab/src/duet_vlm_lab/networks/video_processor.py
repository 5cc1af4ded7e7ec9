"""Frames and text -> inputs of the tiny video model.

Stock Video-LLaVA processors need torchvision for their video half. Frames are pictures, so the picture processor and
the tokenizer do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.utils import logging

from duet_vlm.inputs.images import eight_bits, rgb
from duet_vlm_lab.generators.clips import FRAMES, PATCH, SIDE
from duet_vlm_lab.networks.video_network import NEW_WORDS, VIDEO, build_video_tokenizer

FILE = "processor_config.json"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

Frames = Sequence[Image.Image | np.ndarray] | np.ndarray


class TinyVideoProcessor:
    """Makes ``input_ids``, ``attention_mask`` and ``pixel_values_videos`` [clips, frames, 3, height, width].

    ``num_frames``: how many are taken of a file, where nobody says.
    """

    def __init__(self, image_processor: Any, tokenizer: PreTrainedTokenizerFast, num_frames: int = FRAMES) -> None:
        self.image_processor, self.tokenizer, self.num_frames = image_processor, tokenizer, num_frames

    @property
    def chat_template(self) -> str:
        """Template that writes a conversation down for the model."""
        return str(self.tokenizer.chat_template)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TinyVideoProcessor:
        """Read the files that :meth:`save_pretrained` wrote."""
        kept = json.loads((Path(folder) / FILE).read_text())
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return cls(_image_processor(**kept["image_processor"]), tokenizer, kept.get("num_frames", FRAMES))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer and processor files."""
        self.tokenizer.save_pretrained(folder)
        sizes = {key: getattr(self.image_processor, key) for key in ("size", "crop_size")}
        plain = {
            key: {name: side for name, side in dict(value).items() if side is not None} for key, value in sizes.items()
        }
        kept = {"image_processor": plain, "num_frames": self.num_frames, "processor_class": type(self).__name__}
        (Path(folder) / FILE).write_text(json.dumps(kept, indent=1) + "\n")

    def __call__(
        self,
        text: str | Sequence[str],
        videos: Frames | Sequence[Frames] | None = None,
        images: Sequence[Image.Image] = (),
        return_tensors: str = "pt",
        **text_settings: Any,
    ) -> BatchFeature:
        """Inputs of one prompt or several.

        Parameters
        ----------
        text : str or sequence of str
            Prompts with one ``<video>`` for each clip, in order.
        videos : clip or sequence of clips, optional
            A clip is a sequence of frames (PIL pictures, or arrays [height, width, 3] of one size) or one array
            [frames, height, width, 3]. Modes and numbers as in ``duet_vlm.inputs.images.rgb``; the range of numbers is
            that of the whole clip. All clips have the same number of frames; ``tiny-video`` was trained on 8,
            ``tiny-long`` on 64 to 256.
        images : sequence
            None: the model was trained on clips only.
        return_tensors : str
            "pt", the only kind.
        **text_settings
            Goes to the tokenizer: ``padding``, ``padding_side`` and the like.

        Raises
        ------
        ValueError
            Clips and ``<video>`` do not match in number, clips differ in length, or pictures are given.
        """
        if len(images):
            raise ValueError(
                "this model was trained on clips only: give frames as videos=, or take the model 'tiny' for pictures"
            )
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: only 'pt' is made")
        prompts, clips, made = [text] if isinstance(text, str) else list(text), _clips(videos), {}
        asked = sum(prompt.count(VIDEO) for prompt in prompts)
        if asked != len(clips):
            raise ValueError(
                f"the text has {asked} {VIDEO}, but {len(clips)} clips were given: write one {VIDEO} for each clip"
            )
        if clips:
            lengths = sorted({len(clip) for clip in clips})
            if len(lengths) > 1 or not lengths[0]:
                raise ValueError(
                    f"clips of {lengths} frames: give all clips of a batch the same number of frames, at least 1"
                )
            pixels = self.image_processor(
                images=[frame for clip in clips for frame in _frames(clip)], return_tensors="pt"
            )["pixel_values"]
            made["pixel_values_videos"] = pixels.view(len(clips), lengths[0], *pixels.shape[1:])
            # CLS is handed over, too
            rows = lengths[0] * ((pixels.shape[-2] // PATCH) * (pixels.shape[-1] // PATCH) + 1)
            prompts = [prompt.replace(VIDEO, VIDEO * rows) for prompt in prompts]
        return BatchFeature(
            {**self.tokenizer(prompts, return_tensors="pt", return_token_type_ids=False, **text_settings), **made}
        )

    def apply_chat_template(self, messages: list, **settings: Any) -> Any:
        """The text of a conversation whose user turns may hold parts of type "video" and "text"."""
        return self.tokenizer.apply_chat_template(messages, **{"tokenize": False, **settings})

    def decode(self, tokens: Any, **settings: Any) -> Any:
        """Tokens -> text."""
        return self.tokenizer.decode(tokens, **settings)

    def batch_decode(self, tokens: Any, **settings: Any) -> list[str]:
        """Rows of tokens -> texts."""
        return list(self.tokenizer.batch_decode(tokens, **settings))


def _clips(videos: Any) -> list[list[Any]]:
    """Clips as lists of frames, whatever way they were given."""
    if videos is None:
        return []
    if isinstance(videos, np.ndarray | torch.Tensor):
        videos = np.asarray(videos)
        return [list(videos)] if videos.ndim == 4 else [list(clip) for clip in videos]
    items = list(videos)
    single = items and (isinstance(items[0], Image.Image) or (hasattr(items[0], "ndim") and items[0].ndim == 3))
    return [items] if single else [list(clip) for clip in items]


def _frames(clip: list[Any]) -> list[Image.Image]:
    """The frames of a clip as RGB pictures."""
    if all(isinstance(frame, Image.Image) for frame in clip):
        return [rgb(frame) for frame in clip]
    return [rgb(frame) for frame in eight_bits(np.stack([np.asarray(frame) for frame in clip]))]


def _image_processor(**kept: Any) -> Any:
    """The stock CLIP picture processor; importing it without torchvision prints a note, which is for nobody here."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        from transformers import CLIPImageProcessor

        return CLIPImageProcessor(**kept)
    finally:
        logging.set_verbosity(level)


def build_video_processor(
    side: int = SIDE, words: tuple[str, ...] = NEW_WORDS, num_frames: int = FRAMES, longest: int = 1024
) -> TinyVideoProcessor:
    """Processor of the tiny video model: 112 px, 65 visual rows per frame. Or of one with another size of frames, other
    words and longer prompts."""
    tokenizer = build_video_tokenizer(words)
    tokenizer.chat_template, tokenizer.model_max_length = CHAT_TEMPLATE, longest
    pictures = _image_processor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return TinyVideoProcessor(pictures, tokenizer, num_frames)
