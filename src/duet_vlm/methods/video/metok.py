"""METok: more tokens for the video events that match the question, before the decoder and inside it; then a smaller
cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from duet_vlm.methods.video.video_base import ScheduledVideoReducer, VideoRows
from duet_vlm.ops.merge import unit_rows
from duet_vlm.ops.select import ranking, ranks, spaced_picks, top
from duet_vlm.ops.video import FrameWindows, VideoTokens, alike_before, split_windows
from duet_vlm.planning.budget import Schedule
from duet_vlm.reducers.decoder import DecoderView
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register

SLACK = 1e-6  # of a cosine, lost by rounding


@register("metok")
@dataclass(frozen=True)
class METok(ScheduledVideoReducer):
    """METok (EMNLP 2025, arXiv 2506.02850): three stages of pruning by the events of a video and the question.

    Before the decoder the video is cut into events where neighbouring frames are dissimilar, and events are ranked by
    their similarity to the question. Tokens that repeat the frame before them are dropped. The key events keep their
    other tokens, those of the other events are pooled. Inside the decoder, at three layers, the tokens with the largest
    attention from text, times the weight of their event (a softmax over the video), are kept. After the prompt, earlier
    layers drop the others from their cache (``trim_kv_cache=True``): the cache keeps as many tokens as the last stage.

    Parameters beyond ``ScheduledVideoReducer``
    ----------
    deviations : float
        The video is cut between frames whose similarity is this many standard deviations below the video's mean, at
        least 0.
    key : float
        Share of the events that are key events, in (0, 1]; at least one event.
    pooled : float
        Tokens of a frame of another event, relative to a frame of a key event, in (0, 1].
    threshold : float
        Cosine with the same place one frame earlier, within the event, above which a token is a repetition; in [-1, 1].
    temperature : float
        Temperature of the softmax over the events, above 0.

    Cost: a cosine per token, attention of text at three layers. Needs: the question, so the whole model must be called;
    frames, text after the video. Usable in training (the choice carries no gradient, pooled tokens do).

    From the paper's abstract: no code is public. Chosen here: an event's similarity is the mean cosine of its frames
    (the mean of their projected tokens) and the question's embeddings (the paper: a contrastive text tower); frames are
    pooled by runs of neighbours in raster order; a count is divided among frames so that it adds up, and where it
    allows more, repetitions are kept; layers 8, 16 and 24 of 32 keep 1/2, 1/4 and 1/8.
    """

    paper = "METok, EMNLP 2025, arXiv 2506.02850"
    summary = "cut a clip into events, keep more of those that the question is about, before the decoder and at three layers inside it"
    paper_schedule: ClassVar[Schedule] = ((8, 0.5), (16, 0.25), (24, 0.125))
    score_layer_offset = 0
    requires = frozenset({Input.PROJECTED_FEATURES, Input.QUESTION, Input.SCORES, Input.TAGS})

    default_options = TokenOptions(trim_kv_cache=True)
    deviations: float = 1.0
    key: float = 0.25
    pooled: float = 0.25
    threshold: float = 0.9
    temperature: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.deviations >= 0:
            raise ValueError(f"deviations={self.deviations}: a number of standard deviations, at least 0")
        for name in ("key", "pooled"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: a share, in (0, 1]")
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: a cosine, in [-1, 1]")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: of a softmax, above 0")

    def reduced(self, view: EncoderView, clips: VideoTokens, count: Tensor) -> VideoRows:
        question = view.require(Input.QUESTION)
        rows = clips.grid(view.require(Input.FEATURES))
        frames = unit_rows(clips.means(rows))
        events = self.events(frames, clips.length)
        words, real = unit_rows(question.embeddings), question.valid[..., None]
        question_mean = (words * real).sum(1) / real.sum(1).clamp(min=1)
        relevance = events.sums((frames @ question_mean[..., None])[..., 0]) / events.length.clamp(min=1)
        fresh = self.fresh(rows, clips, events)
        share = torch.where(events.of_step(self.key_events(relevance, events)), 1.0, self.pooled)
        kept, target, weight = pooled(clips.real, fresh, split_windows(count, share * fresh.sum(2), clips.sizes))
        owner = clips.rows(clips.index.gather(2, target.clamp(min=0)).masked_fill(target < 0, -1)).masked_fill(
            ~clips.placed, -1
        )
        notes = clips.of_step(events.of_step(self.weights(relevance, events)))
        return VideoRows(clips.rows(kept) & clips.placed, owner, clips.rows(weight), notes=notes)

    def events(self, frames: Tensor, length: Tensor) -> FrameWindows:
        """Cut videos into events by their frames' unit vectors: [B, T, C], [B] frames -> events."""
        alike = (frames[:, 1:] * frames[:, :-1]).sum(-1)
        real = torch.arange(1, frames.shape[1], device=frames.device) < length[:, None]
        number = real.sum(1, keepdim=True).clamp(min=1)
        mean = (alike * real).sum(1, keepdim=True) / number
        spread = (((alike - mean).square() * real).sum(1, keepdim=True) / number).sqrt()
        cuts = real & (alike < mean - self.deviations * spread - SLACK)
        return FrameWindows.of(torch.nn.functional.pad(cuts, (1, 0), value=True), length)

    def key_events(self, relevance: Tensor, events: FrameWindows) -> Tensor:
        """Mask of the key events: [B, T] bool."""
        there = events.length > 0
        count = (there.sum(1) * self.key - SLACK).ceil()
        return there & (ranks(ranking(relevance, there)) < count[:, None])

    def weights(self, relevance: Tensor, events: FrameWindows) -> Tensor:
        """Weight of each event inside the decoder [B, T], 1 in the mean of the video."""
        there = events.length > 0
        return (relevance / self.temperature).masked_fill(~there, float("-inf")).softmax(1) * there.sum(1, keepdim=True)

    def fresh(self, rows: Tensor, clips: VideoTokens, events: FrameWindows) -> Tensor:
        """Mask of the tokens that do not repeat the frame before them: [B, T, P] bool."""
        again = (
            (alike_before(rows) > self.threshold)
            & clips.real[:, :-1]
            & (events.number[:, 1:] == events.number[:, :-1])[..., None]
        )
        return clips.real & ~torch.nn.functional.pad(again, (0, 0, 1, 0))

    def prune_tokens(self, view: DecoderView) -> Tensor:
        tags = view.require(Input.TAGS)
        return top(view.require(Input.SCORES) * torch.where(tags > 0, tags, 1.0), view.valid, view.num_keep)


def pooled(real: Tensor, fresh: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pool tokens of each step into ``count`` runs of neighbours.

    The ``fresh`` tokens form as many runs as are wanted, one token each where there are fewer of them; further places
    go to other tokens, evenly spaced.

    Parameters
    ----------
    real : Tensor
        [B, T, P] bool, False for padding.
    fresh : Tensor
        [B, T, P] bool, tokens that are no repetitions.
    count : Tensor
        [B, T] long, tokens to keep of each step.

    Returns
    -------
    kept : Tensor
        [B, T, P] bool, first tokens of runs and single tokens.
    place : Tensor
        [B, T, P] long, place in the step of the kept token that each token joins (-1: none).
    weight : Tensor
        [B, T, P] float32, weight of each token there.
    """
    (batch, steps, places), total = real.shape, fresh.sum(2, keepdim=True)
    runs = torch.minimum(count[..., None], total)
    rank = (fresh.cumsum(2) - 1).clamp(min=0)
    run = rank * runs // total.clamp(min=1)
    begins = fresh & (runs > 0) & ((rank == 0) | (run != (rank - 1).clamp(min=0) * runs // total.clamp(min=1)))
    column = torch.arange(places, device=real.device).expand(real.shape)
    joins = fresh & (runs > 0)
    first = (
        torch.full_like(column, places)
        .scatter_reduce(2, run, torch.where(joins, column, places), "amin")
        .gather(2, run)
    )
    size = torch.zeros_like(column).scatter_add(2, run, joins.long()).gather(2, run)
    more = spaced_picks((real & ~fresh).flatten(0, 1), (count - runs[..., 0]).flatten()).view(batch, steps, places)
    into = torch.where(more, column, torch.where(joins, first, -1))
    return begins | more, into, torch.where(more, 1.0, 1 / size.clamp(min=1))
