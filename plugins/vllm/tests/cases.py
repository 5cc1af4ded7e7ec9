"""Questions to both engines: prompts with no, one, two and three pictures of several sizes, with clips, and methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

Clip = tuple[Any, dict[str, Any]]  # frames [F, H, W, 3] of whole numbers, and what a decoder would say of them
Prompt = tuple[str, list[Image.Image], list[Clip]]

COUNTS: dict[str, dict[str, Any]] = {
    "duet": {"method": "duet", "dominant": 54, "contextual": 10},
    "visionzip": {"method": "visionzip", "dominant": 54, "contextual": 10},
    "divprune": {"method": "divprune", "keep": 64},
    "duet_plus": {"method": "duet_plus", "keep": 64},
    "tome": {"method": "tome", "keep": 64},
    "prumerge": {"method": "prumerge", "keep": 63},
    "frames": {"method": "frames", "keep": 64},
    "vidcom2": {"method": "vidcom2", "keep": 64},
}
SHARES: dict[str, dict[str, Any]] = {
    "duet": {"method": "duet", "dominant": 0.2, "contextual": 0.05},
    "visionzip": {"method": "visionzip", "dominant": 0.2, "contextual": 0.05},
    "divprune": {"method": "divprune", "keep": 0.25},
    "duet_plus": {"method": "duet_plus", "keep": 0.25},
    "tome": {"method": "tome", "keep": 0.25},
    "prumerge": {"method": "prumerge", "keep": 0.25},
    "frames": {"method": "frames", "keep": 0.25},
    "vidcom2": {"method": "vidcom2", "keep": 0.25},
}
METHODS = {"llava": COUNTS} | dict.fromkeys(
    ("llava_next", "llava_onevision", "internvl", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"), SHARES
)
POSITIONS = {family: "keep" if family.startswith("qwen") else "compact" for family in METHODS}
ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
# tokens around a picture: line break, marks
BESIDE = dict.fromkeys(METHODS, 1) | {"internvl": 3, "qwen2_5_vl": 2, "qwen2_vl": 2, "qwen3_vl": 2}
STAMP = 15  # tokens of a timestamp of Qwen3-VL and of the marks around the rows behind it
CLIPS = ("llava_onevision", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")  # families that take them
REFUSES = {"internvl": "its prompts show the frames of a clip between texts"}

# budgets that no request can have beside a server's 12, and what the error says
REFUSED = [(0, "duet_budget=0"), ("x", "duet_budget='x'"), (1.5, "a float is a fraction"), (13, "allows 12 at most")]


def blobs(seed: int, width: int, height: int) -> Image.Image:
    """Coloured blobs: of plain noise a random tower thinks the same everywhere. Sizes in multiples of a patch are not
    resampled."""
    coarse = np.random.default_rng(seed).integers(
        0, 255, (max(2, height // 28), max(2, width // 28), 3), dtype=np.uint8
    )
    return Image.fromarray(coarse).resize((width, height), Image.BILINEAR)


def film(seed: int, frames: int, width: int, height: int) -> Clip:
    """One picture that becomes another, six frames a second."""
    first, last = blobs(seed, width, height), blobs(seed + 1, width, height)
    shown = np.stack([np.asarray(Image.blend(first, last, i / frames)) for i in range(frames)])
    told = {
        "fps": 6.0,
        "duration": frames / 6,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
    }
    return shown, told


class Scene(NamedTuple):
    """How a family is asked, and what it is shown: what stands for an image and for a clip, and around a question."""

    image: str
    video: str
    start: str
    end: str
    pictures: list[Image.Image]
    clips: list[Clip]


def scene(family: str) -> Scene:
    if family.startswith("qwen"):
        sizes, image = [(224, 224), (336, 224), (112, 336), (112, 112)], "<|vision_start|><|image_pad|><|vision_end|>"
        start, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
        video, films = "<|vision_start|><|video_pad|><|vision_end|>", [(6, 112, 112), (4, 224, 112)]
    else:
        sizes = {
            "llava": [(336, 336)] * 4,
            "llava_next": [(112, 112), (112, 56), (60, 110), (112, 90)],
            "llava_onevision": [(112, 112), (112, 56), (60, 110), (224, 168)],  # the last is resized behind the tower
            "internvl": [(112, 112), (224, 112), (112, 224), (112, 112)],  # one tile, or two and an overview
        }[family]
        image, start, end = "<IMG_CONTEXT>\n" if family == "internvl" else "<image>\n", "USER: ", " ASSISTANT:"
        video, films = "<video>\n", [(8, 56, 56), (8, 56, 56)]  # transformers wants as many frames in each
    pictures = [blobs(seed, *size) for seed, size in enumerate(sizes)]
    clips = [film(10 * seed, *size) for seed, size in enumerate(films)]
    return Scene(image, video, start, end, pictures, clips)


def prompts(family: str) -> dict[str, Prompt]:
    at = scene(family)

    def ask(text: str, *shown: int, before: Sequence[int] = (), behind: Sequence[int] = ()) -> Prompt:
        """Pictures ``shown``, and clips in front of them and behind."""
        media = at.video * len(before) + at.image * len(shown) + at.video * len(behind)
        films = [at.clips[i] for i in (*before, *behind)]
        return at.start + media + text + at.end, [at.pictures[i] for i in shown], films

    of_clips = {
        "clip": ask("hi", before=[0]),
        "clip and picture": ask("hi", 3, before=[0]),
        "picture between clips": ask("which?", 0, before=[1], behind=[0]),
    }
    return {
        "one": ask("hi", 0),
        "wide": ask("hi", 1),
        "tall, other text": ask("what?", 2),
        "two": ask("hi", 0, 1),
        "the same turned round": ask("hi", 1, 0),
        "three": ask("which?", 2, 0, 3),
        "no picture": ask("hi"),
    } | (of_clips if family in CLIPS else {})
