"""DART: inside the decoder, keep the visual tokens that are least similar to a few pivot tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from duet_vlm.ops.merge import unit_rows
from duet_vlm.ops.ragged import gather_rows
from duet_vlm.ops.select import ranking
from duet_vlm.planning.budget import Schedule
from duet_vlm.reducers.decoder import DecoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.scheduled import ScheduledReducer
from duet_vlm.utils.field_types import check_choice

PIVOT_ORDERS = ("norm", "set")


@register("dart")
@dataclass(frozen=True)
class Dart(ScheduledReducer):
    """DART (EMNLP 2025, arXiv 2502.11494): duplication matters more than importance.

    Pivots are the visual and the text tokens with the largest keys (norm over all heads of the layer before the drop).
    The visual pivots are kept; then each pivot in turn takes its share of the remaining visual tokens: those least
    similar to it (cosine of normed hidden states). Visual pivots come first, text pivots after them, each by falling
    norm; shares differ by one at most, so that the count is met exactly.

    Parameters beyond ``ScheduledReducer`` (one stage, before layer 2 of 32, keeps 2/9)
    ----------
    visual_pivots, text_pivots : int
        Numbers of pivots, at least one visual.
    key_norm : int
        2, or 1 as in the paper. The L1 norm depends on the position of a token in the prompt, since keys are rotated.
    pivot_order : str
        "norm", or "set": the iteration order of a Python set of the pivots' positions, as in the released code. "set"
        copies the pivots to the host.

    Cost: one key projection, and a product of each pivot with every visual token; no attention. Needs: text after the
    image for text pivots (without it the visual ones take all). Usable in training (the choice carries no gradient).

    Differences from the authors' code (ZichenWen1/DART, of which an early version was recorded): exact counts
    (released: 4 + 8 x (m // 8)), pivots in a defined order and by a norm that is invariant under rotation, any image
    position and batch. ``Dart.official`` has the released counts and order.
    """

    paper = "DART, EMNLP 2025, arXiv 2502.11494"
    summary = "one early drop inside the decoder: keep what resembles a few pivot tokens least"
    paper_schedule: ClassVar[Schedule] = ((2, 2 / 9),)
    requires = frozenset({Input.HIDDEN_STATES, Input.TEXT_HIDDEN_STATES, Input.DECODER_KEYS, Input.POSITIONS})
    score_layer_offset = 1

    visual_pivots: int = 4
    text_pivots: int = 4
    key_norm: int = 2
    pivot_order: str = "norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.visual_pivots < 1 or self.text_pivots < 0:
            given = f"visual_pivots={self.visual_pivots}, text_pivots={self.text_pivots}"
            raise ValueError(f"{given}: at least one visual pivot, and no negative number of text pivots")
        if self.key_norm not in (1, 2):
            raise ValueError(f"key_norm={self.key_norm}: choose 1 or 2")
        check_choice("pivot_order", self.pivot_order, PIVOT_ORDERS)

    @classmethod
    def official(
        cls, layers: int = 2, maximum: int = 128, visual_pivots: int = 4, text_pivots: int = 4, **fields: Any
    ) -> Dart:
        """Return the settings of the released LLaVA code: after ``layers`` layers the visual pivots are kept, and
        ``maximum`` // (all pivots) tokens for each pivot.
        """
        pivots = visual_pivots + text_pivots
        kept = visual_pivots + pivots * (maximum // pivots)
        own: dict[str, Any] = {
            "schedule": ((layers, kept),),
            "visual_pivots": visual_pivots,
            "text_pivots": text_pivots,
        }
        options = TokenOptions(protect_predicting_tokens=False)
        return cls.from_preset(options, fields, **own, key_norm=1, pivot_order="set")

    def prune_tokens(self, view: DecoderView) -> Tensor:
        keys, text_keys = view.require(Input.DECODER_KEYS)
        words, text_valid = view.require(Input.TEXT_HIDDEN_STATES)
        visual = ranking(keys.float().norm(self.key_norm, dim=-1), view.valid)[:, : self.visual_pivots]
        text = ranking(text_keys.float().norm(self.key_norm, dim=-1), text_valid)[:, : self.text_pivots]
        is_pivot = torch.cat([view.valid.gather(1, visual), text_valid.gather(1, text)], 1)  # pivots that exist
        rows, words = unit_rows(view.final_norm(view.require(Input.HIDDEN_STATES))), unit_rows(view.final_norm(words))
        # [B, pivots, V]
        likeness = torch.cat([gather_rows(rows, visual), gather_rows(words, text)], 1) @ rows.transpose(1, 2)
        if self.pivot_order == "set" and not likeness.is_meta:
            positions, text_positions = view.require(Input.POSITIONS)
            order = _as_in_a_set(torch.cat([positions.gather(1, visual), text_positions.gather(1, text)], 1))
            likeness, is_pivot = gather_rows(likeness, order), is_pivot.gather(1, order)
        rank = torch.arange(visual.shape[1], device=visual.device)
        kept = torch.zeros_like(view.valid).scatter(
            1, visual, (rank < view.num_keep[:, None]) & view.valid.gather(1, visual)
        )
        left = view.num_keep - kept.sum(1)
        share, more = left // is_pivot.sum(1), left % is_pivot.sum(1)
        turn = is_pivot.cumsum(1)
        for pivot in range(is_pivot.shape[1]):
            count = torch.where(is_pivot[:, pivot], share + (turn[:, pivot] <= more), 0)
            order = ranking(-likeness[:, pivot], view.valid & ~kept)
            number = torch.arange(order.shape[1], device=order.device)
            kept = kept | torch.zeros_like(kept).scatter(1, order, number < count[:, None])
        return kept


def _as_in_a_set(places: Tensor) -> Tensor:
    """Order of each line of numbers in which Python iterates over their set: [B, P] -> [B, P]."""
    rows = places.tolist()
    return torch.tensor([[row.index(index) for index in set(row)] for row in rows], device=places.device)
