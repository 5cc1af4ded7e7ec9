"""The contract of a method that reduces before the decoder."""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from dataclasses import dataclass, replace

from duet_vlm.planning.budget import EPSILON, Budget, BudgetError, SpanPlan, largest_fraction, target_mean
from duet_vlm.planning.solve import plan_keep_all
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.encoder_view import EncoderView as EncoderView
from duet_vlm.reducers.encoder_view import Layer
from duet_vlm.reducers.inputs import ENCODER_INPUTS, Input
from duet_vlm.reducers.options import QUERIES, TokenOptions


@dataclass(frozen=True)
class EncoderReducer(Reducer):
    """A method that reduces before the decoder.

    One that requires neither ``Input.FEATURES`` nor ``Input.PROJECTED_FEATURES`` chooses as soon as its signals are
    recorded, and keeps no more in memory than its choice.
    """

    available = ENCODER_INPUTS

    option_names = frozenset({"cls_token", "signal_layer", "signal_queries", "crops", "newline_tokens"})
    default_options = TokenOptions(signal_queries=QUERIES, crops="auto")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.options.cls_token and self.options.positions != "compact":
            raise ValueError(
                f"cls_token=True needs positions='compact' (the CLS row has no position of its own), got {self.options.positions!r}"
            )
        if self.options.cls_token and Input.PROJECTED_FEATURES in self.requires:
            raise ValueError(
                f"cls_token=True cannot work with {self.name}: it reads projected rows, and the CLS row is not projected"
            )
        if self.options.cls_token and getattr(self, "dominant", None) == 0:
            raise ValueError(
                "cls_token=True with dominant=0: the CLS row counts as a dominant token, give dominant >= 1"
            )

    def plan_entry(self, tokens: int, budget: Budget, depth: int = 32) -> SpanPlan:
        """The plan of a span of which ``budget`` tokens (or that fraction of them, at least one) enter the decoder and
        stay: what the method's first stage does where nothing is dropped inside the decoder.

        Parameters
        ----------
        tokens : int
            Of the span.
        depth : int
            Of the decoder in which the method divides its rows into dominant and contextual ones.

        Raises
        ------
        ValueError
            As ``plan``; a ``BudgetError`` where the method cannot do with so few.
        """
        wanted = max(1, math.floor(target_mean(budget, tokens) + EPSILON))
        if wanted >= tokens:
            return plan_keep_all(tokens, depth)

        def fits(share: float) -> bool:
            try:
                return self.plan(tokens, depth, share).entry <= wanted
            except BudgetError as error:
                if error.floor is None:
                    raise
                return True  # less than the method's floor

        share = largest_fraction(fits)
        plan = self.plan(tokens, depth, share or sys.float_info.min)  # raises where not even the smallest share fits
        return replace(plan, counts=(plan.entry,) * depth)

    @property
    def clip_model(self) -> str | None:
        """Folder or hub id of the CLIP model whose text tower reads the question, where the settings name one."""
        return None

    @property
    def signal_layers(self) -> tuple[Layer, ...]:
        """The vision layers that are read: numbers, shares of the tower's depth (0.25: the last layer of its first
        quarter), or None for the family's own."""
        return (self.options.signal_layer,)

    @abstractmethod
    def select_tokens(self, view: EncoderView) -> Selection:
        """Select the rows that enter the decoder, and the tokens that are merged into each."""
