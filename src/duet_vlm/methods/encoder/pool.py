"""Average pooling: the baseline of trained compressors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from duet_vlm.ops.windows import GridWindows, windows
from duet_vlm.planning.budget import Budget, Keep, SpanPlan, check_keep
from duet_vlm.planning.solve import plan_fixed_count
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register


@register("pool")
@dataclass(frozen=True)
class Pool(EncoderReducer):
    """Average pooling on the grid: the baseline of trained compressors.

    Every image, crop or frame is cut into as many windows as tokens enter, and each window is averaged to one token.
    Windows have equally many tokens, or one more, and are rectangles where rows and columns are multiples of them: 24 x
    24 tokens become 8 x 8 windows of 3 x 3 at 64. With ``crops="joint"`` crops or frames are cut together, one below
    the other. A pooled token has the position of the token in the middle of its window. Nothing is learned here; a
    projector and a decoder that are trained with it adapt to the means.

    Parameters
    ----------
    keep : int or float, optional
        Tokens that enter the decoder per span: a count, or a fraction. A budget of n keeps n.

    Cost: two sorts of token numbers. Needs: the grid; no attention and no text. Means are taken before a point-wise
    projector. Usable in training.
    """

    paper = "baseline"
    summary = "the mean of every window of a grid as one row, before the decoder (baseline)"
    requires = frozenset({Input.FEATURES, Input.GRID})

    default_options = TokenOptions(crops="per_crop")
    keep: Keep | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.options.cls_token:
            raise ValueError(
                "cls_token=True: pool makes its rows of patches, the CLS row is none of them; leave it out"
            )
        if self.keep is not None:
            check_keep("keep", self.keep)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        return plan_fixed_count(self, self.keep, tokens, depth, budget)

    def select_tokens(self, view: EncoderView) -> Selection:
        return windows_of(view).selection()


def places_of(view: EncoderView) -> Tensor:
    """Row and column of each token [B, N, 2], with parts that are reduced together one below the other."""
    coords, size, _ = view.require(Input.GRID)
    above = view.require_parts().clamp(min=0) * size[:, :1]
    return coords.clamp(min=0) + nn.functional.pad(above[..., None], (0, 1))


def windows_of(view: EncoderView) -> GridWindows:
    """Cut each image into as many windows as tokens are planned."""
    most = max(plan.entry for plan in view.plans)
    largest = max((-(-plan.tokens // plan.entry) for plan in view.plans if plan.entry), default=1)
    return windows(places_of(view), view.valid, view.dominant + view.contextual, most, largest)
