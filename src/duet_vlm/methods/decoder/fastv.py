"""FastV: one drop after the first few decoder layers, by the attention of the last token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from duet_vlm.ops.select import top
from duet_vlm.planning.budget import (
    Budget,
    Keep,
    SpanPlan,
    check_keep,
    infeasible_budget,
    largest_int,
    layer_counts,
    mean_within,
    target_mean,
)
from duet_vlm.planning.solve import plan_keep_all
from duet_vlm.reducers.base import ROUNDINGS
from duet_vlm.reducers.decoder import DecoderReducer, DecoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.utils.field_types import check_choice


@register("fastv")
@dataclass(frozen=True)
class FastV(DecoderReducer):
    """FastV (ECCV 2024, arXiv 2403.06764): one early drop inside the decoder.

    The first ``layers`` decoder layers process every visual token; from the next layer on only the ``keep`` tokens with
    the most attention from the last token are kept, ranked in the last of those layers.

    Parameters
    ----------
    layers : int
        K of the paper: layers that run at full width, at least 1.
    keep : int or float
        Tokens kept after layer K, 1 - R of the paper: a count, or a fraction. A budget solves for the largest K <= 2
        whose full-width layers fit, then for the count.
    rounding : str
        Rounding of a fraction to a count: "floor", "round" (released code for transformers) or "int" (released
        evaluation code).

    Cost: one key projection and one query row of one layer; K layers run at full width, which is the floor. Needs: text
    after the image.

    Differences from the authors' code (pkunlp-icler/FastV): the score is recomputed for one query row instead of taken
    from a layer's full attention map; every image and every sample of a batch; padding is never ranked.
    ``FastV.official`` restores the released counts.
    """

    paper = "FastV, ECCV 2024, arXiv 2403.06764"
    summary = "one early drop inside the decoder by the last token's attention"
    requires = frozenset({Input.SCORES})
    score_layer_offset = 1

    default_options = TokenOptions(text_query="last")
    layers: int = 2
    keep: Keep = 0.5
    rounding: str = "floor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise ValueError(f"layers={self.layers}: at least one layer must see every token, its attention ranks them")
        check_keep("keep", self.keep)
        check_choice("rounding", self.rounding, ROUNDINGS)

    @classmethod
    def official(cls, variant: str = "hf", **fields: Any) -> FastV:
        """Return released settings: "hf" keeps round(n * (1 - R)), "inplace" a given number, "lmms" int(n * 0.5) after
        3 layers.
        """
        check_choice("variant", variant, ("hf", "inplace", "lmms"))
        lmms = {"rounding": "int", "layers": 3, "keep": 0.5}
        presets: dict[str, dict[str, Any]] = {"hf": {"rounding": "round"}, "inplace": {}, "lmms": lmms}
        return cls.from_preset(TokenOptions(protect_predicting_tokens=False), fields, **presets[variant])

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        if budget is None:
            return SpanPlan(tokens, tokens, 0, layer_counts(tokens, depth, ((self.layers, self.keep),), self.rounding))
        if (self.layers, self.keep) != (FastV.layers, FastV.keep):
            raise ValueError("fastv: give either budget= or the method's own settings (layers=, keep=), not both")
        target = target_mean(budget, tokens)
        if target >= tokens:
            return plan_keep_all(tokens, depth)
        for layers in (2, 1):
            if layers < depth and tokens * layers <= target * depth + 1e-9:
                return self._solved(tokens, depth, layers, target)
        raise infeasible_budget(
            self.name, target, tokens / depth, tokens, f"its first layer of {depth} runs at full width"
        )

    def _solved(self, tokens: int, depth: int, layers: int, target: float) -> SpanPlan:
        keep = largest_int(tokens, lambda n: mean_within(layer_counts(tokens, depth, ((layers, n),)), target))
        return SpanPlan(tokens, tokens, 0, layer_counts(tokens, depth, ((layers, keep),)))

    def prune_tokens(self, view: DecoderView) -> Tensor:
        return top(view.require(Input.SCORES), view.valid, view.num_keep)
