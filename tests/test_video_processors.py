"""Clips from files through the stock video processors into reduced models, end to end. ``make test-video``: they need
torchvision.

Processors are built from their classes, with a tokenizer that knows single bytes and the special words; models are the
tiny ones of the other tests with the vocabulary of that tokenizer. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, randomise
from PIL import Image
from test_video_io import write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import duet_vlm
from duet_vlm.api.loading import LoadedModel
from duet_vlm.inputs.video import decode

pytest.importorskip("torchvision", reason="stock video processors need torchvision: make test-video")

WORDS = [
    "<pad>", "<s>", "</s>", "<image>", "<video>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    "<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
]  # fmt: skip
FRAMES, HIGH, WIDE = 6, 56, 84
Processor = Any


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*WORDS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(WORDS)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def template(image: str, video: str) -> str:
    return (
        "{% for part in messages[0]['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image}{{% elif part['type'] == 'video' %}}{video}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
        "{% endfor %}"
    )


LLAVA = template("<image>", "<video>")
QWEN = template("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
# writes time stamps and brackets for every step by itself
QWEN3 = template("<|vision_start|><|image_pad|><|vision_end|>", "<|video_pad|>")
GLM = template("<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>")
SQUARE = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
EXACT = {"size": {"height": 56, "width": 56}}
PINPOINTS = {"image_grid_pinpoints": [[56, 112], [112, 56]]}
PIXELS = {"size": {"shortest_edge": 16 * 16, "longest_edge": 200 * 200 * 8}}


def video_llava(t: Any) -> Processor:
    image, video = transformers.VideoLlavaImageProcessor(**SQUARE), transformers.VideoLlavaVideoProcessor(**SQUARE)
    return transformers.VideoLlavaProcessor(image, video, t, patch_size=14, chat_template=LLAVA)


def llava_next_video(t: Any) -> Processor:
    image = transformers.LlavaNextImageProcessor(**SQUARE, **PINPOINTS)
    video = transformers.LlavaNextVideoVideoProcessor(**SQUARE)
    return transformers.LlavaNextVideoProcessor(
        video,
        image,
        t,
        chat_template=LLAVA,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava_onevision(t: Any) -> Processor:
    image = transformers.LlavaOnevisionImageProcessor(**EXACT, **PINPOINTS)
    video = transformers.LlavaOnevisionVideoProcessor(**EXACT)
    return transformers.LlavaOnevisionProcessor(
        image,
        t,
        video,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=LLAVA,
        vision_aspect_ratio="anyres_max_1",
    )


def qwen2_vl(t: Any) -> Processor:
    image, video = (
        transformers.Qwen2VLImageProcessor(patch_size=4, **PIXELS),
        transformers.Qwen2VLVideoProcessor(patch_size=4, **PIXELS),
    )
    return transformers.Qwen2VLProcessor(image, t, video, chat_template=QWEN)


def qwen2_5_vl(t: Any) -> Processor:
    image, video = (
        transformers.Qwen2VLImageProcessor(patch_size=4, **PIXELS),
        transformers.Qwen2VLVideoProcessor(patch_size=4, **PIXELS),
    )
    return transformers.Qwen2_5_VLProcessor(image, t, video, chat_template=QWEN)


def qwen3_vl(t: Any) -> Processor:
    image, video = (
        transformers.Qwen2VLImageProcessor(patch_size=4, **PIXELS),
        transformers.Qwen3VLVideoProcessor(patch_size=4, **PIXELS),
    )
    return transformers.Qwen3VLProcessor(image, t, video, chat_template=QWEN3)


def glm4v(t: Any) -> Processor:
    image, video = (
        transformers.Glm4vImageProcessor(patch_size=4, **PIXELS),
        transformers.Glm4vVideoProcessor(patch_size=4, **PIXELS),
    )
    return transformers.Glm4vProcessor(image, t, video, chat_template=GLM)


@dataclass(frozen=True)
class Stock:
    """A family's stock processor, its placeholders, and the tokens of a clip, counted from the sizes of its pixels by
    the family's own rule."""

    processor: Callable[[Any], Processor]
    image: str
    video: str
    tokens: Callable[[Any], int]
    mixes: bool = True  # takes pictures and clips in one prompt


def in_grid(inputs: Any) -> int:
    """Qwen: 2 x 2 patches per token, two frames per step."""
    return int(inputs["video_grid_thw"][0].prod()) // 4


def in_frames(extra: int, pooled: int, end: int) -> Callable[[Any], int]:
    """LLaVA: 14 x 14 pixels per patch, ``pooled`` patches per token on each side, ``extra`` rows per frame, ``end``
    rows per clip."""

    def count(inputs: Any) -> int:
        _, frames, _, height, width = inputs["pixel_values_videos"].shape
        return frames * ((height // 14 // pooled) * (width // 14 // pooled) + extra) + end

    return count


STOCK = {
    "video_llava": Stock(video_llava, "<image>", "<video>", in_frames(1, 1, 0)),
    "llava_next_video": Stock(llava_next_video, "<image>", "<video>", in_frames(0, 2, 0)),
    "llava_onevision": Stock(llava_onevision, "<image>", "<video>", in_frames(0, 2, 1)),
    "qwen2_vl": Stock(qwen2_vl, "<|image_pad|>", "<|video_pad|>", in_grid),
    "qwen2_5_vl": Stock(qwen2_5_vl, "<|image_pad|>", "<|video_pad|>", in_grid),
    "qwen3_vl": Stock(qwen3_vl, "<|image_pad|>", "<|video_pad|>", in_grid),
    "qwen3_5": Stock(qwen3_vl, "<|image_pad|>", "<|video_pad|>", in_grid),
    "glm4v": Stock(glm4v, "<|image|>", "<|image|>", in_grid, mixes=False),
}
EACH = pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in FAMILIES else pytest.mark.skip("no adapter yet")) for name in STOCK],
)


def loaded(family: str) -> LoadedModel:
    """The family's tiny model with the tokenizer's ids, and its stock processor."""
    words = tokenizer()
    config, stock = FAMILIES[family].make().config, STOCK[family]
    text = config.get_text_config()
    text.vocab_size = len(words)
    known = {"image": stock.image, "video": "<|video|>" if stock.video == stock.image else stock.video}
    marks = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    marks |= {
        f"{kind}_{end}": f"<|{begin}_of_{kind}|>"
        for kind in ("image", "video")
        for end, begin in (("start", "begin"), ("end", "end"))
    }
    for name, word in (known | marks).items():
        for key in (f"{name}_token_id", f"{name}_token_index"):
            if hasattr(config, key):
                setattr(config, key, words.convert_tokens_to_ids(word))
    torch.manual_seed(0)
    model: nn.Module = randomise(type(FAMILIES[family].make())(config).eval())
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = list(range(len(WORDS)))
    return LoadedModel(family, model, stock.processor(words))


def brighter(number: int) -> np.ndarray:
    """Every frame is brighter than the one before; a white bar appears at frame 18."""
    picture = np.full((HIGH, WIDE, 3), 3 * number, np.uint8)
    if number >= 18:
        picture[:14] = 255
    return picture


@pytest.fixture
def clip(tmp_path: Path) -> Any:
    return decode(write(tmp_path / "clip.mp4", count=36, picture=brighter), FRAMES)


def brightness(inputs: Any) -> list[float]:
    """Mean pixel of each step of time, in whatever units the processor left them."""
    pixels = inputs["pixel_values_videos"].float()
    if "video_grid_thw" in inputs:
        return pixels.view(int(inputs["video_grid_thw"][0, 0]), -1).mean(1).tolist()
    return pixels[0].flatten(1).mean(1).tolist()


@EACH
def test_a_clip_is_reduced_from_the_file_to_the_answer(family: str, clip: Any) -> None:
    it = loaded(family)
    inputs = it.inputs([], "What happens?", [clip])
    tokens = STOCK[family].tokens(inputs)
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(it.processor.tokenizer.convert_tokens_to_ids(STOCK[family].video)) == tokens
    levels = brightness(inputs)
    # every frame, in its order
    assert levels == sorted(levels) and len(set(levels)) == len(levels) in (FRAMES, FRAMES // 2)
    jumps = np.diff(levels)
    assert int(jumps.argmax()) == len(levels) // 2 - 1  # the bar is there from the second half on
    full = it.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    for method in ("frames+duet", "visionzip", "frames"):
        with duet_vlm.attach(it.model, method, budget=0.3) as handle:
            out = it.model.generate(**inputs, max_new_tokens=3, do_sample=False)
            report, spans = handle.report(), handle.trace[0]
        assert out.shape == full.shape and report.tokens == tokens == sum(span.span.tokens for span in spans)
        assert 0.3 * tokens - len(spans) < report.measured_mean <= 0.3 * tokens and report.measured == report.nominal
    with duet_vlm.attach(it.model, "duet", budget=1.0):
        assert torch.equal(it.model.generate(**inputs, max_new_tokens=3, do_sample=False), full)


@pytest.mark.parametrize("family", [name for name in STOCK if name in FAMILIES and STOCK[name].mixes])
def test_a_picture_and_a_clip_in_one_prompt(family: str, clip: Any) -> None:
    it = loaded(family)
    inputs = it.inputs([Image.new("RGB", (WIDE, HIGH), "red")], "Which comes first?", [clip])
    ids = inputs["input_ids"][0].tolist()
    pictures = ids.count(it.processor.tokenizer.convert_tokens_to_ids(STOCK[family].image))
    tokens = STOCK[family].tokens(inputs)
    with duet_vlm.attach(it.model, "frames+visionzip+pyramiddrop", budget=0.4) as handle, torch.no_grad():
        it.model(**inputs)
        report, spans = handle.report(), handle.trace[0]
    assert spans[0].span.tokens == pictures > 0 and report.tokens == pictures + tokens
    assert 0.4 * (pictures + tokens) - len(spans) < report.measured_mean <= 0.4 * (pictures + tokens)


@EACH
def test_frames_of_a_processor_are_left_alone(family: str, clip: Any) -> None:
    """The frames were chosen already: the processor takes all of them, whatever it would sample by itself."""
    inputs = loaded(family).inputs([], "x", [clip])
    steps = (
        int(inputs["video_grid_thw"][0, 0]) if "video_grid_thw" in inputs else inputs["pixel_values_videos"].shape[1]
    )
    assert steps == (FRAMES // 2 if "video_grid_thw" in inputs else FRAMES)
