"""The scores behind each decision, recorded beside the method's choice."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from duet_vlm import DecoderReducer, DecoderView, EncoderReducer, EncoderView, Reducer, SpanTrace
from duet_vlm.reducers.inputs import Input


class ScoreRecorder:
    """A method that acts as before and records the scores in its views.

    Attributes
    ----------
    reducer : Reducer
        To be attached in place of the method.
    """

    def __init__(self, method: Reducer) -> None:
        self._entry: list[np.ndarray] = []
        self._drops: list[tuple[DecoderView, np.ndarray]] = []
        cls, watcher = type(method), self
        facts: dict[str, Any] = {}
        if isinstance(method, EncoderReducer):

            def select_tokens(self: Any, view: EncoderView) -> Any:
                watcher._see_entry(view)
                return cls.select_tokens(self, view)  # type: ignore[attr-defined]

            facts["select_tokens"] = select_tokens
        if isinstance(method, DecoderReducer):

            def prune_tokens(self: Any, view: DecoderView) -> Any:
                watcher._see_drop(view)
                return cls.prune_tokens(self, view)  # type: ignore[attr-defined]

            facts |= {"prune_tokens": prune_tokens, "requires": method.requires | {Input.TOKENS}}
        self.reducer: Reducer = copy.copy(method)
        object.__setattr__(self.reducer, "__class__", type(cls.__name__, (cls,), facts))

    def of(self, trace: SpanTrace, number: int) -> list[dict[int, float] | None]:
        """For each stage of ``trace``, span ``number`` of the only sample of the last prompt: the score of every token
        that was ranked there, by its number within the span; None where nothing was ranked, or not token by token
        (crops or frames reduced independently)."""
        scores: list[dict[int, float] | None] = [
            self._at_entry(trace, number) if trace.stages and trace.stages[0].dropped or trace.merged else None
        ]
        drops = iter(self._drops)
        for _ in trace.stages[1:]:
            scores.append(_of_span(*drop, number) if (drop := next(drops, None)) is not None else None)
        return scores

    def _at_entry(self, trace: SpanTrace, number: int) -> dict[int, float] | None:
        if number >= len(self._entry):
            return None
        scores = self._entry[number]
        front = len(scores) - trace.span.tokens  # a CLS row
        return {token: float(scores[token + front]) for token in range(trace.span.tokens)} if front in (0, 1) else None

    def _see_entry(self, view: EncoderView) -> None:
        if view.importance is not None and not view.importance.is_meta:  # costs are counted on tensors without numbers
            lengths = view.valid.cumsum(1).argmax(1) + 1
            self._entry += [
                row[: int(n)].float().cpu().numpy() for row, n in zip(view.importance, lengths, strict=True)
            ]

    def _see_drop(self, view: DecoderView) -> None:
        if view.scores is not None and not view.scores.is_meta:
            scores = view.scores.amax(-1) if view.scores.ndim == 3 else view.scores
            self._drops.append((view, scores.float().cpu().numpy()))


def _of_span(view: DecoderView, scores: np.ndarray, number: int) -> dict[int, float]:
    """Scores of one span of the first sample."""
    valid, span, token = (x.cpu().numpy() for x in (view.valid, *view.require(Input.TOKENS)))
    return {
        int(token[index]): float(scores[index])
        for index in zip(*np.nonzero(valid), strict=True)
        if span[index] == number
    }
