"""Video-LLaVA: images as LLaVA, clips of equally many frames, each with its CLS row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

from families.base import DEPTH, HIDDEN, IMAGE, PAD, VIDEO, VOCAB, Family, Inputs, Picture, attention_maps, noise

SIDE, FRAMES, WIDTH = 4, 2, 32


def video_llava() -> nn.Module:
    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, projection_dim=32, image_size=14 * SIDE,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=DEPTH, num_attention_heads=4, num_key_value_heads=4, vocab_size=VOCAB,
            max_position_embeddings=512, pad_token_id=PAD, bos_token_id=1, eos_token_id=None,
        ),
        image_token_index=IMAGE, video_token_index=VIDEO,
    )  # fmt: skip
    return VideoLlavaForConditionalGeneration(config)


def clip_signals(attention: nn.Module, run: Any) -> tuple[Tensor, Tensor]:
    """CLS attention [B, N] to the patches, summed over heads, and mean keys [B, 1 + N, d] of one call."""
    ((weights, keys),) = attention_maps(attention, run)
    return weights[:, :, 0, 1:].sum(1), keys.unflatten(-1, (weights.shape[1], -1)).mean(2)


class VideoLlava(Family):
    """All clips of a call have the same number of frames, as the stock model's pixel tensor demands."""

    name = "video_llava"
    video = True

    def make(self) -> nn.Module:
        return video_llava()

    def tokens(self, picture: Picture) -> int:
        return FRAMES * (SIDE**2 + 1) if picture is not None and picture.frames else SIDE**2

    def pixels(self, pictures: Sequence[Picture]) -> Inputs:
        batch: Inputs = {}
        images, clips = [p for p in pictures if not p.frames], [p for p in pictures if p.frames]
        if images:
            batch["pixel_values"] = torch.stack([noise(p.seed, 3, 14 * SIDE, 14 * SIDE) for p in images])
        if clips:
            batch["pixel_values_videos"] = torch.stack([noise(p.seed, FRAMES, 3, 14 * SIDE, 14 * SIDE) for p in clips])
        return batch

    def features(self, model: nn.Module, inputs: Inputs) -> dict[str, list[Tensor]]:
        found, layer = {}, model.config.vision_feature_layer
        if "pixel_values" in inputs:
            states = model.model.image_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
            found["image"] = list(states[layer][:, 1:])
        if "pixel_values_videos" in inputs:
            found["video"] = [
                model.model.video_tower(clip, output_hidden_states=True).hidden_states[layer].reshape(-1, WIDTH)
                for clip in inputs["pixel_values_videos"]
            ]
        return found

    def signals(self, model: nn.Module, inputs: Inputs) -> dict[str, list[tuple[Tensor, Tensor]]]:
        found, towers = {}, model.model
        if "pixel_values" in inputs:
            attention = towers.image_tower.encoder.layers[-2].self_attn
            importance, keys = clip_signals(attention, lambda: towers.image_tower(inputs["pixel_values"]))
            found["image"] = list(zip(importance, keys[:, 1:], strict=True))
        if "pixel_values_videos" in inputs:
            found["video"] = []
            for clip in inputs["pixel_values_videos"]:
                attention = towers.video_tower.encoder.layers[-2].self_attn
                importance, keys = clip_signals(attention, lambda clip=clip: towers.video_tower(clip))
                importance = nn.functional.pad(importance, (1, 0), value=float("nan"))
                found["video"].append((importance.flatten(), keys.flatten(0, 1)))
        return found

    def pointwise(self, model: nn.Module) -> nn.Module:
        return model.model.multi_modal_projector


FAMILIES: list[Family] = [VideoLlava()]
