"""Small checkpoints of the families, the same to the bit on every transformers: weights are drawn by the name of each
parameter."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MARKS = (
    "<image>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CLIP = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 14, "projection_dim": 64,
}  # fmt: skip
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
TURNS = (
    "{% for m in messages %}START{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
)
TURNS += "{% if c['type'] == 'image' %}IMAGE{% elif c['type'] == 'video' %}VIDEO{% else %}{{ c['text'] }}{% endif %}"
TURNS += "{% endfor %}{% endif %}END{% endfor %}BEGIN"


def tokenizer(template: str, *more: str, **named: str) -> PreTrainedTokenizerFast:
    """One token per byte, and the marks; ``named`` ones the processor looks up by their names."""
    marks = [*MARKS, *more, *named.values()]
    special = ["<pad>", "<s>", "</s>", "<unk>", *marks]
    letters = {letter: i for i, letter in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names: dict[str, Any] = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "additional_special_tokens": marks,
    }
    names |= {"extra_special_tokens": named} if named else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **names)


def template(image: str, start: str, end: str, begin: str, video: str = "") -> str:
    return (
        TURNS.replace("START", start)
        .replace("IMAGE", image)
        .replace("VIDEO", video)
        .replace("END", end)
        .replace("BEGIN", begin)
    )


def llava(next_: bool) -> tuple[Any, Any]:
    import transformers as t
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    words = tokenizer(template("<image>\n", "USER: ", " ", "ASSISTANT:"))
    side = 56 if next_ else 336
    common = {
        "vision_config": t.CLIPVisionConfig(**CLIP, image_size=side), "text_config": t.LlamaConfig(**TEXT, vocab_size=len(words), head_dim=32),
        "image_token_index": words.convert_tokens_to_ids("<image>"), "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    }  # fmt: skip
    sizes: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    given = {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": words.chat_template,
    }
    if next_:
        model = t.LlavaNextForConditionalGeneration(t.LlavaNextConfig(**common, image_grid_pinpoints=PINPOINTS))
        return model, t.LlavaNextProcessor(
            LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=PINPOINTS), words, **given
        )
    return t.LlavaForConditionalGeneration(t.LlavaConfig(**common)), t.LlavaProcessor(
        CLIPImageProcessorPil(**sizes), words, **given
    )


def llava_onevision() -> tuple[Any, Any]:
    import transformers as t
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
    from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor

    words, side, sizes = (
        tokenizer(template("<image>\n", "USER: ", " ", "ASSISTANT:", "<video>\n"), "<video>"),
        56,
        [*PINPOINTS, [224, 224]],
    )
    tower = t.SiglipVisionConfig(
        **{name: value for name, value in CLIP.items() if name != "projection_dim"},
        image_size=side,
        vision_use_head=False,
    )
    ids = {
        "image_token_index": words.convert_tokens_to_ids("<image>"),
        "video_token_index": words.convert_tokens_to_ids("<video>"),
    }
    text = t.Qwen2Config(**TEXT, vocab_size=len(words))
    config = t.LlavaOnevisionConfig(
        vision_config=tower, text_config=text, image_grid_pinpoints=sizes, tie_word_embeddings=False, **ids
    )
    square: dict[str, Any] = {"size": {"height": side, "width": side}}
    parts = (
        LlavaOnevisionImageProcessorPil(**square, image_grid_pinpoints=sizes),
        words,
        LlavaOnevisionVideoProcessor(**square),
    )
    given = {
        "num_image_tokens": (side // 14) ** 2,
        "vision_feature_select_strategy": "full",
        "chat_template": words.chat_template,
    }
    return t.LlavaOnevisionForConditionalGeneration(config), t.LlavaOnevisionProcessor(*parts, **given)


def internvl() -> tuple[Any, Any]:
    import transformers as t
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words, side = tokenizer(template("<IMG_CONTEXT>\n", "USER: ", " ", "ASSISTANT:", "<video>\n"), **named), 112
    size = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": 7,
    }
    tower, text = (
        t.InternVLVisionConfig(**size, image_size=side, use_qk_norm=True),
        t.Qwen2Config(**TEXT, vocab_size=len(words)),
    )
    given: dict[str, Any] = {
        "image_token_id": words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        "image_seq_length": 64,
        "tie_word_embeddings": False,
    }
    square: dict[str, Any] = {"size": {"height": side, "width": side}}
    images = GotOcr2ImageProcessorPil(**square, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = t.InternVLProcessor(
        images, words, InternVLVideoProcessor(**square), image_seq_length=64, chat_template=words.chat_template
    )
    return t.InternVLForConditionalGeneration(
        t.InternVLConfig(vision_config=tower, text_config=text, **given)
    ), processor


def qwen(kind: str) -> tuple[Any, Any]:
    import transformers as t
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    words = tokenizer(
        template(
            "<|vision_start|><|image_pad|><|vision_end|>",
            "<|im_start|>user\n",
            "<|im_end|>\n",
            "<|im_start|>assistant\n",
        )
    )
    ids = {mark: words.convert_tokens_to_ids(mark) for mark in MARKS}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6}
    tower = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    common: dict[str, Any] = {
        "text_config": {**TEXT, "vocab_size": len(words), "rope_parameters": rope, "tie_word_embeddings": False},
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"], "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"], "tie_word_embeddings": False,
    }  # fmt: skip
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}
    if kind == "qwen3_vl":
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

        text = {**common["text_config"], "head_dim": 32, "rope_parameters": rope | {"mrope_interleaved": True}}
        vision = {
            **tower,
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
        }
        config = t.Qwen3VLConfig(
            **common | {"text_config": text},
            vision_config=vision | {"deepstack_visual_indexes": [0, 1], "in_channels": 3},
        )
        still = Qwen2VLImageProcessorPil(size=pixels, patch_size=14)
        # one for both, as in the family's checkpoints
        scale = {"image_mean": still.image_mean, "image_std": still.image_std}
        processor = still, words, Qwen3VLVideoProcessor(size=pixels, patch_size=14, **scale)
        return t.Qwen3VLForConditionalGeneration(config), t.Qwen3VLProcessor(
            *processor, chat_template=words.chat_template
        )
    parts = Qwen2VLImageProcessorPil(size=pixels), words, Qwen2VLVideoProcessor(size=pixels)
    if kind == "qwen2_vl":
        vision = {**tower, "embed_dim": 64, "mlp_ratio": 2, "hidden_size": 64}
        model = t.Qwen2VLForConditionalGeneration(t.Qwen2VLConfig(**common, vision_config=vision))
        return model, t.Qwen2VLProcessor(*parts, chat_template=words.chat_template)
    vision = {
        **tower,
        "hidden_size": 64,
        "intermediate_size": 128,
        "out_hidden_size": 64,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    model = t.Qwen2_5_VLForConditionalGeneration(t.Qwen2_5_VLConfig(**common, vision_config=vision))
    return model, t.Qwen2_5_VLProcessor(*parts, chat_template=words.chat_template)


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": lambda: llava(False),
    "llava_next": lambda: llava(True),
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "qwen2_5_vl": lambda: qwen("qwen2_5_vl"),
    "qwen2_vl": lambda: qwen("qwen2_vl"),
    "qwen3_vl": lambda: qwen("qwen3_vl"),
}


def make(family: str, folder: Path) -> Path:
    """The checkpoint of a family in ``folder``."""
    model, processor = FAMILIES[family]()
    for name, weight in model.named_parameters():
        drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(weight.shape, dtype=np.float32)
        scale = (
            0.02
            if "class_embedding" in name or "position" in name or "embed_tokens" in name
            else 0.5 / np.sqrt(max(weight.shape[-1], 1))
        )
        weight.data = torch.from_numpy(
            1 + 0.1 * drawn if "norm" in name and name.endswith("weight") else scale * 2 * drawn
        )
    model.float().eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def checksum(folder: Path) -> int:
    """Of all weights, whatever they are called."""
    with safe_open(folder / "model.safetensors", "pt") as stored:
        return sum(zlib.crc32(stored.get_tensor(name).numpy().tobytes()) for name in stored.keys()) % 2**32  # noqa: SIM118
