"""The contract of a method that drops, or merges, visual tokens between decoder layers."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.decoder_view import DecoderView as DecoderView
from duet_vlm.reducers.inputs import DECODER_INPUTS


@dataclass(frozen=True)
class DecoderReducer(Reducer):
    """A method that drops, or merges, visual tokens between decoder layers.

    ``Input.SCORES`` are taken ``score_layer_offset`` layers before the drop: ``score_heads`` "mean" over heads, their
    "max", the "most" of any head and query, or "each". ``score_states``: layers that have a state in place of attention
    rank by what text would read out of it (``Adapter.linear_attention_scores``); else the last attention before them
    does. ``merges``: it merges tokens.
    """

    available = DECODER_INPUTS
    score_heads: ClassVar[str] = "mean"
    score_states: ClassVar[bool] = False
    option_names = frozenset({"text_query", "training_turns", "skip_unanswered", "multi_image", "trim_kv_cache"})

    def with_paper_schedule(self, depth: int, share: float | None = None) -> DecoderReducer:
        """This method as a composition runs it in a decoder of ``depth`` layers: where its settings leave the drops to
        a budget, with those that its paper uses; ``share``: of a span's tokens, that the budget allows, where there is
        one."""
        return self

    @abstractmethod
    def prune_tokens(self, view: DecoderView) -> Tensor | Selection:
        """Mask [B, V] of the tokens that stay; exactly ``view.num_keep`` of each row's ``view.valid``. Or, where others
        are merged into these, a ``Selection`` of as many rows: they stand where the tokens stood that ``index`` names;
        with renumbered positions, in that order."""
