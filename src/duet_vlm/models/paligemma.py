"""PaliGemma: SigLIP tower, point-wise projector, bidirectional attention within the prefix of image and question."""

from __future__ import annotations

from torch import Tensor, nn

from duet_vlm.models.adapter import Adapter, Rotary
from duet_vlm.models.gemma3 import Gemma3


class PaliGemma(Gemma3):
    """``PaliGemmaForConditionalGeneration`` with a Gemma decoder; tokens are chosen before the projector, importance =
    attention received in the last tower layer. Text of the prefix ranks under the family's own mask, which hides no
    part of the prefix from it."""

    family = "paligemma"
    model_types = ("paligemma",)
    notes = "Gemma decoders (not Gemma 2); images of fixed size"
    example = "google/paligemma-3b-mix-224"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.pointwise_projector = self.base.multi_modal_projector

    def tokens_per_image(self) -> int:
        return self.side**2

    def rotary(self, hidden: Tensor, position_ids: Tensor, kind: str) -> Rotary:
        return Adapter.rotary(self, hidden, position_ids, kind)
