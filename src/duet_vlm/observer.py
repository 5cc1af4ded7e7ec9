"""Looking without dropping: what ``calibrate`` attaches in place of a method, to learn about a model what the method wants to know."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from duet_vlm.budget import Budget, SpanPlan
from duet_vlm.reducer import DecoderReducer, TextView, whole


class Notes:
    """What was seen so far, in order."""

    def __init__(self) -> None:
        self.lines: list[Any] = []


@dataclass(frozen=True)
class Observer(DecoderReducer):
    """Keeps every token; says with ``asked`` in front of which layers it looks, with ``note`` what it writes down of a view, whose rows are spans."""

    name = "calibrate"
    paper = summary = ""

    share: str = "each"
    keep_predicting: bool = False
    seen: Notes = field(default_factory=Notes)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        return whole(tokens, depth)

    def t2v(self, view: TextView) -> Tensor:
        self.seen.lines.append(self.note(view))
        return view.valid

    @abstractmethod
    def note(self, view: TextView) -> Any:
        """What to remember of one view."""

    @abstractmethod
    def result(self, depth: int) -> dict[str, Any]:
        """What to store, of all notes of a decoder of ``depth`` layers: plain values, or tensors by name."""
