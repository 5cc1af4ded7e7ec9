"""Values that the parts of the package exchange: spans, selections, and the map from current to original positions.

Shapes: B batch (samples or spans), N visual tokens of a span, K kept tokens, P merged tokens, S prompt positions, T
current positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

MERGES = ("mean", "anchor_plus_mean")


@dataclass(frozen=True)
class Span:
    """One image (or video) in one sample.

    ``offset`` is the rank of its first token among the sample's visual tokens, ``tokens`` its unreduced count and
    ``grid`` its (rows, columns) where the family has one.
    """

    sample: int
    offset: int
    tokens: int
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Selection:
    """The decision of a method before the decoder, or of one that merges inside it, for B spans.

    Attributes
    ----------
    index : Tensor
        [B, K] long, source token of each output row (of a merged row its anchor), in the method's own order.
    valid : Tensor
        [B, K] bool, False where a span has fewer than K rows.
    source_tokens : Tensor
        [B, P] long, tokens that are merged into a row.
    target_row : Tensor
        [B, P] long, output row that each of ``source_tokens`` joins; -1 for none.
    merge : str
        "mean": plain mean of anchor and source tokens; "anchor_plus_mean": anchor plus the mean of the source tokens
        (released code of VisionZip and DUET-VLM).
    weights : Tensor or None
        [B, P] floating point. A row with source tokens is then their weighted sum and nothing else: ``index`` gives its
        place, and its token is a source token like any other if it is to count. A token may join several rows, and may
        be kept as well. ``merge`` plays no part.
    tags : Tensor or None
        [B, K] float32 number that the method gives each row and gets back inside the decoder with ``Input.TAGS``. None:
        0.
    custom_rows : Tensor or None
        [B, K, C] floating point, with ``weights``: content of the rows with source tokens, made by a module of the
        method (``duet_vlm.reducers.compressor``); it may carry a gradient. What later layers add to these rows is
        merged by ``weights``.
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
        """Keep tokens, merge nothing."""
        empty = index.new_zeros(index.shape[0], 0)
        return cls(index, valid, empty, empty)


@dataclass(frozen=True)
class TokenMap:
    """Map from current positions of a batch to their origin; every consequence of a drop goes through ``gather``.

    Attributes
    ----------
    prompt_index : Tensor
        [B, T] position of each current token in the caller's prompt.
    entry_index : Tensor
        [B, T] position of each current token in the sequence that entered the decoder.
    valid : Tensor
        [B, T] bool, False for padding.
    visual : Tensor
        [B, T] bool, True for visual tokens.
    protected : Tensor
        [B, T] bool, True for visual tokens at positions that predict (the last of a prompt, one before a label): they
        are never dropped.
    """

    prompt_index: Tensor
    entry_index: Tensor
    valid: Tensor
    visual: Tensor
    protected: Tensor

    @classmethod
    def identity(cls, valid: Tensor, visual: Tensor, protected: Tensor) -> TokenMap:
        """The map of an untouched prompt; ``valid``, ``visual`` and ``protected`` are [B, S] bool."""
        index = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
        return cls(index, index, valid, visual & valid, protected & visual & valid)

    @property
    def prunable(self) -> Tensor:
        """[B, T] bool, visual tokens that may be dropped."""
        return self.visual & ~self.protected

    def gather(self, index: Tensor, valid: Tensor) -> TokenMap:
        """The map after gathering positions ``index`` [B, T'], of which ``valid`` [B, T'] are no padding."""
        prompt_index, entry_index, visual, protected = (
            x.gather(1, index) for x in (self.prompt_index, self.entry_index, self.visual, self.protected)
        )
        return TokenMap(prompt_index, entry_index, valid, visual & valid, protected & valid)

    def renumbered(self) -> TokenMap:
        """The same tokens with entry positions numbered anew, as the sequence that enters the decoder."""
        entry_index = torch.arange(self.prompt_index.shape[1], device=self.prompt_index.device).expand(
            self.prompt_index.shape
        )
        return replace(self, entry_index=entry_index)

    def to(self, device: torch.device) -> TokenMap:
        """The map on another device (a device map may spread layers)."""
        if self.prompt_index.device == device:
            return self
        return TokenMap(
            *(x.to(device) for x in (self.prompt_index, self.entry_index, self.valid, self.visual, self.protected))
        )


@dataclass(frozen=True)
class StageTrace:
    """The tokens of one span after the stage at ``layer``; ``layer`` 0 is the entry to the decoder. Token numbers count
    within the span.

    ``merged``: tokens merged into another one before ``layer``, by that one (merges of the encoder stage are in
    ``SpanTrace.merged``). ``asleep``: with re-entry, tokens that entered and that layers from ``layer`` on leave out
    until the next stage, which may choose them again; ``kept`` are then those that are awake.
    """

    layer: int
    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    merged: dict[int, tuple[int, ...]] = field(default_factory=dict)
    asleep: tuple[int, ...] = ()


@dataclass(frozen=True)
class SpanTrace:
    """The history of one span: ``merged`` maps an anchor to the other tokens merged into it at entry; ``stages`` follow
    the depth.

    A method that weighs what it merges may name a token for several anchors, and tokens that are kept. ``tower``: the
    tokens that passed through the vision tower (a stage of layer -1); None where all did.
    """

    span: Span
    merged: dict[int, tuple[int, ...]]
    stages: tuple[StageTrace, ...]
    tower: StageTrace | None = None
