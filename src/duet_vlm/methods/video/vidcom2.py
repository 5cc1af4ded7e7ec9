"""VidCom2: keep the video tokens that are least similar to video and frame, more of them in unusual frames, before the
decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duet_vlm.methods.video.video_base import VideoReducer, VideoRows
from duet_vlm.ops.merge import unit_rows
from duet_vlm.ops.select import ranking
from duet_vlm.ops.video import VideoTokens, split_windows
from duet_vlm.planning.budget import Keep
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)  # of the kernels whose sum says how alike two rows are


@register("vidcom2")
@dataclass(frozen=True)
class VidCom2(VideoReducer):
    """VidCom2 (EMNLP 2025, arXiv 2505.14454): frame-wise budgets by uniqueness, tokens by dissimilarity.

    The half of the channels that varies least over the video is compared, with rows scaled to unit length. A token is
    compared with the mean of the video and the mean of its frame (a sum of five Gaussian kernels); frames that are
    least similar to the video get more of the budget, and each keeps its least similar tokens. No attention, no text,
    no merging.

    Parameters
    ----------
    keep : int or float, optional
        Tokens kept per span: a count, or a fraction. A budget of n keeps n.
    channels : float
        Share of the channels that are compared, in (0, 1].
    temperature : float
        Temperature of the softmax over frames, above 0: small values move the budget towards one frame, large ones give
        all frames the same.

    Cost: two comparisons per token. Needs: frames. Usable in training (the choice carries no gradient).

    Differences from the authors' code (xuyang-liu16/VidCom2): the counts of all frames add up to the budget (released:
    each is rounded separately); the excess of a frame goes to the others; newline tokens are dropped, or kept at their
    positions (``newline_tokens``), where the released code moves them after their frame; kept positions.
    """

    paper = "VidCom2, EMNLP 2025, arXiv 2505.14454"
    summary = "keep the tokens of a clip that resemble clip and frame least, more of them in frames that stand out, before the decoder"

    channels: float = 0.5
    temperature: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.channels <= 1:
            raise ValueError(f"channels={self.channels}: the share of channels that are compared, in (0, 1]")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: of a softmax over frames, above 0")

    @classmethod
    def official(cls, keep: Keep = 0.25, **fields: Any) -> VidCom2:
        """Return the settings of the released rule with a given count: newline tokens are kept."""
        options = TokenOptions(newline_tokens="keep", protect_predicting_tokens=False)
        return cls.from_preset(options, fields, keep=keep)

    def reduced(self, view: EncoderView, clips: VideoTokens, count: Tensor) -> VideoRows:
        to_clip, to_frame = self.likeness(clips.grid(view.require(Input.FEATURES)), clips)
        scale = self.scale(to_clip, clips)
        frames = split_windows(count, scale * clips.sizes, clips.sizes, least_of(count, clips.sizes))
        return VideoRows.alone(self.chosen(clips, to_clip + to_frame, frames))

    def likeness(self, rows: Tensor, clips: VideoTokens) -> tuple[Tensor, Tensor]:
        """Similarity of each token [B, T, P, C] to the mean of its video and to that of its frame: two [B, T, P]
        float32.
        """
        rows, real = rows.float(), clips.real[..., None]
        total = clips.sizes.sum(1)[:, None, None, None].clamp(min=1)
        mean = rows.masked_fill(~real, 0).sum((1, 2), keepdim=True) / total
        spread = (rows - mean).square().masked_fill(~real, 0).sum((1, 2))
        calm = spread.argsort(dim=1, stable=True)[:, : max(1, int(rows.shape[3] * self.channels))].sort(dim=1).values
        unit = unit_rows(rows.gather(3, calm[:, None, None].expand(*rows.shape[:3], -1))).masked_fill(~real, 0)
        frame = unit.sum(2, keepdim=True) / clips.sizes.clamp(min=1)[..., None, None]
        return kernels(unit, unit.sum((1, 2), keepdim=True) / total), kernels(unit, frame)

    def scale(self, to_clip: Tensor, clips: VideoTokens) -> Tensor:
        """Tokens of each frame relative to an equal share: [B, T] float32."""
        there = clips.sizes > 0
        unlike = -to_clip.masked_fill(~clips.real, 0).sum(2) / clips.sizes.clamp(min=1)
        share = (unlike.masked_fill(~there, float("-inf")) / self.temperature).softmax(1).masked_fill(~there, 0)
        return (1 + share - 1 / there.sum(1, keepdim=True).clamp(min=1)) * there

    def chosen(self, clips: VideoTokens, alike: Tensor, frames: Tensor) -> Tensor:
        """Mask [B, N] of the ``frames`` [B, T] least similar tokens of every frame: alike [B, T, P] -> [B, N] bool."""
        order = ranking(-alike.flatten(0, 1), clips.real.flatten(0, 1))
        best = torch.arange(order.shape[1], device=order.device) < frames.flatten()[:, None]
        kept = torch.zeros_like(best).scatter(1, order, best).view(alike.shape) & clips.real
        return clips.rows(kept) & clips.placed


def kernels(rows: Tensor, centre: Tensor) -> Tensor:
    """Similarity of rows and a centre, a sum of Gaussian kernels: [..., C] and [..., C] -> [...], at most the number of
    kernels.
    """
    apart = (rows - centre).square().sum(-1)
    return torch.stack([(apart / (-2 * width)).exp() for width in WIDTHS]).sum(0)


def least_of(count: Tensor, sizes: Tensor) -> Tensor:
    """One token of every frame where the count allows it: [B], [B, T] -> [B, T]."""
    return ((sizes > 0) & (count >= (sizes > 0).sum(1))[:, None]).long()
