"""The tiny Video-LLaVA: stock Hugging Face classes with the sizes of the tiny LLaVA, and its words."""

from __future__ import annotations

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, VideoLlavaConfig, VideoLlavaForConditionalGeneration

from duet_vlm.evaluation.tiny import load
from duet_vlm.evaluation.tiny.network import FEATURE_LAYER, decoder_config, tower_config
from duet_vlm.evaluation.tiny.scenes import GRID as PICTURE_GRID
from duet_vlm.evaluation.tiny.scenes import PATCH
from duet_vlm.evaluation.tiny.text import SPECIAL, TOKEN, build_tokenizer
from duet_vlm_lab.generators.clips import CLIP_ROWS, GRID, SIDE

VIDEO = "<video>"
NEW_WORDS = ("where", "does", "move", "appear", "before", "after", "first", "last", "up", "down")
VIDEO_TOKEN = {**TOKEN, **{word: len(TOKEN) + i for i, word in enumerate((VIDEO, *NEW_WORDS))}}


def build_video_tokenizer(words: tuple[str, ...] = NEW_WORDS) -> PreTrainedTokenizerFast:
    """The tokenizer of the tiny model with ``<video>`` and a few more words; the embedding table has room for them."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL[4:], VIDEO]})
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    return tokenizer


def video_config(side: int = SIDE, rows: int = CLIP_ROWS) -> VideoLlavaConfig:
    """Eight frames of 112 px: 64 patches and CLS each, which stock Video-LLaVA hands to the decoder, too; 520 rows per
    clip. Or others."""
    tower = tower_config()
    tower.image_size = side
    return VideoLlavaConfig(
        vision_config=tower,
        text_config=decoder_config(),
        image_token_index=TOKEN["<image>"],
        video_token_index=VIDEO_TOKEN[VIDEO],
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        image_seq_length=(side // PATCH) ** 2,
        video_seq_length=rows,
        tie_word_embeddings=True,
    )


def build_video_model(config: VideoLlavaConfig | None = None) -> VideoLlavaForConditionalGeneration:
    """An untrained model, of :func:`video_config` unless said otherwise."""
    model = VideoLlavaForConditionalGeneration(config or video_config())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=TOKEN["<s>"],
        eos_token_id=TOKEN["</s>"],
        pad_token_id=TOKEN["<pad>"],
        max_new_tokens=4,
        do_sample=False,
    )
    return model


@torch.no_grad()
def start_from_pictures() -> VideoLlavaForConditionalGeneration:
    """The model with the weights of the shipped tiny LLaVA.

    Both towers are its tower; of its position table they keep the upper left corner, so that a patch is as large as it
    was.
    """
    model, (pictures, _) = build_video_model(), load()
    state = pictures.model.vision_tower.state_dict()
    start_towers(model, state, PICTURE_GRID, GRID)
    model.model.multi_modal_projector.load_state_dict(pictures.model.multi_modal_projector.state_dict())
    model.model.language_model.load_state_dict(pictures.model.language_model.state_dict())
    return model


@torch.no_grad()
def start_towers(
    model: VideoLlavaForConditionalGeneration, state: dict[str, torch.Tensor], given: int, grid: int
) -> None:
    """Both towers from the weights of one for ``given`` x ``given`` patches; of its positions they keep the upper left
    ``grid`` x ``grid``."""
    key = next(name for name in state if name.endswith("position_embedding.weight"))
    table = state[key]
    corner = table[1:].view(given, given, -1)[:grid, :grid].flatten(0, 1)
    towers: tuple[nn.Module, ...] = (model.model.video_tower, model.model.image_tower)
    for tower in towers:
        tower.load_state_dict({**state, key: torch.cat([table[:1], corner])})
