"""A reference that no method can know: keep the tokens that the answer needs, fill up by importance. No upper bound:
methods may exceed it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import duet_vlm
from duet_vlm import EncoderReducer, EncoderView, Selection, SpanPlan


@dataclass(frozen=True, eq=False)
class Oracle(EncoderReducer):
    """A constant count from the decoder's entry on, needed tokens first, then those with the most attention in the
    vision encoder.

    ``needed`` holds one bool array per image or video of the batch, in order, so that a video is never taken apart; as
    arrays do not hash, two of these are never equal. No method: a reference for tables.
    """

    name: ClassVar[str] = "oracle"
    paper = "reference"
    summary = "the tokens that the answer needs (reference)"
    signals = frozenset({"importance"})
    reads_features = False

    crops: str = "joint"
    needed: Sequence[np.ndarray] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crops != "joint":
            raise ValueError(f"the oracle knows the needed tokens of whole images and videos: use crops='joint', not {self.crops!r}")

    def plan(self, tokens: int, depth: int, budget: Any) -> SpanPlan:
        counts = duet_vlm.get_method("uniform")().plan(tokens, depth, budget).counts  # as the baselines: one count for all layers
        return SpanPlan(tokens, counts[0], 0, counts)

    def select_tokens(self, view: EncoderView) -> Selection:
        assert view.importance is not None  # promised by ``signals``
        batch, width = view.valid.shape
        needed = torch.zeros(batch, width, device="cpu")
        for row, mask in enumerate(self.needed):
            needed[row, : len(mask)] = torch.from_numpy(np.asarray(mask, np.float32))
        share = view.importance / view.importance.sum(1, keepdim=True)  # below 1, so a needed token beats any other
        score: Tensor = (needed.to(share.device) + share).masked_fill(~view.valid, -1)
        order = score.argsort(dim=1, descending=True, stable=True)[:, : max(plan.dominant for plan in view.plans)]
        rank = torch.arange(order.shape[1], device=order.device)
        valid = rank < view.dominant[:, None]
        index = order.masked_fill(~valid, width).sort(1).values.clamp(max=width - 1)
        return Selection.keep_only(index, valid)
