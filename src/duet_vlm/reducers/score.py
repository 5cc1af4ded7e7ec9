"""Methods that score tokens and keep some of them before the decoder: the plan and the selection are made for them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from duet_vlm.ops.ragged import pack_right
from duet_vlm.ops.select import top
from duet_vlm.planning.budget import Budget, Keep, SpanPlan, check_keep
from duet_vlm.planning.solve import plan_fixed_count
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView


@dataclass(frozen=True)
class ScoreReducer(EncoderReducer):
    """A method that keeps a planned number of tokens by their scores; a subclass writes ``score``, and ``choose`` where
    the highest are not it.

    Attributes
    ----------
    keep : int or float, optional
        Tokens per span or the fraction of them. A budget of n keeps n.
    """

    rounding = "floor"  # of a fraction; a method with several rules has it as a setting

    keep: Keep | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep("keep", self.keep)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        """The same number of tokens in every layer: ``keep``, or what the budget allows."""
        return plan_fixed_count(self, self.keep, tokens, depth, budget, self.rounding)

    def select_tokens(self, view: EncoderView) -> Selection:
        """Keep the tokens that ``choose`` picks by ``score``; nothing is merged."""
        chosen = self.choose(self.score(view), view)
        return Selection.keep_only(*pack_right(chosen, max(plan.dominant for plan in view.plans)))

    @abstractmethod
    def score(self, view: EncoderView) -> Tensor:
        """[B, N], larger is better; what padding has does not matter."""

    def choose(self, scores: Tensor, view: EncoderView) -> Tensor:
        """Mask [B, N] of exactly ``view.dominant`` tokens of each span: those with the highest scores, ties to the
        lower index."""
        return top(scores, view.valid, view.dominant)
