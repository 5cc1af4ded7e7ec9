"""Looking without dropping: what ``calibrate`` attaches in place of a method, to learn about a model what the method
wants to know."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from duet_vlm.planning.budget import Budget, SpanPlan
from duet_vlm.planning.solve import plan_keep_all
from duet_vlm.reducers.decoder import DecoderReducer, DecoderView
from duet_vlm.reducers.options import TokenOptions


class Observations:
    """Observations so far, in order."""

    def __init__(self) -> None:
        self.entries: list[Any] = []


@dataclass(frozen=True)
class Observer(DecoderReducer):
    """Keeps every token; says with ``asked`` in front of which layers it looks, with ``note`` what it writes down of a
    view, whose rows are spans."""

    name = "calibrate"
    paper = summary = ""

    default_options = TokenOptions(multi_image="per_image", protect_predicting_tokens=False)
    observations: Observations = field(default_factory=Observations)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        return plan_keep_all(tokens, depth)

    def prune_tokens(self, view: DecoderView) -> Tensor:
        self.observations.entries.append(self.observe(view))
        return view.valid

    @abstractmethod
    def observe(self, view: DecoderView) -> Any:
        """The observation of one view."""

    @abstractmethod
    def result(self, depth: int) -> dict[str, Any]:
        """The calibration to store, from all observations of a decoder of ``depth`` layers: plain values, or tensors by
        name."""
