"""Drops inside the decoder: settings (decoders of 4 layers) and prompts that both engines are asked."""

from __future__ import annotations

from typing import Any

from cases import Prompt, scene

NEW, LONGER = 12, 48  # tokens that are written; of the reference as many as the longer answers have
PYRAMID: dict[str, Any] = {"method": "pyramiddrop", "schedule": [[1, 0.5], [3, 0.25]]}
BOTH: dict[str, Any] = {"method": "duet", "dominant": 0.4, "contextual": 0.1, "schedule": [[2, 0.5], [3, 0.0]]}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "llava": {
        "pyramiddrop": PYRAMID,
        "both stages": {"method": "duet", "dominant": 54, "contextual": 10, "schedule": [[2, 0.5], [3, 0.0]]},
        "budget": {"method": "duet", "budget": 64},
        "fastv": {"method": "fastv", "layers": 2, "keep": 30},
        "compact": {"method": "pyramiddrop", "schedule": [[2, 0.25]], "options": {"positions": "compact"}},
        "dart": {"method": "dart", "schedule": [[2, 40]]},
        "v2drop": {"method": "v2drop", "schedule": [[1, 0.5], [2, 0.1]]},
    },
    "qwen2_5_vl": {"pyramiddrop": PYRAMID, "both stages": BOTH},
    "qwen2_vl": {"both stages": BOTH},
    "llava_next": {"pyramiddrop": PYRAMID, "both stages": BOTH},
    "llava_onevision": {"both stages": BOTH},
    "internvl": {"both stages": BOTH},
    "qwen3_vl": {"pyramiddrop": PYRAMID, "both stages": BOTH},  # the first drops where the tower still adds rows
}
FILMED = ("qwen2_vl", "llava_onevision")  # asked about clips, too
SYSTEM = "You are a careful assistant that answers in few words and says where it looked. "  # more than two blocks
QUESTION = "describe what is in the picture, where it is, and why you think that it is there, please."


def prompts(family: str) -> dict[str, Prompt]:
    at = scene(family)
    start, image, end, pictures = at.start, at.image, at.end, at.pictures
    of_clips = {
        "clip": (f"{start}{at.video}what happens?{end}", [], at.clips[:1]),
        "clip, text, picture": (f"{start}{at.video}and {image}differ how?{end}", pictures[:1], at.clips[1:]),
    }
    return {
        "one": (f"{start}{image}hi{end}", pictures[:1], []),
        "long question": (f"{start}{image}{QUESTION}{end}", pictures[2:3], []),
        "system prompt": (f"{SYSTEM}{start}{image}what is it?{end}", pictures[:1], []),
        "system prompt, other picture": (f"{SYSTEM}{start}{image}where?{end}", pictures[1:2], []),
        "two": (f"{start}{image}{image}which one is it?{end}", pictures[:2], []),
        "two, text between": (f"{start}{image}and then {image}differ how?{end}", pictures[1:3], []),
        "text only": (f"{start}hello, who are you?{end}", [], []),
    } | (of_clips if family in FILMED else {})
