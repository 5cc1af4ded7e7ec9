"""Qwen3.5: the tower of Qwen3-VL without deepstack, and a decoder whose layers mostly have a state instead of attention."""

from __future__ import annotations

from torch import Tensor, nn

from duet_vlm.measure.shapes import VisionShape
from duet_vlm.models.adapter import Stream
from duet_vlm.models.qwen2_vl import Qwen2VL, frames_apart


class Qwen35(Qwen2VL):
    """``Qwen3_5ForConditionalGeneration``: V2V after the merger; tokens are ranked by the last layer with attention before their drop.

    Layers with linear attention keep order only, so rows that are gone leave no gap there. The first layers are of that kind: a method
    that must rank before the first attention (layer 3 as released) is refused with the first layer that it can drop in front of.
    """

    family = "qwen3_5"
    model_types = ("qwen3_5", "qwen3_5_moe")
    notes = "images of any size, video; linear and full attention, ranked by the latter; kept positions only (M-RoPE)"
    example = "Qwen/Qwen3.5-9B"

    def written(self, stream: Stream, tokens: int, parts: tuple[int, ...]) -> list[int]:
        return frames_apart(self.config, stream, parts)

    def heads(self, layer: nn.Module, which: str, hidden: Tensor) -> Tensor:
        heads = super().heads(layer, which, hidden)
        return heads[:, :, ::2] if which == "q" else heads  # behind each query head comes the gate of its output

    def vision_shape(self) -> VisionShape:
        vision = self.config.vision_config
        return self._vision_shape(vision.hidden_size, vision.intermediate_size, 2, vision.out_hidden_size)
