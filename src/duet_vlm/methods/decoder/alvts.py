"""ALVTS: visual tokens chosen anew in front of every decoder layer; the others sleep."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from duet_vlm.ops.select import top
from duet_vlm.planning.budget import Budget, Keep, SpanPlan, check_keep
from duet_vlm.planning.solve import plan_fixed_count
from duet_vlm.reducers.decoder import DecoderReducer, DecoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register


@register("alvts")
@dataclass(frozen=True)
class Alvts(DecoderReducer):
    """ALVTS (CVPR 2026, arXiv 2606.14277), by two sets of notes on the paper: no code is public.

    In front of every decoder layer, the first included, the visual tokens are chosen anew that both the text and the
    other visual tokens attend to: by the product of the two means over heads and queries. The others sleep: they skip
    the layer, and are invisible in it. Every layer keeps the same number.

    Parameters
    ----------
    keep : int or float, optional
        Visual tokens of each span that a layer computes, or the fraction of the span's tokens.

    Cost: in every layer the keys and queries of all visual tokens and their attention among themselves. Needs: text
    after the image; attention in every layer from the first on. Usable in training.

    Differences from the paper: scores are those of the layer's own projections, which its selectors, low-rank copies of
    these, are calibrated to imitate; so the ranking is the one that they aim at, and choosing costs more.
    """

    paper = "ALVTS, CVPR 2026, arXiv 2606.14277"
    summary = (
        "choose anew in front of every decoder layer, by attention from text and among visual tokens; the others sleep"
    )
    requires = frozenset({Input.SCORES, Input.VISUAL_SELF_ATTENTION})
    default_options = TokenOptions(reentry="layer")

    keep: Keep | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep("keep", self.keep)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        return replace(plan_fixed_count(self, self.keep, tokens, depth, budget), dominant=tokens)

    def prune_tokens(self, view: DecoderView) -> Tensor:
        return top(view.require(Input.SCORES) * view.require(Input.VISUAL_SELF_ATTENTION), view.valid, view.num_keep)
