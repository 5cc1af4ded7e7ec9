"""What is asked of both engines: prompts with no, one, two and three pictures of several sizes, and methods."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

Prompt = tuple[str, list[Image.Image]]

COUNTS: dict[str, dict[str, Any]] = {
    "duet": {"method": "duet", "dominant": 54, "contextual": 10},
    "visionzip": {"method": "visionzip", "dominant": 54, "contextual": 10},
    "divprune": {"method": "divprune", "keep": 64},
    "duet_plus": {"method": "duet_plus", "keep": 64},
    "tome": {"method": "tome", "keep": 64},
    "prumerge": {"method": "prumerge", "keep": 63},
}
SHARES: dict[str, dict[str, Any]] = {
    "duet": {"method": "duet", "dominant": 0.2, "contextual": 0.05},
    "visionzip": {"method": "visionzip", "dominant": 0.2, "contextual": 0.05},
    "divprune": {"method": "divprune", "keep": 0.25},
    "duet_plus": {"method": "duet_plus", "keep": 0.25},
    "tome": {"method": "tome", "keep": 0.25},
    "prumerge": {"method": "prumerge", "keep": 0.25},
}
METHODS = {"llava": COUNTS} | dict.fromkeys(("llava_next", "llava_onevision", "internvl", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"), SHARES)
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
BESIDE = dict.fromkeys(METHODS, 1) | {"internvl": 3, "qwen2_5_vl": 2, "qwen2_vl": 2, "qwen3_vl": 2}  # tokens around a picture: line break, marks
CLIP = {"internvl": "<video>", "llava_onevision": "<video>"} | {
    family: "<|vision_start|><|video_pad|><|vision_end|>" for family in METHODS if family.startswith("qwen")
}

# budgets that no request can have beside a server's 12, and what the error says
REFUSED = [(0, "duet_budget=0"), ("x", "duet_budget='x'"), (1.5, "a float is a fraction"), (13, "allows 12 at most")]


def blobs(seed: int, width: int, height: int) -> Image.Image:
    """Coloured blobs: of plain noise a random tower thinks the same everywhere. Sizes in multiples of a patch are not resampled."""
    coarse = np.random.default_rng(seed).integers(0, 255, (max(2, height // 28), max(2, width // 28), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BILINEAR)


def prompts(family: str) -> dict[str, Prompt]:
    if family.startswith("qwen"):
        sizes, image = [(224, 224), (336, 224), (112, 336), (112, 112)], "<|vision_start|><|image_pad|><|vision_end|>"
        start, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    else:
        sizes = {
            "llava": [(336, 336)] * 4,
            "llava_next": [(112, 112), (112, 56), (60, 110), (112, 90)],
            "llava_onevision": [(112, 112), (112, 56), (60, 110), (224, 168)],  # the last is resized behind the tower
            "internvl": [(112, 112), (224, 112), (112, 224), (112, 112)],  # one tile, or two and an overview
        }[family]
        image, start, end = "<IMG_CONTEXT>\n" if family == "internvl" else "<image>\n", "USER: ", " ASSISTANT:"
    pictures = [blobs(seed, *size) for seed, size in enumerate(sizes)]

    def ask(text: str, *shown: int) -> Prompt:
        return start + image * len(shown) + text + end, [pictures[i] for i in shown]

    return {
        "one": ask("hi", 0),
        "wide": ask("hi", 1),
        "tall, other text": ask("what?", 2),
        "two": ask("hi", 0, 1),
        "the same turned round": ask("hi", 1, 0),
        "three": ask("which?", 2, 0, 3),
        "no picture": ask("hi"),
    }
