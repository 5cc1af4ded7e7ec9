"""Stock processors of the families, built from their classes for the tiny models of tests/families, and generated
pictures. No download.

The classes are those that ``AutoProcessor`` takes on this machine: the PIL variants of the image processors where
torchvision is missing. Video processors need torchvision and see no image, so there is none here; clips are in
test_video_processors.py.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from families import IMAGE, PAD, VIDEO, VISION_END, VISION_START
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import (
    IMAGE_PROCESSOR_MAPPING_NAMES,
    get_image_processor_class_from_name,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name
from transformers.utils import is_torchvision_available

WORDS = "what is in this picture ? and that one the big red car left of a tree".split()


@dataclass(frozen=True)
class Stock:
    """How a family's processor is made.

    ``image`` is the placeholder that the model reads, ``mark`` what a prompt says where a picture belongs (the
    placeholder unless given), ``roles`` the tokenizer's names for further special tokens, ``also`` those without a
    name; then the settings of the image processor and of the processor around it. ``like``: the model type whose
    processor is taken, where AutoProcessor cannot tell from the model's own.
    """

    image: str = "<image>"
    mark: str = ""
    roles: dict[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    images: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    like: str = ""


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


SIDE = 56  # pixels of a crop
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
CLIP = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, "patch_size": 14}
ONE_CROP = {"size": {"shortest_edge": SIDE}, "crop_size": square(SIDE)}
SEVERAL_CROPS = ONE_CROP | {"image_grid_pinpoints": PINPOINTS}
CLIPS = {"video_token": "<video>"}
QWEN = Stock(
    "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", {"video_token": "<|video_pad|>"}, ("<|vision_start|>", "<|vision_end|>"),
    {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}},
)  # fmt: skip
GLM = Stock(
    "<|image|>", "<|begin_of_image|><|image|><|end_of_image|>", {"video_token": "<|video|>"},
    ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    # limits count both frames that a picture is shown in
    QWEN.images | {"size": {"shortest_edge": 2 * 16 * 16, "longest_edge": 2 * 64 * 64}},
)  # fmt: skip


def packed(merge: int) -> Stock:
    """Any size up to 12 x 12 tokens; line breaks between the rows are text."""
    return Stock(
        "[IMG]", also=("[IMG_BREAK]", "[IMG_END]"), images={"patch_size": square(4), "size": {"longest_edge": 48 * merge}},
        processor={"patch_size": 4, "spatial_merge_size": merge}, like="mistral3",
    )  # fmt: skip


TAGS = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
TILES = Stock(
    also=("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *TAGS),
    images={"size": {"longest_edge": 80}, "max_image_size": {"longest_edge": 40}},
)


STOCK: dict[str, Stock] = {
    "llava": Stock(images={"size": {"shortest_edge": 84}, "crop_size": square(84)}, processor=CLIP),
    "vipllava": Stock(images=ONE_CROP, processor=CLIP),
    "video_llava": Stock(roles=CLIPS, images=ONE_CROP, processor=CLIP),
    "llava_next": Stock(images=SEVERAL_CROPS, processor=CLIP),
    "llava_next_video": Stock(roles=CLIPS, images=SEVERAL_CROPS, processor=CLIP),
    "llava_onevision": Stock(
        roles=CLIPS, images={"size": square(SIDE), "image_grid_pinpoints": PINPOINTS},
        processor={"num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_1"},
    ),
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "qwen3_5": QWEN,
    "gemma3": Stock(
        "<image_soft_token>", "<start_of_image>", {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        images={"size": square(112)}, processor={"image_seq_length": 16},
    ),
    "paligemma": Stock(images={"size": square(70), "image_seq_length": 25}),
    "glm4v": GLM,
    "glm46v": GLM,
    "internvl": Stock(
        "<IMG_CONTEXT>", roles={"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"} | CLIPS,
        images={"size": square(32), "max_patches": 4}, processor={"image_seq_length": 16},
    ),
    "idefics3": replace(TILES, processor={"image_seq_len": 25}),
    "smolvlm": replace(TILES, processor={"image_seq_len": 25}),
    "mistral3": packed(2),
    "pixtral": packed(1),
}  # fmt: skip


# ---- tokenizer and processor


NAMED = {  # special tokens whose ids the tiny models' configs name
    "<|vision_start|>": VISION_START, "<|vision_end|>": VISION_END, "<start_of_image>": VISION_START, "<end_of_image>": VISION_END,
    "<|begin_of_image|>": VISION_START, "<|end_of_image|>": VISION_END, "<|begin_of_video|>": 94, "<|end_of_video|>": 95,
    "<video>": VIDEO, "<|video_pad|>": VIDEO, "<|video|>": VIDEO,
}  # fmt: skip


def tokenizer(stock: Stock) -> PreTrainedTokenizerFast:
    """One id per word, from 10 on; special tokens without a known id from 60 on."""
    roles = {"image_token": stock.image} | stock.roles
    special = list(dict.fromkeys([*roles.values(), *stock.also]))
    ids = {token: 60 + number for number, token in enumerate(special)} | {
        token: NAMED[token] for token in special if token in NAMED
    }
    ids[stock.image] = IMAGE
    words = {"<pad>": PAD, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {
        word: 10 + number for number, word in enumerate(dict.fromkeys(WORDS))
    }
    model = Tokenizer(WordLevel(words | ids, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    model.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", padding_side="left",
        extra_special_tokens=roles,
    )  # fmt: skip


def processor_class(name: str) -> Any:
    """The processor class that AutoProcessor takes for a model type."""
    if name != "mistral3" or is_torchvision_available():
        return processor_class_from_name(PROCESSOR_MAPPING_NAMES[name])
    # this file takes a rule for sizes from the torchvision variant of its image processor; the PIL variant has the same
    # one
    rule = importlib.import_module("transformers.models.pixtral.image_processing_pil_pixtral")
    with mock.patch.dict(sys.modules, {"transformers.models.pixtral.image_processing_pixtral": rule}):
        return importlib.import_module("transformers.models.pixtral.processing_pixtral").PixtralProcessor


@functools.cache
def processor(name: str) -> Any:
    """The stock processor of a model type, sized for its tiny model."""
    return made(name, STOCK[name])


def made(name: str, stock: Stock) -> Any:
    """The stock processor of a model type with these settings."""
    variants, cls = IMAGE_PROCESSOR_MAPPING_NAMES[stock.like or name], processor_class(stock.like or name)
    wanted = "torchvision" if is_torchvision_available() and "torchvision" in variants else "pil"
    parts = {
        "image_processor": get_image_processor_class_from_name(variants[wanted])(**stock.images),
        "tokenizer": tokenizer(stock),
        "video_processor": None,
    }
    clips_only = mock.patch.dict(cls.__init__.__globals__, num2words=str)  # SmolVLM's word for the number of frames
    # which refuses None for a video processor
    with clips_only, mock.patch.object(cls, "check_argument_for_proper_class"):
        return cls(**{part: made for part, made in parts.items() if part in cls.get_attributes()}, **stock.processor)


# ---- pictures and prompts


def picture(kind: str, width: int, height: int) -> Image.Image:
    """A generated picture: "gradient", "noise" or "shapes"."""
    y, x = np.mgrid[0:height, 0:width]
    if kind == "gradient":
        return Image.fromarray(
            np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(np.uint8)
        )
    if kind == "noise":
        return Image.fromarray(
            np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
        )
    drawn = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(drawn)
    pen.ellipse((width // 8, height // 8, width // 2, height // 2), fill="red")
    pen.rectangle((width // 2, height // 3, width - 2, height - 2), fill="navy")
    pen.line((0, height - 1, width - 1, 0), fill="green", width=2)
    return drawn


def prompt(name: str, pictures: int, first: int = 0) -> str:
    """Words, and a picture's mark in front of each run of them; a prompt ends with words."""
    mark = STOCK[name].mark or STOCK[name].image
    said = [" ".join(WORDS[(first + number) % 5 :][: 4 + number]) for number in range(max(pictures, 1))]
    return " ".join(f"{mark} {words}" if pictures else words for words in said)


def inputs_for(
    name: str, rows: Sequence[Sequence[Image.Image]], flat: bool = False, first: int = 0, **options: Any
) -> dict[str, torch.Tensor]:
    """What the stock processor makes of a padded batch of prompts with these pictures, handed over prompt by prompt or
    in one ``flat`` list.

    Prompts have different words; ``first`` is the number of the first one.
    """
    texts = [prompt(name, len(row), first + number) for number, row in enumerate(rows)]
    pictures: list[Any] = [image for row in rows for image in row] if flat else [list(row) for row in rows]
    given = {"images": pictures} if any(rows) else {}
    return dict(processor(name)(text=texts, **given, padding=True, return_tensors="pt", **options))
