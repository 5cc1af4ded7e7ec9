"""VipLLaVA: LLaVA whose features concatenate several layers of the tower."""

from __future__ import annotations

from duet_vlm.models.llava import Llava


class VipLlava(Llava):
    """``VipLlavaForConditionalGeneration``: as LLaVA; importance = CLS attention of the deepest layer among the
    features."""

    family = "vipllava"
    model_types = ("vipllava",)
    notes = "CLIP towers; images; decoders of the Llama layout"
    example = "llava-hf/vip-llava-7b-hf"
