"""A reference that no method can know: keep the tokens that the answer needs, fill up by importance. No bound: methods
may pass it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import duet_vlm
from duet_vlm import EncoderReducer, EncoderView, Selection, SpanPlan
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions


@dataclass(frozen=True, eq=False)
class Oracle(EncoderReducer):
    """A constant count from the decoder's entry on, needed tokens first, then those that the vision encoder attends to
    most.

    ``needed`` holds one bool array per image or clip of the batch, in order, so that a clip is never taken apart; as
    arrays do not hash, two of these are never equal. No method: a reference for tables.
    """

    name: ClassVar[str] = "oracle"
    reference = True
    paper = "reference"
    summary = "the tokens that the answer needs (reference)"
    requires = frozenset({Input.IMPORTANCE})

    default_options = TokenOptions(crops="joint")
    needed: Sequence[np.ndarray] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.options.crops != "joint":
            raise ValueError(
                f"the oracle knows what a whole picture or clip needs: use crops='joint', not {self.options.crops!r}"
            )

    def plan(self, tokens: int, depth: int, budget: Any) -> SpanPlan:
        # the floors' rule: one count for all layers
        counts = duet_vlm.get_method("uniform")().plan(tokens, depth, budget).counts
        return SpanPlan(tokens, counts[0], 0, counts)

    def select_tokens(self, view: EncoderView) -> Selection:
        importance = view.require(Input.IMPORTANCE)
        batch, width = view.valid.shape
        needed = torch.zeros(batch, width, device="cpu")
        for row, mask in enumerate(self.needed):
            needed[row, : len(mask)] = torch.from_numpy(np.asarray(mask, np.float32))
        share = importance / importance.sum(1, keepdim=True)  # below 1, so a needed token beats any other
        score: Tensor = (needed.to(share.device) + share).masked_fill(~view.valid, -1)
        order = score.argsort(dim=1, descending=True, stable=True)[:, : max(plan.dominant for plan in view.plans)]
        rank = torch.arange(order.shape[1], device=order.device)
        valid = rank < view.dominant[:, None]
        index = order.masked_fill(~valid, width).sort(1).values.clamp(max=width - 1)
        return Selection.keep_only(index, valid)
