"""The contract of a method that reduces before the decoder."""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from dataclasses import dataclass, replace

from duet_vlm.planning.budget import EPSILON, Budget, BudgetError, SpanPlan, largest_fraction, target_mean
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.base import Reducer, check_choice
from duet_vlm.reducers.encoder_view import EncoderView as EncoderView
from duet_vlm.reducers.encoder_view import Layer
from duet_vlm.reducers.inputs import ENCODER_INPUTS, Input
from duet_vlm.reducers.plans import plan_keep_all

CROPS = ("auto", "joint", "per_crop")
NEWLINES = ("drop", "keep")
QUERIES = 256  # rows of a picture that rank its tokens where the tower has no CLS row


@dataclass(frozen=True)
class EncoderReducer(Reducer):
    """A method that reduces before the decoder.

    One that requires neither ``Input.FEATURES`` nor ``Input.PROJECTED_FEATURES`` chooses as soon as its signals are
    recorded, and keeps no more in memory than its choice.

    Attributes
    ----------
    cls_token : bool
        Feed the tower's CLS row as a visual token (released code of DUET-VLM and VisionZip). It counts among the
        dominant tokens; needs ``positions="compact"`` and a tower with a CLS row.
    signal_layer : int or None
        Vision layer whose attention is read; None: the model family's choice.
    signal_queries : int or None
        In a tower without a CLS row: number of rows of each picture, spread over its grid, whose attention ranks the
        tokens. None: all of them (released code). The cost is this number times the number of tokens.
    crops : str
        "joint": all crops of an image or frames of a clip are reduced together; "per_crop": each by itself, within one
        budget, with the method's own counts per crop; "auto": what the model family's documentation states.
    newline_tokens : str
        "drop": newline rows of packed crops leave first when their image is reduced; "keep": all of them enter, within
        the budget.
    """

    available = ENCODER_INPUTS

    cls_token: bool = False
    signal_layer: int | None = None
    signal_queries: int | None = QUERIES
    crops: str = "auto"
    newline_tokens: str = "drop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.signal_queries is not None and self.signal_queries < 1:
            raise ValueError(f"signal_queries={self.signal_queries}: a number of rows, at least 1, or None for all")
        check_choice("crops", self.crops, CROPS)
        check_choice("newline_tokens", self.newline_tokens, NEWLINES)
        if self.cls_token and self.positions != "compact":
            raise ValueError(
                f"cls_token=True needs positions='compact' (the CLS row has no position of its own), got {self.positions!r}"
            )
        if self.cls_token and Input.PROJECTED_FEATURES in self.requires:
            raise ValueError(
                f"cls_token=True cannot work with {self.name}: it reads projected rows, and the CLS row is not projected"
            )
        if self.cls_token and getattr(self, "dominant", None) == 0:
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
    def signal_layers(self) -> tuple[Layer, ...]:
        """The vision layers that are read: numbers, shares of the tower's depth (0.25: the last layer of its first
        quarter), or None for the family's own."""
        return (self.signal_layer,)

    @abstractmethod
    def select_tokens(self, view: EncoderView) -> Selection:
        """Select the rows that enter the decoder, and the tokens that are merged into each."""
