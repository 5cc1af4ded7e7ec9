"""DyCoke, stage before the decoder: one frame of four is kept whole, the others keep the tokens that differ from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duet_vlm.methods.video.video_base import VideoReducer, VideoRows
from duet_vlm.ops.merge import unit_rows
from duet_vlm.ops.ragged import gather_rows
from duet_vlm.ops.select import spaced_picks, top
from duet_vlm.ops.video import VideoTokens, split_windows
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.registry import register

GROUP = 4  # frames of which the first stays whole


@register("dycoke")
@dataclass(frozen=True)
class DyCoke(VideoReducer):
    """DyCoke (CVPR 2025, arXiv 2411.15024): token temporal merging, the stage before the decoder.

    Frames are grouped by four. The first is kept whole, the second and third are compared with it and the fourth with
    the third (cosine at the same place); each of the three keeps the tokens that differ most, equally many in each. No
    attention, no text; dropped tokens are not averaged.

    Parameters
    ----------
    keep : int or float, optional
        Tokens kept per span: a count, or a fraction. A budget of n keeps n.

    Cost: one cosine per token. Needs: frames. Usable in training (the choice carries no gradient).

    Differences from the paper: its ratio of merging (0.7 of three of four frames) follows from the budget; a budget
    smaller than the first frames of all groups is met by tokens evenly spaced over them, as for images. Its second
    stage, which prunes the cache while decoding, is left out. Written from the paper; not compared with recorded
    outputs of the authors' code.
    """

    paper = "DyCoke, CVPR 2025, arXiv 2411.15024"
    summary = "of every four frames keep one whole and of the others what differs from it, before the decoder; images are thinned evenly"
    compares_positions = True

    def reduced(self, view: EncoderView, clips: VideoTokens, count: Tensor) -> VideoRows:
        at = torch.arange(clips.real.shape[1], device=count.device)
        whole = clips.rows(clips.real & (at % GROUP == 0)[:, None]) & clips.placed
        first = torch.minimum(whole.sum(1), count)
        rest = clips.real & (at % GROUP != 0)[:, None]
        frames = split_windows(count - first, rest.sum(2).float(), rest.sum(2))
        differs = top(
            self.change(clips.grid(view.require(Input.FEATURES)), clips).flatten(0, 1),
            rest.flatten(0, 1),
            frames.flatten(),
        ).view(rest.shape)
        return VideoRows.alone(spaced_picks(whole, first) | (clips.rows(differs) & clips.placed))

    def change(self, rows: Tensor, clips: VideoTokens) -> Tensor:
        """Compute 1 - cosine with the reference frame of each frame: [B, T, P, C] -> [B, T, P]; 2 where that frame has
        no such token.
        """
        at = torch.arange(rows.shape[1], device=rows.device)
        other = (at - torch.where(at % GROUP == 2, 2, 1)).clamp(min=0).expand(rows.shape[:2])
        unit = unit_rows(rows)
        return ((unit - gather_rows(unit, other)).square().sum(-1) / 2).masked_fill(
            ~gather_rows(clips.real, other), 2.0
        )
