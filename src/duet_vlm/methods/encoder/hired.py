"""HiRED: share a budget among the crops of an image by an early vision layer's attention, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duet_vlm.ops.groups import proportional_shares, sums_of_groups, top_of_groups
from duet_vlm.ops.ragged import upload
from duet_vlm.ops.select import top
from duet_vlm.planning.budget import Keep, count_of
from duet_vlm.reducers.base import ROUNDINGS
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.encoder_view import Layer
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.score import ScoreReducer
from duet_vlm.utils.field_types import check_choice

MOST_CROPS = 64  # more than any model cuts a picture into
FAR = 1 << 30


@register("hired")
@dataclass(frozen=True)
class HiRED(ScoreReducer):
    """HiRED (AAAI 2025, arXiv 2408.10945): one budget for all crops of an image, divided by attention.

    The share ``alpha`` of the budget goes to the overview. Its most attended tokens in an early vision layer (the
    fraction 1 - ``alpha`` of its tokens) are counted in the region of each crop, and the rest of the budget is divided
    among the crops in proportion. Overview and crops keep the tokens with the largest attention in a late layer. An
    image without crops keeps its most attended tokens. Nothing is merged.

    Parameters
    ----------
    keep : int or float, optional
        Tokens kept per span: a count, or a fraction (the authors': 0.2). A budget of n keeps n.
    alpha : float
        Share of the budget for the overview, in [0, 1].
    early : int or float
        Vision layer whose attention divides the budget: its number, or a share of the depth (0.0: the first layer that
        attends globally).
    regions : str
        "quadrants": the crop that shows the same place; "stripes": equal runs of the overview's raster order, one for
        each crop (released code).
    rounding : str
        Rounding of a fraction to a count: "floor", "int" or "round".

    Cost: one query row of attention (CLS) or blocked column sums of two vision layers. Needs: vision attention and the
    grid. Usable in training (the choice carries no gradient).

    Differences from the authors' code (hasanar1f/HiRED): exactly the planned number of tokens (the released code loses
    fractions of shares, and tokens in padding), regions instead of stripes, kept positions, any number of crops.
    ``official`` restores stripes, int counts and compact positions; tokens lost to fractions still go to the next best.
    """

    paper = "HiRED, AAAI 2025, arXiv 2408.10945"
    summary = "share the budget among a picture's crops by an early vision layer, keep each one's most attended tokens, before the decoder"
    requires = frozenset({Input.IMPORTANCE, Input.GRID})

    alpha: float = 0.5
    early: Layer = 0.0
    regions: str = "quadrants"
    rounding: str = "floor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: the overview's share of the budget, in [0, 1]")
        check_choice("regions", self.regions, ("quadrants", "stripes"))
        check_choice("rounding", self.rounding, ROUNDINGS)
        if self.options.cls_token:
            raise ValueError(f"cls_token=True cannot work with {self.name}: the CLS row stands nowhere in a crop")

    @classmethod
    def official(cls, keep: Keep = 0.2, alpha: float = 0.5, **fields: Any) -> HiRED:
        """Return the settings of the released code: stripes, truncated float products, compact positions."""
        options = TokenOptions(positions="compact", crops="joint", protect_predicting_tokens=False, signal_queries=None)
        return cls.from_preset(options, fields, keep=keep, alpha=alpha, regions="stripes", rounding="int")

    @property
    def signal_layers(self) -> tuple[Layer, ...]:
        return (self.options.signal_layer, self.early)

    def score(self, view: EncoderView) -> Tensor:
        return view.require(Input.IMPORTANCE)

    def choose(self, scores: Tensor, view: EncoderView) -> Tensor:
        group, crops = self.crop_tokens(view)
        return top_of_groups(scores, group, view.valid, self.quota(view, group, crops), view.dominant)

    def crop_tokens(self, view: EncoderView) -> tuple[Tensor, int]:
        """Number each token's crop, 0 for the overview: [B, N] long, and an upper bound of the number of crops."""
        most = max(1, min(MOST_CROPS, max(plan.tokens for plan in view.plans) - 1))
        _, _, crop_grid = view.require(Input.GRID)
        return torch.where(crop_grid.prod(1, keepdim=True) > 0, view.require_parts().clamp(0, most), 0), most

    def quota(self, view: EncoderView, group: Tensor, crops: int) -> Tensor:
        """Tokens kept of the overview and of each crop [B, 1 + crops]: an image without crops gets the whole budget."""
        overview = view.valid & (group == 0)
        size = sums_of_groups(view.valid, group, view.valid, 1 + crops).long()
        first = upload([int(plan.dominant * self.alpha) for plan in view.plans], view.valid.device)
        rest = torch.minimum(view.dominant - torch.minimum(first, size[:, 0]), size[:, 1:].sum(1))
        weight = sums_of_groups(self.important(view, overview), self.region(view, group, crops), overview, crops)
        if self.regions == "quadrants":
            split = proportional_shares(weight, size[:, 1:], rest)
        else:  # float32 and rounded down, as released
            split = torch.minimum(
                (weight / weight.sum(1, keepdim=True).clamp(min=1) * rest[:, None]).floor().long(), size[:, 1:]
            )
        return torch.cat([(view.dominant - rest)[:, None], split], 1)

    def important(self, view: EncoderView, overview: Tensor) -> Tensor:
        """Mask [B, N] of the most attended tokens of the overview [B, N] in the early layer."""
        early, most = view.require(Input.IMPORTANCE, layer=1), max(plan.tokens for plan in view.plans)
        wanted = upload([count_of(1 - self.alpha, n, self.rounding) for n in range(most + 1)], overview.device)
        return top(early, overview, wanted[overview.sum(1).clamp(max=most)])

    def region(self, view: EncoderView, group: Tensor, crops: int) -> Tensor:
        """Number, from 0, of the crop that shows the place of each token of the overview: [B, N]."""
        coords, grid_size, crop_grid = view.require(Input.GRID)
        high, wide, rows, columns = (x[:, None] for x in (*grid_size.unbind(1), *crop_grid.clamp(min=1).unbind(1)))
        if self.regions == "stripes":
            raster = coords[..., 0] * wide + coords[..., 1]
            return (raster * (rows * columns) // (high * wide)).clamp(0, crops - 1)
        crop, shows = (group - 1).clamp(min=0), (view.valid & (group > 0))[..., None]
        mosaic = coords + torch.stack([crop // columns * high, crop % columns * wide], 2)
        # what is no padding: the overview shows the picture alone
        begins = mosaic.masked_fill(~shows, FAR).amin(1, keepdim=True)
        ends = mosaic.masked_fill(~shows, -1).amax(1, keepdim=True) + 1
        at = (begins + (coords + 0.5) / grid_size[:, None] * (ends - begins)).floor().long() // grid_size[:, None]
        return (at[..., 0] * columns + at[..., 1]).clamp(0, crops - 1)


def kept_of_one(importance: Tensor, keep: float, spatial: float = 0.0) -> Tensor:
    """Tokens that the released code keeps of one image without crops, ascending: importance [N] -> [K].

    The most attended tokens; with ``spatial`` also tokens 0, N // n, ... before the last one, for n = int(N spatial).
    The number of tokens in both sets is not known before the call.
    """
    tokens = len(importance)
    everyone = torch.ones_like(importance[None], dtype=torch.bool)
    kept = top(importance[None], everyone, upload([int(tokens * keep)], importance.device))[0]
    if count := int(tokens * spatial):
        kept[torch.arange(0, tokens - 1, tokens // count, device=importance.device)] = True
    return kept.nonzero()[:, 0]
