"""Qwen3.5: the tower of Qwen3-VL without deepstack, and a decoder whose layers mostly have a state instead of
attention."""

from __future__ import annotations

from torch import Tensor, nn

from duet_vlm.models.adapter import Modality
from duet_vlm.models.qwen2_vl import Qwen2VL, frames_apart
from duet_vlm.ops.merge import unit_rows
from duet_vlm.ops.ragged import gather_rows
from duet_vlm.profiling.model_dims import VisionDims


class Qwen35(Qwen2VL):
    """``Qwen3_5ForConditionalGeneration``: tokens are chosen after the merger, and ranked by the last layer with
    attention before their drop.

    Layers with linear attention keep order only, so dropped tokens open no gap there. The first layers are of that
    kind: a method that must rank before the first attention (layer 3 as released) is refused, with the first layer that
    it can drop before, unless it ranks by states (``stateful``).
    """

    family = "qwen3_5"
    model_types = ("qwen3_5", "qwen3_5_moe")
    notes = "images of any size, video; linear and full attention, ranked by the latter; kept positions only (M-RoPE)"
    example = "Qwen/Qwen3.5-9B"

    def placeholder_ids(self, modality: Modality, tokens: int, parts: tuple[int, ...]) -> list[int]:
        return frames_apart(self.config, modality, parts)

    def heads(self, layer: nn.Module, which: str, hidden: Tensor) -> Tensor:
        heads = super().heads(layer, which, hidden)
        return heads[:, :, ::2] if which == "q" else heads  # after each query head comes the gate of its output

    def linear_attention_scores(
        self, layer: nn.Module, hidden: Tensor, valid: Tensor, query_positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and write gates of a gated delta rule (Yang et al., ICLR 2025); gates of value heads that share
        a key are added."""
        mixer = layer.linear_attn
        normed = layer.input_layernorm(hidden) * valid[..., None]
        heads, width = mixer.num_k_heads, mixer.head_k_dim
        queries_keys = mixer.in_proj_qkv(normed)[..., : 2 * heads * width].transpose(1, 2)
        weight = mixer.conv1d.weight[: queries_keys.shape[1]]
        queries_keys = nn.functional.conv1d(
            queries_keys.to(weight.dtype), weight, padding=weight.shape[-1] - 1, groups=len(weight)
        )[..., : hidden.shape[1]]
        query, key = (
            unit_rows(nn.functional.silu(queries_keys).transpose(1, 2).unflatten(2, (2, heads, width)))
            .transpose(1, 3)
            .unbind(2)
        )
        gate = mixer.in_proj_b(normed).float().sigmoid().unflatten(2, (heads, -1)).mean(3) / heads
        return gather_rows(query.transpose(1, 2), query_positions).transpose(1, 2), key, gate.transpose(1, 2)

    def vision_dims(self) -> VisionDims:
        vision = self.config.vision_config
        return self._vision_shape(vision.hidden_size, vision.intermediate_size, 2, vision.out_hidden_size)
