"""TokenCarve: one early drop inside the decoder by attention and information; the best of the dropped tokens are
merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from duet_vlm.ops.information import information
from duet_vlm.ops.merge import unit_rows
from duet_vlm.ops.ragged import pack_right
from duet_vlm.ops.select import ranking, ranks
from duet_vlm.planning.budget import Schedule
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.decoder import DecoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.scheduled import ScheduledReducer


@register("tokencarve")
@dataclass(frozen=True)
class TokenCarve(ScheduledReducer):
    """TokenCarve (arXiv 2503.10501): rank by attention and information, prune to 3n/2 tokens, merge to n.

    Two rankings, one by the attention from the last token and one by a token's contribution to the spectrum of all
    tokens (``ops.information``), are added rank by rank. Of the best 3n/2 tokens the better half is kept; of the other
    half, the n/2 tokens that resemble a token of the better half most (cosine) are averaged into it. n tokens remain,
    and earlier layers drop the others from their cache (``trim_kv_cache=True``).

    Parameters beyond ``ScheduledReducer`` (one stage, before layer 2 of any depth, keeps 2/9)
    ----------
    attention_weight : float
        Weight of the ranking by attention, in [0, 1]; the other ranking has the rest. 0 and 1 are the released modes 1
        and 2.

    Cost: one key projection and one query row, a Gram matrix of N x N (or D x D) with its eigenvectors, cosines of the
    3n/2 tokens. Needs: text after the image. Usable in training (the choice carries no gradient, merged tokens do).

    Differences from the authors' code (ShawnTan86/TokenCarve): Gram matrix instead of a decomposition of the rows
    (which fails for more tokens than channels), ties to the lower index, any image position, batch and prompt length.
    ``official`` has the released counts; the rule is the same.
    """

    paper = "TokenCarve, arXiv 2503.10501"
    summary = "one early drop inside the decoder by attention and information; half of what leaves last is merged"
    paper_schedule: ClassVar[Schedule] = ((2, 2 / 9),)
    min_layer: ClassVar[int] = 2
    score_layer_offset = 1
    requires = frozenset({Input.SCORES, Input.HIDDEN_STATES})
    merges = True

    default_options = TokenOptions(text_query="last", trim_kv_cache=True)
    attention_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.attention_weight <= 1:
            raise ValueError(f"attention_weight={self.attention_weight}: a weight in [0, 1]")

    @classmethod
    def official(cls, keep: int = 128, attention_weight: float = 0.5, **fields: Any) -> TokenCarve:
        """Return the released counts: ``keep`` tokens from layer 2 on."""
        options = TokenOptions(protect_predicting_tokens=False)
        return cls.from_preset(options, fields, schedule=((2, keep),), attention_weight=attention_weight)

    def prune_tokens(self, view: DecoderView) -> Selection:
        hidden_states = view.require(Input.HIDDEN_STATES)
        valid, alive = view.valid, view.valid.sum(1)
        by_attention, by_information = (
            ranks(ranking(x, valid)) for x in (view.require(Input.SCORES), information(hidden_states, valid))
        )
        fused = -(self.attention_weight * by_attention + (1 - self.attention_weight) * by_information)
        rank = ranks(ranking(fused, valid))
        pruned = torch.minimum(view.num_keep * 3 // 2, alive)[:, None]
        better, worse = rank < pruned // 2, (rank >= pruned // 2) & (rank < pruned)
        unit = unit_rows(hidden_states)
        likeness, partner = (unit @ unit.transpose(1, 2)).masked_fill(~better[:, None], -torch.inf).max(2)
        merged = worse & (ranks(ranking(likeness, worse)) < pruned - view.num_keep[:, None])
        index, real = pack_right((better | worse) & ~merged, max(stay for _, stay in view.host_counts))
        number = torch.zeros_like(rank).scatter(
            1, index, torch.arange(index.shape[1], device=index.device).expand_as(index)
        )
        tokens = torch.arange(rank.shape[1], device=rank.device).expand_as(rank)
        return Selection(index, real, tokens, torch.where(merged, number.gather(1, partner), -1))
