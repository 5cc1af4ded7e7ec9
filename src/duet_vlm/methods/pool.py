"""Average pooling: the baseline that trained compressors are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from duet_vlm.ops.windows import GridWindows, windows
from duet_vlm.planning.budget import Budget, Keep, SpanPlan, check_keep
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.plans import plan_fixed_count
from duet_vlm.reducers.registry import register


@register("pool")
@dataclass(frozen=True)
class Pool(EncoderReducer):
    """Every picture, crop or frame is cut into as many windows as rows may enter, and each row is the mean of its window.

    Windows have equally many tokens, or one more, and are rectangles where rows and columns are multiples of them: 24 x 24 tokens become 8 x 8
    windows of 3 x 3 at 64. With ``crops="joint"`` crops or frames are cut together, one below the other. A row stands where the token in the middle
    of its window stood. Nothing is learned here; a projector and a decoder that are trained with it learn to read means.

    Parameters
    ----------
    keep : int or float, optional
        Rows that enter the decoder for an image, or a fraction of its tokens.

    Cost: two sorts of token numbers. Needs nothing of the tower. Means are taken in front of a point-wise projector. Usable in training.
    """

    paper = "baseline"
    summary = "the mean of every window of a grid as one row, before the decoder (baseline)"
    requires = frozenset({Input.FEATURES, Input.GRID})

    crops: str = "per_crop"
    keep: Keep | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cls_token:
            raise ValueError("cls_token=True: pool makes its rows of patches, the CLS row is none of them; leave it out")
        if self.keep is not None:
            check_keep("keep", self.keep)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        return plan_fixed_count(self, self.keep, tokens, depth, budget)

    def select_tokens(self, view: EncoderView) -> Selection:
        return windows_of(view).selection()


def places_of(view: EncoderView) -> Tensor:
    """Row and column of each token [B, N, 2], parts that are reduced together one below the other."""
    coords, size, _ = view.require(Input.GRID)
    above = view.require_parts().clamp(min=0) * size[:, :1]
    return coords.clamp(min=0) + nn.functional.pad(above[..., None], (0, 1))


def windows_of(view: EncoderView) -> GridWindows:
    """The windows of each picture, as many as rows are planned."""
    most = max(plan.entry for plan in view.plans)
    largest = max((-(-plan.tokens // plan.entry) for plan in view.plans if plan.entry), default=1)
    return windows(places_of(view), view.valid, view.dominant + view.contextual, most, largest)
