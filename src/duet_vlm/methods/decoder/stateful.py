"""Stateful token reduction: a few tokens are dropped before every layer, ranked by its attention or its recurrent
state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from duet_vlm.ops.select import top
from duet_vlm.planning.budget import (
    EPSILON,
    Budget,
    SpanPlan,
    infeasible_budget,
    largest_fraction,
    mean_within,
    target_mean,
)
from duet_vlm.planning.solve import check_budget_or_fields, plan_keep_all
from duet_vlm.reducers.decoder import DecoderReducer, DecoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.registry import register


@register("stateful")
@dataclass(frozen=True)
class Stateful(DecoderReducer):
    """Stateful token reduction for hybrid decoders (arXiv 2603.00198): progressive drops at every layer, one score for
    all.

    A token dropped at one layer was processed by all layers before it, and its contribution to a recurrent state
    remains there. The importance of tokens changes from layer to layer, so no layer drops many: layer l of L gets the
    share 1 - (1 - ``end``) (l / L)^``power`` of the tokens. Each layer ranks the tokens that reach it, by one score for
    both kinds of layer. In a layer with attention: the attention from text to a token, mean over heads and text. In a
    layer with a state: how much of the token's contribution text would read out, abs(q . k) times the token's gate,
    mean over heads and text, without the decay in between.

    Parameters
    ----------
    end : float
        Share that the schedule reaches after the last layer, in [0, 1].
    power : float, optional
        Exponent of the schedule, above 0: large values keep nearly all tokens until late layers. A budget of n solves
        for the power at which layers get n tokens in the mean.

    Cost: at each layer with attention one key projection (which the layer takes over) and the queries of text; at one
    with a state its projection of queries, keys and values once more. Needs: text after the image. Usable in training
    (the choice carries no gradient).

    From the paper's abstract and notes on it: no code is public, so there is no preset. Chosen here: the curve (the
    paper: small cuts early and larger ones late, at all layers); tokens keep no score from earlier layers; the absolute
    value; and for the gated delta rule of Qwen3.5 the gate with which a key is written in place of the step of a Mamba
    block: of o_t = S_t q_t with S_t = a_t S_(t-1) (I - b_t k_t k_t^T) + b_t v_t k_t^T this is the share of v_i in o_t
    if nothing decays or is overwritten. Decoders without such layers are ranked by attention alone.
    """

    paper = "Stateful token reduction for hybrid video VLMs, arXiv 2603.00198"
    summary = (
        "drop a little before every layer, more the deeper, by what text attends to or reads out of the layer's state"
    )
    requires = frozenset({Input.SCORES})
    score_states = True

    end: float = 0.0
    power: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.end <= 1:
            raise ValueError(f"end={self.end}: the share of tokens that the schedule comes to, in [0, 1]")
        if self.power is not None and not 0 < self.power < math.inf:
            raise ValueError(f"power={self.power}: of the schedule, above 0")

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        check_budget_or_fields(self, budget, self.power is not None, "power=")
        if budget is None:
            assert self.power is not None  # just checked
            return SpanPlan(tokens, tokens, 0, self.counts(tokens, depth, self.power))
        target = target_mean(budget, tokens)
        if target >= tokens:
            return plan_keep_all(tokens, depth)
        least = self.counts(tokens, depth, 0.0)
        if not mean_within(least, target):
            raise infeasible_budget(
                self.name, target, sum(least) / depth, tokens, f"its first of {depth} layers runs at full width"
            )
        power = largest_fraction(lambda x: x < 1 and mean_within(self.counts(tokens, depth, x / (1 - x)), target))
        return SpanPlan(tokens, tokens, 0, self.counts(tokens, depth, power / (1 - power)))

    def counts(self, tokens: int, depth: int, power: float) -> tuple[int, ...]:
        """Number of tokens in each layer."""
        shares = (1 - (1 - self.end) * (layer / depth) ** power if layer else 1.0 for layer in range(depth))
        return tuple(math.floor(tokens * share + EPSILON) for share in shares)

    def with_paper_schedule(self, depth: int, share: float | None = None) -> Stateful:
        return self if self.power is not None else replace(self, power=1.0)

    def prune_tokens(self, view: DecoderView) -> Tensor:
        return top(view.require(Input.SCORES), view.valid, view.num_keep)
