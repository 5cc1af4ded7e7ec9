"""SIEVE: keep visual tokens that text attends to and does not express yet, unlike each other, inside the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from duet_vlm.ops.greedy import cosine, greedy_discounted
from duet_vlm.ops.information import residual
from duet_vlm.planning.budget import Schedule
from duet_vlm.reducers.decoder import DecoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.scheduled import ScheduledReducer
from duet_vlm.reducers.scoring import ScoringRules

LEAST = 1e-6  # ridge beyond the last eigenvalue that is counted


@register("sieve")
@dataclass(frozen=True)
class Sieve(ScheduledReducer):
    """SIEVE ("When Vision Becomes Text", 2026): attention times the part of a token that text does not express.

    At each stage a token's score is its attention from the text, summed over the ``heads`` with the most attention to
    visual tokens, times the share of its hidden state that combinations of the text's hidden states cannot express;
    both squared. Tokens are chosen one after the other by score, and each choice multiplies every other token's score
    by 1 - the squared cosine of the two tokens' residuals (the part that text cannot express).

    Parameters beyond ``ScheduledReducer``
    ----------
    heads : int
        Number of attention heads that are summed, at least 1.
    energy : float
        Share of the text's spectrum whose directions are trusted, in (0, 1]; weaker directions are damped.

    Cost: one key projection and the text's query rows per stage, a product of each visual token with each text token
    and with each visual token, and one pass over that table per kept token. Needs: text after the image. Usable in
    training (the choice carries no gradient).

    From the paper: no code is public. Chosen here, as the paper leaves it open or was not available in full: the stages
    (before layers 1, 10 and 15 of 32, with the shares of PIO-FVLM), attention of the layer after the drop, no stage
    before the decoder, eigenvalues as the spectrum, kept positions.
    """

    paper = "SIEVE: When Vision Becomes Text, 2026"
    summary = (
        "drop in stages inside the decoder: keep what is attended to and not expressed by text yet, unlike each other"
    )
    paper_schedule: ClassVar[Schedule] = ((1, 218 / 576), (10, 128 / 576), (15, 54 / 576))
    requires = frozenset({Input.SCORES, Input.HIDDEN_STATES, Input.TEXT_HIDDEN_STATES})

    heads: int = 12
    energy: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1:
            raise ValueError(f"heads={self.heads}: a number of heads, at least 1")
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy={self.energy}: a share in (0, 1]")

    def scoring_rules(self) -> ScoringRules:
        return ScoringRules(score_heads="each")

    def prune_tokens(self, view: DecoderView) -> Tensor:
        text_hidden_states, text_valid = view.require(Input.TEXT_HIDDEN_STATES)
        said, valid = text_valid[..., None], view.valid
        middle = (text_hidden_states.float() * said).sum(1, keepdim=True) / said.sum(1, keepdim=True).clamp(min=1)
        text, rows = (text_hidden_states.float() - middle) * said, view.require(Input.HIDDEN_STATES).float() - middle
        rest = residual(rows, text, self._ridge(text))
        unsaid = rest.norm(dim=-1) / rows.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        by_head = view.require(Input.SCORES) * valid[..., None]
        best = by_head.sum(1).topk(min(self.heads, by_head.shape[2])).indices
        attention = by_head.gather(2, best[:, None].expand(-1, by_head.shape[1], -1)).sum(-1)
        most = max(stay for _, stay in view.host_counts)
        return greedy_discounted(
            cosine(rest, valid).square(), (attention * unsaid).square(), valid, view.num_keep, most
        )

    def _ridge(self, text: Tensor) -> Tensor:
        """Eigenvalue [B, 1, 1] at which the trusted share of the spectrum of text [B, Q, D] is reached."""
        values = torch.linalg.eigvalsh(text @ text.transpose(1, 2)).clamp(min=0).flip(1)
        before = values.cumsum(1) - values
        reached = before < self.energy * values.sum(1, keepdim=True) * (1 - LEAST)
        last = (reached.sum(1, keepdim=True) - 1).clamp(min=0)
        return values.gather(1, last)[..., None] + LEAST
