"""The contract of a method that drops, or merges, visual tokens between decoder layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.decoder_view import DecoderView as DecoderView
from duet_vlm.reducers.inputs import DECODER_INPUTS, Input


@dataclass(frozen=True)
class DecoderReducer(Reducer):
    """A method that drops, or merges, visual tokens between decoder layers.

    Attributes
    ----------
    score_layer_offset : int
        Layers between the one whose attention scores and the drop.
    score_states : bool
        Layers that have a state in place of attention rank by what text would read out of it
        (``Adapter.linear_attention_scores``); else the last attention before them does.
    merges : bool
        It merges tokens.
    """

    available = DECODER_INPUTS
    score_states: ClassVar[bool] = False
    option_names = frozenset({
        "text_query", "training_turns", "skip_unanswered", "multi_image", "trim_kv_cache", "reentry",
    })  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reenters:
            return
        reasons = {
            "it merges tokens inside the decoder, and a merged one cannot come back": self.merges,
            "it compares states of two layers, and those of a sleeping token are the same":
                Input.PREVIOUS_HIDDEN_STATES in self.requires,
            "options.trim_kv_cache=True forgets tokens that the last layer leaves out, which earlier layers may not "
            "have read: give False": self.options.trim_kv_cache,
        }  # fmt: skip
        if refused := [reason for reason, holds in reasons.items() if holds]:
            raise ValueError(f"{self.name}: options.reentry={self.options.reentry!r} cannot be, since {refused[0]}")

    def repeated_stages(self, depth: int, first: int) -> frozenset[int]:
        """With re-entry the layers behind ``first`` that choose anew: all of them, or those of the method's schedule."""
        if self.options.reentry == "layer":
            return frozenset(range(first + 1, depth))
        named = getattr(self, "schedule", None) if self.reenters else None
        return frozenset(layer for layer, _ in named or () if layer > first)

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


def decisions(reducer: DecoderReducer, visual: Sequence[int]) -> list[tuple[int, int, int]]:
    """The decisions of ``reducer`` that choose: the layer behind each, the number of tokens that it chooses among, and
    the number that it keeps.

    ``visual``: visual tokens that enter, and at the input of each layer.
    """
    stages = [(layer, *pair) for layer, pair in enumerate(zip(visual, visual[1:], strict=False))]
    if not reducer.reenters:
        return [(layer, before, kept) for layer, before, kept in stages if 0 < kept < before]
    entry, depth = visual[0], len(stages)
    first = next((layer for layer, _, kept in stages if kept != entry), depth)
    repeated = reducer.repeated_stages(depth, first)
    return [
        (layer, entry, kept)
        for layer, before, kept in stages
        if 0 < kept < entry and (kept != before or layer in repeated)
    ]
