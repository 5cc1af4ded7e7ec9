"""VipLLaVA, LLaVA-NeXT-Video and LLaVA-OneVision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from families.base import DEPTH, HIDDEN, IMAGE, PAD, VIDEO, VOCAB, Family, Inputs, Picture, attention_maps, noise
from families.llava import PINPOINTS, any_res_layout, any_res_pixels

SIDE, FRAMES = 4, 3
Signals = list[tuple[Tensor, Tensor]]

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 14 * SIDE, "patch_size": 14,
}  # fmt: skip
TEXT = {
    "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCAB, "max_position_embeddings": 1024, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def clip_signals(attention: nn.Module, run: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """CLS attention to the patches [B, N], summed over heads, and their mean keys [B, N, d], of one call."""
    ((weights, keys),) = attention_maps(attention, run)
    return weights[:, :, 0, 1:].sum(1), keys.unflatten(-1, (weights.shape[1], -1)).mean(2)[:, 1:]


def column_signals(attention: nn.Module, run: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """Attention that patches receive [B, N], mean over heads, summed over queries, and their mean keys [B, N, d], of
    one call."""
    ((weights, keys),) = attention_maps(attention, run)
    return weights.mean(1).sum(1), keys.unflatten(-1, (weights.shape[1], -1)).mean(2)


class VipLlava(Family):
    name = "vipllava"
    joined = (-2, -3, 1)

    def make(self) -> nn.Module:
        config = VipLlavaConfig(
            vision_config=CLIPVisionConfig(**VISION, projection_dim=32), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE,
            vision_feature_layers=list(self.joined), image_seq_length=SIDE**2,
        )  # fmt: skip
        return VipLlavaForConditionalGeneration(config)

    def tokens(self, picture: Picture) -> int:
        return SIDE**2

    def pixels(self, pictures: Sequence[Picture]) -> Inputs:
        return {"pixel_values": torch.stack([noise(p.seed, 3, 14 * SIDE, 14 * SIDE) for p in pictures])}

    def features(self, model: nn.Module, inputs: Inputs) -> dict[str, list[Tensor]]:
        states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        return {"image": list(torch.cat([states[layer][:, 1:] for layer in self.joined], -1))}

    def signals(self, model: nn.Module, inputs: Inputs) -> dict[str, Signals]:
        tower = model.model.vision_tower
        return {
            "image": list(
                zip(
                    *clip_signals(tower.encoder.layers[2].self_attn, lambda: tower(inputs["pixel_values"])), strict=True
                )
            )
        }

    def pointwise(self, model: nn.Module) -> nn.Module:
        return model.model.multi_modal_projector


class LlavaNextVideo(Family):
    """Any-resolution images, and clips of equally many frames whose patches are averaged two by two."""

    name = "llava_next_video"
    offloaded = "call"
    video = True
    layer = -2

    def make(self) -> nn.Module:
        config = LlavaNextVideoConfig(
            vision_config=CLIPVisionConfig(**VISION, projection_dim=32), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE,
            video_token_index=VIDEO, image_grid_pinpoints=[list(size) for size in PINPOINTS],
        )  # fmt: skip
        return LlavaNextVideoForConditionalGeneration(config)

    def tokens(self, picture: Picture) -> int:
        return FRAMES * 4 if picture.frames else len(any_res_layout(picture))

    def pixels(self, pictures: Sequence[Picture]) -> Inputs:
        images, clips = [p for p in pictures if not p.frames], [p for p in pictures if p.frames]
        batch = any_res_pixels(images) if images else {}
        if clips:
            batch["pixel_values_videos"] = torch.stack([noise(p.seed, FRAMES, 3, 14 * SIDE, 14 * SIDE) for p in clips])
        return batch

    def looked(self, model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tower = model.model.vision_tower
        return clip_signals(tower.encoder.layers[self.layer].self_attn, lambda: tower(pixels))

    def signals(self, model: nn.Module, inputs: Inputs) -> dict[str, Signals]:
        found: dict[str, Signals] = {}
        if "pixel_values" in inputs:
            found["image"] = []
            for size, pixels in zip(inputs["image_sizes"].tolist(), inputs["pixel_values"], strict=True):
                layout = self.layout(size)
                crops = 1 + max(place[0] for place in layout if place)
                importance, keys = self.looked(model, pixels[:crops])
                found["image"].append(self.laid_out(layout, importance, keys))
        if "pixel_values_videos" in inputs:
            found["video"] = [self.clip(*self.looked(model, pixels)) for pixels in inputs["pixel_values_videos"]]
        return found

    def layout(self, size: list[int]) -> list[tuple[int, int] | None]:
        return any_res_layout(Picture(0, size[0] // 11, size[1] // 11))

    def laid_out(self, layout: list[tuple[int, int] | None], importance: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        rows = [importance[place] if place else torch.tensor(float("nan")) for place in layout]
        return torch.stack(rows), torch.stack([keys[place] if place else keys[0, 0] for place in layout])

    def clip(self, importance: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Means over 2 x 2 patches: of 4 x 4 patches a frame keeps 2 x 2."""
        both = torch.cat([importance[..., None], keys], -1).unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(0, 2)
        return both[:, 0], both[:, 1:]


class LlavaOnevision(LlavaNextVideo):
    """SigLIP; images of more patches than one crop has are resized to about as many."""

    name = "llava_onevision"
    layer = -1

    def make(self) -> nn.Module:
        config = LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**VISION, vision_use_head=False), text_config=Qwen2Config(**TEXT), image_token_index=IMAGE,
            video_token_index=VIDEO, image_grid_pinpoints=[list(size) for size in PINPOINTS], vision_aspect_ratio="anyres_max_1",
        )  # fmt: skip
        return LlavaOnevisionForConditionalGeneration(config)

    def tokens(self, picture: Picture) -> int:
        if picture.frames:
            return FRAMES * 4 + 1
        return SIDE**2 + sum(1 + len(row) for row in self.resized(picture, torch.zeros(5, SIDE**2, 1)))

    def resized(self, picture: Picture, signals: Tensor) -> Tensor:
        """The crops' signals [crops, 16, c] side by side, cut to the picture and, where they are many, resized: [h, w,
        c]."""
        lines: list[list[Tensor]] = [[]]
        for place in any_res_layout(picture)[SIDE**2 :]:
            if place:
                lines[-1].append(signals[place])
            else:
                lines.append([])
        grid = torch.stack([torch.stack(line) for line in lines[:-1]])
        height, width = grid.shape[:2]
        ratio = math.sqrt(height * width / SIDE**2)
        if ratio <= 1.1:
            return grid
        size = [int(height // ratio), int(width // ratio)]
        return nn.functional.interpolate(grid.permute(2, 0, 1)[None], size=size, mode="bilinear")[0].permute(1, 2, 0)

    def looked(self, model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tower = model.model.vision_tower
        return column_signals(tower.encoder.layers[self.layer].self_attn, lambda: tower(pixels))

    def signals(self, model: nn.Module, inputs: Inputs) -> dict[str, Signals]:
        found = super().signals(model, inputs)
        if "image" in found:
            sizes = [Picture(0, height // 11, width // 11) for height, width in inputs["image_sizes"].tolist()]
            found["image"] = []
            for picture, pixels in zip(sizes, inputs["pixel_values"], strict=True):
                crops = 1 + max(place[0] for place in any_res_layout(picture) if place)
                both = torch.cat(
                    [x.unflatten(-1, (-1, 1)) if x.ndim == 2 else x for x in self.looked(model, pixels[:crops])], -1
                )
                # the newline behind each line
                lines = nn.functional.pad(self.resized(picture, both), (0, 0, 0, 1), value=float("nan"))
                rows = torch.cat([both[0], lines.flatten(0, 1)])
                found["image"].append((rows[:, 0], rows[:, 1:]))
        return found

    def clip(self, importance: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        importance, keys = super().clip(importance, keys)  # bilinear halving is the mean of 2 x 2
        return nn.functional.pad(importance, (0, 1), value=float("nan")), nn.functional.pad(keys, (0, 0, 0, 1))


FAMILIES: list[Family] = [VipLlava(), LlavaNextVideo(), LlavaOnevision()]
