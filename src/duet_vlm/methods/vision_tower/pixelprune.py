"""PixelPrune: drop patches that repeat their neighbours' pixels, before the vision tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.vision_tower import ThresholdReducer, TowerView, check_threshold
from duet_vlm.utils.field_types import check_choice


@register("pixelprune")
@dataclass(frozen=True)
class PixelPrune(ThresholdReducer):
    """PixelPrune (arXiv 2604.00886): drop predictable patches before the vision tower's first block.

    A unit (a patch, or a group of patches that later forms one token) is kept if its pixels differ from a prediction
    from its neighbours, as in lossless image coders. The prediction is the unit to the left; where that one equals the
    corner above it and the unit above does not, it is the unit above. The first unit is always kept. A method for
    documents and screens: photographs hardly repeat.

    Parameters
    ----------
    threshold : float
        Largest difference of pixel values that counts as none, in the scale of the processor's output (for CLIP one of
        255 steps is about 0.015). A dropped unit takes the value of its prediction, so that errors do not add up.
    metric : str
        Difference of two units: the largest over their values ("max"), or the mean ("mean").

    With ``keep``, or a budget, the units that differ most from their prediction are kept; all predictions then use the
    units as they are.

    Cost: with a threshold of 0 one pass over the pixels; otherwise as many steps as the image has units. Needs: pixels;
    no attention and no text.
    """

    paper = "PixelPrune, arXiv 2604.00886"
    summary = "patches that repeat the pixels beside or above them do not go through the vision tower"
    requires = frozenset({Input.PIXELS})

    default_options = TokenOptions(proportional_attention=False)
    threshold: float = 0.0
    metric: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_threshold(self.threshold)
        check_choice("metric", self.metric, ("max", "mean"))

    def scores(self, view: TowerView) -> Tensor:
        scores = torch.zeros(view.valid.shape, device=view.valid.device)
        for picture, grid in enumerate(view.grids):
            count = grid[0] * grid[1]
            pixels = view.require(Input.PIXELS)[picture, :count, 0].float().unflatten(0, grid)
            scores[picture, :count] = self.of_picture(pixels, bool(view.host_num_keep)).flatten()
        return scores

    def of_picture(self, pixels: Tensor, as_they_are: bool) -> Tensor:
        """Difference of each unit from its prediction, less the threshold: [h, w, m] -> [h, w]."""
        if as_they_are or self.threshold == 0:  # dropped units equal their predictions
            return self.above(pixels, self.predicted(pixels))
        rows, columns, _ = pixels.shape
        value, is_new = pixels.clone(), pixels.new_zeros(rows, columns)
        for row in range(rows):
            for column in range(columns):
                guess = self.predicted(value[max(0, row - 1) : row + 1, max(0, column - 1) : column + 1])[-1, -1]
                is_new[row, column] = self.above(pixels[row, column], guess) if row or column else torch.inf
                value[row, column] = torch.where(is_new[row, column] > 0, pixels[row, column], guess)
        return is_new

    def above(self, one: Tensor, other: Tensor) -> Tensor:
        apart = (one - other).abs()
        return (apart.amax(-1) if self.metric == "max" else apart.mean(-1)) - self.threshold

    def predicted(self, value: Tensor) -> Tensor:
        """Prediction of each unit from the units to the left and above: [h, w, m]; infinite for the first unit."""
        left, above = value.roll(1, 1), value.roll(1, 0)
        guess = left.clone()
        if len(value) > 1 and value.shape[1] > 1:
            corner = value.roll((1, 1), (0, 1))
            edge = (self.above(corner, left) <= 0) & (self.above(corner, above) > 0)
            guess = torch.where(edge[..., None], above, left)
            guess[0] = left[0]
        guess[:, 0] = above[:, 0]
        guess[0, 0] = torch.inf
        return guess
