"""The model ``tiny-long``: the tiny video model with smaller frames, many of them, and two more words."""

from __future__ import annotations

import torch
from transformers import VideoLlavaForConditionalGeneration

from duet_vlm.evaluation.tiny.scenes import PATCH
from duet_vlm_lab.generators.clips import GRID
from duet_vlm_lab.generators.long_clips import LENGTHS, ROWS, SIDE
from duet_vlm_lab.networks.video_network import NEW_WORDS, VIDEO_TOKEN, build_video_model, start_towers, video_config
from duet_vlm_lab.tasks import video

LONG_WORDS = (*NEW_WORDS, "in", "scene")
LONG_TOKEN = {**VIDEO_TOKEN, **{word: len(VIDEO_TOKEN) + i for i, word in enumerate(LONG_WORDS[len(NEW_WORDS) :])}}
POSITIONS = 2048  # the longest clip has 1,280 rows


def build_long_model() -> VideoLlavaForConditionalGeneration:
    """An untrained model."""
    config = video_config(SIDE, LENGTHS[-1] * ROWS)
    config.text_config.max_position_embeddings = POSITIONS
    return build_video_model(config)


@torch.no_grad()
def start_from_clips() -> VideoLlavaForConditionalGeneration:
    """The model with the weights of the shipped tiny video model; its towers read 2 x 2 patches instead of 8 x 8."""
    model, (clips, _) = build_long_model(), video.load()
    start_towers(model, clips.model.video_tower.state_dict(), GRID, SIDE // PATCH)
    model.model.multi_modal_projector.load_state_dict(clips.model.multi_modal_projector.state_dict())
    model.model.language_model.load_state_dict(clips.model.language_model.state_dict())
    return model
