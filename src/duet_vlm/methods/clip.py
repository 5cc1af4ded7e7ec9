"""What the methods for clips share: a count per span, rows by step of time and place, spans that stay whole."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from duet_vlm.budget import Budget, Keep, SpanPlan, check_keep
from duet_vlm.ops.clips import Clips, joined
from duet_vlm.reducer import EncoderReducer, VisionView, constant
from duet_vlm.tokens import Selection


class Rows(NamedTuple):
    """What becomes of clips: which rows are ``kept`` [B, N]; to which of them (``owner``, -1: none) every row is added and with which ``weight``,
    [B, M N]; numbers by which rows follow each other, ``order`` [B, N], None as they stand in the clip."""

    kept: Tensor
    owner: Tensor
    weight: Tensor
    order: Tensor | None = None

    @classmethod
    def alone(cls, kept: Tensor) -> Rows:
        """Kept rows [B, N] as they are, and nothing else."""
        nothing = kept.new_zeros(len(kept), 0, dtype=torch.long)
        return cls(kept, nothing, nothing.float())


@dataclass(frozen=True)
class ClipReducer(EncoderReducer):
    """Base of the methods that look at all frames of a clip. An image is a clip of one step.

    Parameters
    ----------
    keep : int or float, optional
        Tokens per span or the fraction of them. A budget of n keeps n.
    """

    reads_time = True
    reads_projected = True

    keep: Keep | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep("keep", self.keep)
        if self.parts == "each":
            raise ValueError(f"{self.name} compares the frames of a clip, and parts='each' would separate them: use parts='joint'")

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        return constant(self, self.keep, tokens, depth, budget)

    def v2v(self, view: VisionView) -> Selection:
        assert view.features is not None  # always there
        steps = view.parts if view.stream == "video" and view.parts is not None else torch.where(view.valid, 0, -1)
        clips = Clips.of(steps, view.valid, view.most if view.stream == "video" else (1, view.valid.shape[1]))
        count = view.dominant + view.contextual
        whole = (count >= view.valid.sum(1))[:, None]
        found = self.reduced(view, clips, torch.where(whole[:, 0], clips.placed.sum(1), count))
        kept = torch.where(whole, view.valid, found.kept)
        return joined(kept, found.owner.masked_fill(whole, -1), found.weight, max(plan.entry for plan in view.plans), found.order)

    @abstractmethod
    def reduced(self, view: VisionView, clips: Clips, count: Tensor) -> Rows:
        """Exactly ``count`` [B] rows of every clip."""

