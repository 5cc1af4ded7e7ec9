"""The values that the parts of the package pass on: spans, selections, and the map of where every row comes from.

Shapes: B batch (samples or spans), N visual tokens of a span, K rows kept, P merged members, S prompt rows, T current rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

MERGES = ("mean", "anchor_plus_mean")


@dataclass(frozen=True)
class Span:
    """One image (or clip) in one sample.

    ``offset`` is the rank of its first token among the sample's visual tokens, ``tokens`` its unreduced count and ``grid`` its
    (rows, columns) where the family has one.
    """

    sample: int
    offset: int
    tokens: int
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Selection:
    """A V2V decision for B spans.

    Attributes
    ----------
    index : Tensor
        [B, K] source token of each output row (for merged rows: the anchor), in the method's own order.
    valid : Tensor
        [B, K] bool, False where a span has fewer rows than K.
    members : Tensor
        [B, P] source tokens that are merged into a row.
    into : Tensor
        [B, P] output row that each member joins, -1 for none.
    merge : str
        "mean": the plain mean of anchor and members; "anchor_plus_mean": anchor + mean of members (a sum of two, as in the released
        code of VisionZip and DUET-VLM).
    weights : Tensor or None
        [B, P] floating point. A row that members join is then the sum of these members, each times its weight, and of nothing else: ``index``
        says where the row stands, and its token is a member like any other if it is to count. A token may be a member of several rows, and
        of some while it is kept. ``merge`` plays no part. None: every member joins one row, by ``merge``.
    notes : Tensor or None
        [B, K] float32: a number that the method gives each row (the set or the event that it is of) and is shown again inside the decoder, where
        it requires ``Input.TAGS``. None: 0 for all.
    rows : Tensor or None
        [B, K, C] floating point, with ``weights``: what stands in the rows that members join, made of these members by a module of the method's
        own (``duet_vlm.reducers.compressor``); it may carry a gradient. Where later layers add to the same rows, ``weights`` merge what they add.
    """

    index: Tensor
    valid: Tensor
    source_tokens: Tensor
    target_row: Tensor
    merge: str = "mean"
    weights: Tensor | None = None
    tags: Tensor | None = None
    custom_rows: Tensor | None = None

    @classmethod
    def keep_only(cls, index: Tensor, valid: Tensor) -> Selection:
        """Keep rows, merge nothing."""
        nothing = index.new_zeros(index.shape[0], 0)
        return cls(index, valid, nothing, nothing)


@dataclass(frozen=True)
class TokenMap:
    """Where the current rows of a batch came from; every consequence of a drop goes through ``take``.

    Attributes
    ----------
    slot : Tensor
        [B, T] slot of each current row in the prompt as the caller sent it.
    row : Tensor
        [B, T] row of each current row in the sequence that entered the decoder.
    valid : Tensor
        [B, T] bool, False for padding rows.
    visual : Tensor
        [B, T] bool, True for visual tokens.
    stays : Tensor
        [B, T] bool, True for visual tokens whose row predicts (the last of a prompt, one in front of a label): they never leave.
    """

    prompt_index: Tensor
    entry_index: Tensor
    valid: Tensor
    visual: Tensor
    protected: Tensor

    @classmethod
    def identity(cls, valid: Tensor, visual: Tensor, stays: Tensor) -> TokenMap:
        """The map of an untouched prompt; ``valid``, ``visual`` and ``stays`` are [B, S] bool."""
        slot = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
        return cls(slot, slot, valid, visual & valid, stays & visual & valid)

    @property
    def prunable(self) -> Tensor:
        """[B, T] bool, visual tokens that may leave."""
        return self.visual & ~self.protected

    def gather(self, index: Tensor, valid: Tensor) -> TokenMap:
        """The map after gathering rows ``index`` [B, T'] of which ``valid`` [B, T'] are real."""
        slot, row, visual, stays = (x.gather(1, index) for x in (self.prompt_index, self.entry_index, self.visual, self.protected))
        return TokenMap(slot, row, valid, visual & valid, stays & valid)

    def renumbered(self) -> TokenMap:
        """The same rows seen as the sequence that enters the decoder (rows numbered anew)."""
        row = torch.arange(self.prompt_index.shape[1], device=self.prompt_index.device).expand(self.prompt_index.shape)
        return replace(self, entry_index=row)

    def to(self, device: torch.device) -> TokenMap:
        """The map on the device of the layer that reads it (a device map may spread layers)."""
        if self.prompt_index.device == device:
            return self
        return TokenMap(*(x.to(device) for x in (self.prompt_index, self.entry_index, self.valid, self.visual, self.protected)))


@dataclass(frozen=True)
class StageTrace:
    """The tokens of one span that are alive from ``layer`` on; ``layer`` 0 is the entry (V2V). Token numbers count within the span.

    ``merged``: tokens that were merged into another one in front of ``layer``, by that one (what is merged at entry is in ``SpanTrace.merged``).
    """

    layer: int
    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    merged: dict[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class SpanTrace:
    """The history of one span: ``merged`` maps an anchor to the other tokens merged into it at entry; ``stages`` follow the depth. A method
    that weighs what it merges may name a token for several anchors, and tokens that are kept. ``tower``: the tokens that went through the
    vision tower (a stage of layer -1); None where all did."""

    span: Span
    merged: dict[int, tuple[int, ...]]
    stages: tuple[StageTrace, ...]
    tower: StageTrace | None = None
