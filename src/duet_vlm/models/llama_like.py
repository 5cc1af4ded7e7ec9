"""Queries and keys of decoders of the Llama layout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import Adapter, Rotary
from duet_vlm.ops.ragged import gather_rows

LLAMA_LAYOUT = (
    "llama", "mistral", "ministral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "granite", "phi", "stablelm", "gemma",
)  # fmt: skip


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding in the half-split layout: x [B, H, n, d], cos and sin [B or 1, n, r]; channels from r on stay as
    they are."""
    cos, sin = (t.unsqueeze(1) for t in rotary)
    rotated, plain = x.tensor_split((cos.shape[-1],), dim=-1)
    out = rotated * cos
    (first, second), (low, high), (of_low, of_high) = (t.chunk(2, dim=-1) for t in (rotated, out, sin))
    low.addcmul_(second, of_low, value=-1)  # in place: new memory costs more than the arithmetic
    high.addcmul_(first, of_high)
    return torch.cat((out, plain), dim=-1) if plain.shape[-1] else out


class LlamaLike(Adapter):
    """A family whose decoder layers are laid out as in Llama and Qwen2: input norm, separate projections, half-split
    rotary.

    Norms of single heads (``q_norm``, ``k_norm``, as in Qwen3) are applied where the layer has them; families with
    another layout override ``rotate``.
    """

    rotate: Callable[[Tensor, Rotary], Tensor] = staticmethod(rotate)

    def project(
        self, layer: nn.Module, hidden: Tensor, rotary: Rotary, query_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        normed = layer.input_layernorm(hidden)
        key = self._rotated(layer, "k", normed, rotary)
        return self._rotated(
            layer,
            "q",
            gather_rows(normed, query_positions),
            (gather_rows(rotary[0], query_positions), gather_rows(rotary[1], query_positions)),
        ), key

    def key_projection(self, layer: nn.Module) -> nn.Module | None:
        return getattr(getattr(layer, "self_attn", None), "k_proj", None)

    def modules_run_for_scores(self, layer: nn.Module) -> list[nn.Module]:
        return [module for module in (layer.input_layernorm, self.key_projection(layer)) if module is not None]

    def scaling(self, layer: nn.Module) -> float:
        return float(layer.self_attn.scaling)

    def heads(self, layer: nn.Module, which: str, hidden: Tensor) -> Tensor:
        """Projected heads [B, n, H, d] of normed hidden states [B, n, D]; ``which`` is "q" or "k"."""
        projected: Tensor = getattr(layer.self_attn, f"{which}_proj")(hidden)
        return projected.view(*projected.shape[:-1], -1, layer.self_attn.head_dim)

    def _rotated(self, layer: nn.Module, which: str, hidden: Tensor, rotary: Rotary) -> Tensor:
        x = self.heads(layer, which, hidden)
        norm = getattr(layer.self_attn, f"{which}_norm", None)
        x = x if norm is None else norm(x)
        return self.rotate(x.to(torch.promote_types(x.dtype, rotary[0].dtype)).transpose(1, 2), rotary)

    def check_decoder(self) -> None:
        """Refuse decoders whose queries and keys would come out wrong here; for families that take decoders of any
        kind.

        Raises
        ------
        TypeError
            Naming the decoder and those that are compared with their own projections by a test.
        """
        kind = self.text_model.config.model_type
        if kind not in LLAMA_LAYOUT:
            raise TypeError(
                f"{self.family}: ranking tokens with a {kind} decoder is not tested here, so it is refused; tested "
                f"are: {', '.join(LLAMA_LAYOUT)}"
            )
