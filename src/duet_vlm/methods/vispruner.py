"""VisPruner: keep the most attended vision tokens, and of the others those that no other resembles, before the decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duet_vlm.budget import Budget, Keep, SpanPlan, check_keep
from duet_vlm.ops.greedy import cosine
from duet_vlm.ops.ragged import pack_right, take
from duet_vlm.ops.select import ranking, top
from duet_vlm.reducer import EncoderReducer, VisionView, constant
from duet_vlm.registry import register
from duet_vlm.tokens import Selection

ROUND = 8  # tokens that leave together


@register("vispruner")
@dataclass(frozen=True)
class VisPruner(EncoderReducer):
    """VisPruner (ICCV 2025, arXiv 2412.01818 v2): important tokens by CLS attention, then diverse ones by removing duplicates.

    A share of the budget goes to the tokens with the largest attention. The others stand in a list by falling attention. Every other one of
    them (places 0, 2, 4, ...) is compared with those between (cosine of vision features), and the ``ROUND`` that resemble one of these most
    leave; the rest, most similar first, then those between, make the next list, until as many are left as are wanted. Nothing is merged.

    Parameters
    ----------
    keep : int or float, optional
        Tokens per span or the fraction of them. A budget of n keeps n.
    important : float
        Share of them that attention chooses, in [0, 1].

    Cost: one row of attention (CLS) or blocked column sums of one vision layer, an N x N table of cosines, and per ``ROUND`` dropped tokens one
    look at a quarter of what is left of it; 8 N^2 bytes. Needs: vision attention. Usable in training (the choice carries no gradient).

    Differences from the authors' code (Theia-4869/VisPruner): lists of odd length and last rounds with few tokens work (the released code stops
    with an error), kept positions (``official``: compact), any batch, ties by index. Their SigLIP tower ranks by the last layer
    (``signal_layer=-1``); towers without a CLS row take the attention that a token receives.
    """

    paper = "VisPruner, ICCV 2025, arXiv 2412.01818"
    summary = "keep the most attended vision tokens and, of the others, those that no other resembles, before the decoder"
    signals = frozenset({"importance"})

    keep: Keep | None = None
    important: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep("keep", self.keep)
        if not 0 <= self.important <= 1:
            raise ValueError(f"important={self.important}: a share of the tokens that are kept, in [0, 1]")

    @classmethod
    def official(cls, keep: Keep = 128, important: float = 0.5, **fields: Any) -> VisPruner:
        """The released LLaVA code: compact positions; ``keep`` patches of each crop."""
        released: dict[str, Any] = {"positions": "compact", "parts": "each", "keep_predicting": False, "signal_queries": None}
        return cls(**{"keep": keep, "important": important} | released | fields)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        return constant(self, self.keep, tokens, depth, budget)

    def v2v(self, view: VisionView) -> Selection:
        assert view.importance is not None and view.features is not None  # promised by ``signals``
        counts = [int(plan.dominant * self.important) for plan in view.plans]
        important = torch.tensor(counts, device=view.valid.device)
        chosen = top(view.importance, view.valid, important)
        rest, wanted = view.valid & ~chosen, view.dominant - important
        sizes = [(plan.tokens - n, plan.dominant - n) for plan, n in zip(view.plans, counts, strict=True)]
        rounds = max(_rounds(length, left) for length, left in sizes)
        order, length = ranking(view.importance, rest), rest.sum(1)
        similarity = cosine(view.features, view.valid)
        for _ in range(rounds):
            order, length = _fewer(similarity, order, length, wanted)
        place = torch.arange(order.shape[1], device=order.device)
        diverse = torch.zeros_like(chosen).scatter(1, order, place < torch.minimum(length, wanted)[:, None])
        return Selection.pick(*pack_right(chosen | diverse, max(plan.dominant for plan in view.plans)))


def _rounds(length: int, wanted: int) -> int:
    """How often a list of ``length`` gets shorter until ``wanted`` are left; none where nobody is wanted."""
    count = 0
    while length > wanted > 0:
        length -= min(ROUND, length - wanted, (length + 1) // 2)
        count += 1
    return count


def _fewer(similarity: Tensor, order: Tensor, length: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """One round: lists ``order`` [B, R], the first ``length`` [B] of each alive, and what becomes of them; lists that are short enough stay."""
    place = torch.arange(order.shape[1], device=order.device)
    alive = place < length[:, None]
    asked, between = order[:, 0::2], order[:, 1::2]
    alike = take(similarity, asked).gather(2, between[:, None].expand(-1, asked.shape[1], -1))
    best = alike.masked_fill(~alive[:, None, 1::2], -math.inf).amax(2) if between.shape[1] else similarity.new_zeros(asked.shape)
    leave = torch.minimum(length - wanted, (length + 1) // 2).clamp(0, ROUND)
    sorted_by = ranking(best.clamp(min=-2.0), alive[:, 0::2])  # nobody between: less alike than any cosine, but in the list
    stays = alive[:, 0::2] & (torch.arange(asked.shape[1], device=order.device) >= leave[:, None])
    candidates = torch.cat([asked.gather(1, sorted_by), between], 1)
    index, _ = pack_right(torch.cat([stays, alive[:, 1::2]], 1), order.shape[1])
    shorter = (leave > 0)[:, None]
    return torch.where(shorter, candidates.gather(1, index), order), length - leave
