"""Drops inside the decoder: settings (decoders of 4 layers) and prompts that both engines are asked."""

from __future__ import annotations

from typing import Any

from cases import Prompt, blobs

NEW, LONGER = 12, 48  # tokens that are written; of the reference as many as the longer answers have
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "llava": {
        "pyramiddrop": {"method": "pyramiddrop", "schedule": [[1, 0.5], [3, 0.25]]},
        "both stages": {"method": "duet", "dominant": 54, "contextual": 10, "schedule": [[2, 0.5], [3, 0.0]]},
        "budget": {"method": "duet", "budget": 64},
        "fastv": {"method": "fastv", "layers": 2, "keep": 30},
        "compact": {"method": "pyramiddrop", "schedule": [[2, 0.25]], "options": {"positions": "compact"}},
        "dart": {"method": "dart", "schedule": [[2, 40]]},
        "v2drop": {"method": "v2drop", "schedule": [[1, 0.5], [2, 0.1]]},
    },
    "qwen2_5_vl": {
        "pyramiddrop": {"method": "pyramiddrop", "schedule": [[1, 0.5], [3, 0.25]]},
        "both stages": {"method": "duet", "dominant": 0.4, "contextual": 0.1, "schedule": [[2, 0.5], [3, 0.0]]},
    },
}
SYSTEM = "You are a careful assistant that answers in few words and says where it looked. "  # more than two blocks
QUESTION = "describe what is in the picture, where it is, and why you think that it is there, please."


def prompts(family: str) -> dict[str, Prompt]:
    if family == "llava":
        sizes, start, image, end = [(336, 336)] * 3, "USER: ", "<image>\n", " ASSISTANT:"
    else:
        sizes, image = [(224, 224), (336, 224), (112, 336)], "<|vision_start|><|image_pad|><|vision_end|>"
        start, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    pictures = [blobs(seed, *size) for seed, size in enumerate(sizes)]
    return {
        "one": (f"{start}{image}hi{end}", pictures[:1], []),
        "long question": (f"{start}{image}{QUESTION}{end}", pictures[2:], []),
        "system prompt": (f"{SYSTEM}{start}{image}what is it?{end}", pictures[:1], []),
        "system prompt, other picture": (f"{SYSTEM}{start}{image}where?{end}", pictures[1:2], []),
        "two": (f"{start}{image}{image}which one is it?{end}", pictures[:2], []),
        "two, text between": (f"{start}{image}and then {image}differ how?{end}", pictures[1:], []),
        "text only": (f"{start}hello, who are you?{end}", [], []),
    }
