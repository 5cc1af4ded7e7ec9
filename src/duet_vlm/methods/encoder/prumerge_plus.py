"""PruMerge+: attention outliers and evenly spaced tokens, with similar ones merged into them, before the decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duet_vlm.methods.encoder.prumerge import PruMerge
from duet_vlm.ops.ragged import pack_right, upload
from duet_vlm.ops.select import outliers, ranking, spaced_picks, top
from duet_vlm.planning.budget import Budget, Keep, SpanPlan
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.registry import register
from duet_vlm.utils.field_types import check_choice


@register("prumerge_plus")
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """LLaVA-PruMerge+ (ICCV 2025, arXiv 2403.15388): ``prumerge`` with attention outliers and evenly spaced tokens.

    Outliers are more than 1.5 interquartile ranges above the third quartile of the attention over their image. At most
    a share ``important`` of the kept tokens are outliers, the most attended ones; the others are evenly spaced, in
    raster order, over the remaining tokens. Neighbours and the last row are merged as in ``prumerge``.

    Parameters
    ----------
    important : float
        The largest share of outliers, in [0, 1].
    spacing : str
        "even", or "grid" (released code): ``keep`` is the share r of most attended tokens, and with s = int(1 / r) the
        tokens s // 2, s // 2 + s, ... before the last one are added, also those that are kept already. These then
        occupy two rows, and as many of the lowest unkept tokens are lost.

    Cost: as ``prumerge``. Needs: vision attention and keys.

    Differences from the authors' code (42Shawn/LLaVA-PruMerge): those of ``prumerge``; nothing is kept twice, nothing
    is lost, any size of image. ``PruMergePlus.official`` restores the authors' training rule. Their adaptive rule for
    inference has no count that can be planned: ``adaptive`` is its choice for one image.
    """

    summary = "keep outliers of the attention and evenly spaced vision tokens, each with what resembles it, before the decoder"

    important: float = 0.5
    spacing: str = "even"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise ValueError(f"important={self.important}: a share of the tokens that are kept, in [0, 1]")
        check_choice("spacing", self.spacing, ("even", "grid"))

    @classmethod
    def official(cls, keep: Keep = 0.125, **fields: Any) -> PruMergePlus:
        """Return the settings of the released training rule, for ``keep`` of each crop and a grid of as many, at
        compact positions.
        """
        made: Any = super().official(keep, **{"spacing": "grid"} | fields)
        return made

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        if budget is not None and self.spacing == "grid":
            raise ValueError(
                f"{self.name}: spacing='grid' has counts of its own, give keep= instead of budget={budget}"
            )
        return super().plan(tokens, depth, budget)

    def kept_of(self, tokens: int) -> int:
        attended = super().kept_of(tokens)
        return attended + len(self.grid(tokens, attended)) if self.spacing == "grid" else attended

    def grid(self, tokens: int, attended: int) -> range:
        """Tokens that the released rule adds."""
        if attended < 1:
            raise ValueError(
                f"{self.name}: keep={self.keep} of {tokens} tokens is none, and spacing='grid' needs their distance"
            )
        step = int(1 / self.keep) if isinstance(self.keep, float) else tokens // attended
        return range(step // 2, tokens - 1, step)

    def select_tokens(self, view: EncoderView) -> Selection:
        return super().select_tokens(view) if self.spacing == "even" else self.around(view, *self.released(view))

    def chosen(self, view: EncoderView) -> tuple[Tensor, Tensor]:
        importance = view.require(Input.IMPORTANCE)
        most = upload([math.ceil(plan.dominant * self.important) for plan in view.plans], view.valid.device)
        important = torch.minimum(outliers(importance, view.valid).sum(1), most)
        attended = top(importance, view.valid, important)
        even = spaced_picks(view.valid & ~attended, view.dominant - important)
        return pack_right(attended | even, max(plan.dominant for plan in view.plans))

    def released(self, view: EncoderView) -> tuple[Tensor, Tensor, Tensor]:
        """Kept tokens [B, K], the tokens whose positions they take, and a mask of the valid ones.

        The second row of a token takes the position of a lost token.
        """
        device, sizes = (
            view.valid.device,
            [PruMerge.kept_of(self, plan.tokens) if plan.reduces_entry else plan.dominant for plan in view.plans],
        )
        grids = [
            list(self.grid(plan.tokens, n)) if plan.reduces_entry else []
            for plan, n in zip(view.plans, sizes, strict=True)
        ]
        most = max(map(len, grids))
        added = upload([[*grid, *[-1] * (most - len(grid))] for grid in grids], device, torch.long)
        first = ranking(view.require(Input.IMPORTANCE), view.valid)[:, : max(sizes)]
        real = torch.cat([torch.arange(first.shape[1], device=device) < upload(sizes, device)[:, None], added >= 0], 1)
        tokens = torch.cat([first, added.clamp(min=0)], 1)
        attended, kept = (_mask(tokens[:, :n], real[:, :n], view.valid) for n in (first.shape[1], tokens.shape[1]))
        again = attended.gather(1, added.clamp(min=0)) & (added >= 0)
        lost, _ = pack_right(view.valid & ~kept, max(most, 1))
        second = lost.gather(1, (again.cumsum(1) - 1).clamp(min=0))
        return tokens, torch.cat([first, torch.where(again, second, added.clamp(min=0))], 1), real


def _mask(tokens: Tensor, real: Tensor, valid: Tensor) -> Tensor:
    """Convert token numbers [B, K], some of them valid, to a mask of all tokens [B, N]."""
    return torch.zeros_like(valid).scatter_reduce_(1, tokens, real, "amax")


def adaptive(importance: Tensor) -> Tensor:
    """Tokens that the released inference code keeps of one image, in its order: importance [N] -> [K].

    All outliers by falling attention, with r their share; then the tokens 0, g, 2 g, ... before the last one that are
    no outliers, with g = int(int(1 / r) / 3). Waits for the device.
    """
    everyone = torch.ones_like(importance[None], dtype=torch.bool)
    share = outliers(importance[None], everyone).sum().item() / importance.numel()
    step = int(int(1 / share) / 3) if share else 0
    if step < 1:
        raise ValueError(
            f"{share:.0%} of the tokens are outliers of the attention: the released rule needs some, and at most a third"
        )
    attended = ranking(importance[None], everyone)[0, : int(importance.numel() * share)]
    grid = torch.arange(0, importance.numel() - 1, step, device=importance.device)
    return torch.cat([attended, grid[~torch.isin(grid, attended)]])
