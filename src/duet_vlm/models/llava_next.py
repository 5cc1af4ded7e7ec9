"""LLaVA-NeXT: crops of any resolution around a CLIP tower, packed into one span per image with a newline token at the
end of each line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

from duet_vlm.models.adapter import EncoderCall, Modality, RecordedQK
from duet_vlm.models.llava import Llava


class LlavaNext(Llava):
    """``LlavaNextForConditionalGeneration``: the encoder stage sees the packed tokens of an image, its overview and all
    its crops together.

    Importance = CLS attention within each crop. The signals travel through the model's own packing, so they line up
    with the features after cutting and padding. Newline tokens are separators: they are dropped first when the encoder
    stage reduces the image.
    """

    family = "llava_next"
    model_types = ("llava_next",)
    notes = "images of any size, all crops of an image reduced together; MHA and GQA decoders of the Llama layout"
    example = "llava-hf/llava-v1.6-mistral-7b-hf"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.pointwise_projector, self.fixed_tokens = None, None

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return (Modality("image", "get_image_features", self.image_token_id, "pixel_values", "image_sizes"),)

    def check(self) -> None:
        super().check()
        if self.feeds_cls:
            raise TypeError(
                f"{self.family}: vision_feature_select_strategy='full' cannot be packed into a grid; only 'default' "
                "is supported"
            )

    def patches_to_tokens(self, patches: Tensor, call: EncoderCall) -> list[Tensor]:
        return self.packed(patches, call)

    def images_of(self, call: EncoderCall, count: int, tokens: int) -> list[tuple[int, ...]]:
        packed_counts = self.real_patches(call, count).sum(1).split(self.crops(call))
        return [tuple(sizes.tolist()) for sizes in packed_counts]

    def num_separator_rows(self, call: EncoderCall, spans: int) -> list[int]:
        patches = torch.ones(sum(self.crops(call)), self.side**2, 1, device="cpu")
        return [int((rows == 0).sum()) for rows in self.packed(patches, call)]

    def real_patches(self, call: EncoderCall, pictures: int) -> Tensor:
        """Mask of the patches that packing does not cut off."""
        packed = torch.zeros(pictures * self.side**2 + 1, dtype=torch.bool, device="cpu")
        packed[torch.cat(self._numbers(call))] = True
        return packed[1:].view(pictures, -1)

    def _numbers(self, call: EncoderCall) -> list[Tensor]:
        """Per image: number of the patch that each token shows, counted over the call from 1; 0 for newlines. On the
        host."""
        crops = sum(self.crops(call))
        numbers = torch.arange(1, crops * self.side**2 + 1, dtype=torch.float64, device="cpu").view(crops, -1, 1)
        return [rows[:, 0].long() for rows in self.packed(numbers, call)]

    def importance_and_keys(
        self, calls: list[RecordedQK], call: EncoderCall, segmented: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        (recorded,) = calls
        importance, keys = self.signals(recorded)
        packed = self.packed(torch.cat([importance[..., None], keys], -1), call)
        return [rows[:, 0] for rows in packed], [rows[:, 1:] for rows in packed]

    def unpack_to_spans(self, projected: Tensor, call: EncoderCall) -> list[Tensor]:
        return self.packed(projected, call)

    def grid_sizes(self, call: EncoderCall, counts: list[int]) -> list[tuple[int, int]]:
        return [(self.side, self.side)] * len(counts)

    def token_coords(self, call: EncoderCall, counts: list[int]) -> list[Tensor]:
        """Coordinates of the whole mosaic are packed as features are; the crop's corner is then subtracted."""
        side, patch = self.side, torch.arange(self.side**2, device="cpu")
        local = torch.stack([patch // side, patch % side], 1)
        corners = [
            torch.tensor([(0, 0), *((i // c, i % c) for i in range(r * c))], device="cpu") * side
            for r, c in self.crop_grids(call, counts)
        ]
        mosaic = torch.cat([corner[:, None] + local for corner in corners]).double()
        coords = []
        for rows, corner, part in zip(self.packed(mosaic, call), corners, self.parts(call, counts), strict=True):
            coord = (rows - corner[part.clamp(min=0)]).floor().long().clamp(0, side - 1)
            coords.append(coord.masked_fill((part < 0)[:, None], -1))
        return coords

    def crop_grids(self, call: EncoderCall, counts: list[int]) -> list[tuple[int, int]]:
        pinpoints, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        shapes = [get_anyres_image_grid_shape(size, pinpoints, side) for size in call.sizes]
        return [tuple(shape) if crops > 1 else (0, 0) for shape, crops in zip(shapes, self.crops(call), strict=True)]

    def parts(self, call: EncoderCall, counts: list[int]) -> list[Tensor]:
        crops = self.crops(call)
        crop_one_hot = torch.cat([torch.eye(n, max(crops), device="cpu") for n in crops])[:, None].expand(
            -1, self.side**2, -1
        )
        return [torch.where(rows.any(1), rows.argmax(1), -1) for rows in self.packed(crop_one_hot, call)]

    def packed(self, signals: Tensor, call: EncoderCall) -> list[Tensor]:
        """Signals [crops, N, c] laid out as the model lays out its features: per image [n, c], 0 for newlines."""
        rows, _ = self.base.pack_image_features(
            signals.split(self.crops(call)),
            call.sizes,
            vision_feature_select_strategy="default",
            image_newline=signals.new_zeros(signals.shape[-1]),
        )
        return rows

    def crops(self, call: EncoderCall) -> list[int]:
        """Crops per image, the overview included."""
        pinpoints, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        return [image_size_to_num_patches(size, pinpoints, side) for size in call.sizes]

    def tokens_per_crop(self, call: EncoderCall, counts: list[int]) -> list[tuple[int, ...]]:
        return [(self.side**2,) * crops for crops in self.crops(call)]

    def grids(self, call: EncoderCall, counts: list[int]) -> tuple[tuple[int, int] | None, ...]:
        return (None,) * len(counts)

    def blank_image(self) -> dict[str, Any]:
        crop = super().blank_image()["pixel_values"]
        side = self.config.vision_config.image_size
        sizes = torch.tensor([[side, side]], device=crop.device)
        (count,) = self.crops(EncoderCall("image", [[side, side]]))
        return {"pixel_values": crop[None].expand(1, count, *crop.shape[1:]), "image_sizes": sizes}
