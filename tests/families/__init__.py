"""Tiny random models of every supported family, and batches for them: one file per group of families; a new file is
found by itself."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import duet_vlm
from families.base import (
    DEPTH,
    HIDDEN,
    IMAGE,
    PAD,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
    Family,
    Inputs,
    Picture,
    Row,
    noise,
    pictures_of,
    randomise,
)
from families.llava import any_res_crops, any_res_layout, llava
from families.qwen import qwen2_5_vl

__all__ = [
    "DEPTH", "FAMILIES", "FIRST", "HIDDEN", "IMAGE", "LENT", "PAD", "VIDEO", "VISION_END", "VISION_START", "VOCAB", "Family", "Inputs", "Picture",
    "Row", "Said", "any_res_crops", "any_res_layout", "build", "clips_for", "forward", "generate", "llava", "noise", "pictures_of", "qwen2_5_vl",
    "randomise", "shared", "untouched",
]  # fmt: skip

FIRST = ("llava", "llava_gqa", "llava_next", "qwen2_vl", "qwen2_5_vl")  # those that every test knows by hand


def _found() -> dict[str, Family]:
    modules = [importlib.import_module(f"families.{module.name}") for module in pkgutil.iter_modules(__path__)]
    known = {family.name: family for module in modules for family in getattr(module, "FAMILIES", [])}
    return {name: known[name] for name in (*FIRST, *sorted(known.keys() - set(FIRST)))}


FAMILIES = _found()


def build(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh model in eval mode; the same name always has the same weights."""
    torch.manual_seed(0)
    model = randomise(FAMILIES[name].make().eval())
    FAMILIES[name].finish(model)
    model = model.to(dtype)
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    # random models would write placeholders
    model.generation_config.suppress_tokens = [VIDEO, VISION_START, VISION_END, IMAGE]
    return model


def shared(name: str, attention: str = "sdpa") -> nn.Module:
    """A model that tests may attach to and must give back untouched."""
    model = _shared(name, attention)
    LENT[name, attention] = model
    return model


LENT: dict[tuple[str, str], nn.Module] = {}  # to the test that runs


@functools.cache  # some fifty models of 1.5 MB each
def _shared(name: str, attention: str) -> nn.Module:
    return build(name, attention)


class Said(NamedTuple):
    """What a model says to a batch: logits [B, S, V] of the prompts; what it writes, [B, S + new], and the logits [B,
    V] of each step."""

    logits: Tensor
    sequences: Tensor
    steps: tuple[Tensor, ...]


@functools.cache
def untouched(name: str, attention: str, rows: tuple[Row, ...], side: str = "left", new: int = 3) -> Said:
    """What a shared model says while nobody is attached to it; asked once, so that a change that stays behind later is
    seen."""
    model, inputs = shared(name, attention), FAMILIES[name].inputs(rows, side)
    assert duet_vlm.handle_of(model) is None, "ask before you attach"
    written = generate(model, inputs, new)
    return Said(forward(model, inputs).logits, written.sequences, written.logits)


# one, two (of different sizes where the family allows) and three images, text only; ragged text
ONE: Row = (1, 5, Picture(1, 4, 5), 7, 8, 9, 10)
TWO: Row = (1, Picture(2, 3, 4), 11, Picture(3, 5, 3), 12, 13, 14, 15, 16)
THREE: Row = (1, Picture(4, 4, 6), 21, Picture(5, 2, 5), 22, 23, Picture(6, 4, 4), 24, 25)
TEXT: Row = (1, 31, 32, 33, 34, 35)
MIXED: tuple[Row, ...] = (ONE, THREE, TEXT)

# clips, alone and among images
CLIP: Row = (1, 5, Picture(7, 3, 4, frames=3), 41, 42, 43)
CLIP_AND_IMAGE: Row = (1, Picture(8, 2, 3, frames=2), 44, Picture(9, 3, 4), 45, 46)
IMAGE_AND_CLIPS: Row = (1, Picture(10, 3, 3), 47, Picture(11, 2, 3, frames=4), 48, Picture(12, 3, 2, frames=1), 49)
CLIPS: tuple[Row, ...] = (CLIP, IMAGE_AND_CLIPS, TEXT, CLIP_AND_IMAGE, ONE)


def clips_for(name: str, rows: Sequence[Row] = CLIPS) -> list[Row]:
    """The rows, without their images where the family takes images or clips in one call, not both."""
    return [tuple(item for item in row if isinstance(item, int) or item.frames or FAMILIES[name].mixes) for row in rows]


def generate(model: nn.Module, inputs: dict[str, Any], new: int = 3, **options: Any) -> Any:
    """generate() with the logits of every step."""
    defaults = {"do_sample": False, "max_new_tokens": new, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        return model.generate(**inputs, **(defaults | options))


def forward(model: nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **options)
