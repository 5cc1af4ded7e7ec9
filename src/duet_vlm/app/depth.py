"""The slider: one answer's picture, or clip, at each depth of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from duet_vlm import SpanTrace
from duet_vlm.app.files import Uploads
from duet_vlm.app.generate import RunRecord
from duet_vlm.viz import (
    at_depth,
    cropped_picture,
    film,
    film_place,
    frame_pictures,
    history,
    on_film,
    part_pictures,
    token_fates,
    told,
)

FIRST = -1  # the vision tower
SIZE, STEP = 448, 176  # pixels of a picture's longer side, and of a step of time of a clip
ACROSS = 4  # steps of time beside each other

Scores = list[dict[int, float] | None]


@dataclass(frozen=True)
class DepthStep:
    """One position of the slider: a line, a smaller one, the patches, and the scores that decided (None where none
    did)."""

    title: str
    note: str
    patches: Image.Image
    scores: Image.Image | None


@dataclass(frozen=True)
class DepthStrip:
    """A span on the picture that its tokens cover: ``steps`` pictures of one size below each other."""

    picture: Image.Image
    trace: SpanTrace
    scores: Scores
    steps: int = 1


@dataclass(frozen=True)
class DepthView:
    """Tokens of one answer through the depth of a decoder of ``depth`` layers: one span, or a span for each tile or
    frame."""

    strips: tuple[DepthStrip, ...]
    depth: int

    def at(self, layer: int) -> DepthStep:
        """The picture where decoder layer ``layer`` reads it; -1 is the vision tower, 0 the entry to the decoder.

        Raises
        ------
        ValueError
            If the tokens form no grid.
        """
        panels = [
            at_depth(s.picture, s.trace, layer, s.scores, size=SIZE if self._pictures == 1 else STEP * s.steps)
            for s in self.strips
        ]
        patches = tiled(
            [
                tile
                for strip, panel in zip(self.strips, panels, strict=True)
                for tile in _cut(panel.picture, strip.steps)
            ]
        )
        scored = [
            (strip, panel.scores) for strip, panel in zip(self.strips, panels, strict=True) if panel.scores is not None
        ]
        scores = (
            tiled([tile for strip, picture in scored for tile in _cut(picture, strip.steps)])
            if len(scored) == len(panels)
            else None
        )
        return DepthStep(*told([strip.trace for strip in self.strips], layer), patches, scores)

    @property
    def first_loss(self) -> int:
        """The first depth from the entry on at which tokens are gone, dropped or merged; 0 where all stay."""
        traces = [strip.trace for strip in self.strips]
        some_gone = (
            n
            for n in range(self.depth)
            if any(len(token_fates(trace, n).alive) < trace.span.tokens for trace in traces)
        )
        return next(some_gone, 0)

    def story(self, x: float, y: float, layer: int) -> str:
        """The fate of the patch at a place of that picture, given as shares of its width and height."""
        across = min(ACROSS, self._pictures)
        down = -(-self._pictures // across)
        column, row = min(int(x * across), across - 1), min(int(y * down), down - 1)
        number = row * across + column
        if not (0 <= x <= 1 and 0 <= y <= 1) or number >= self._pictures:
            return ""
        point = x * across - column, y * down - row
        if len(self.strips) == 1:
            return _story(self.strips[0], point[0], (number + point[1]) / self.strips[0].steps, layer)
        return f"Part {number + 1}: {_story(self.strips[number], *point, layer)}"

    @property
    def _pictures(self) -> int:
        return sum(strip.steps for strip in self.strips)


def depth_view(shown: Uploads, inputs: Any, processor: Any, done: RunRecord) -> DepthView:
    """The walk through an answer.

    Raises
    ------
    ValueError
        If the spans of the prompt are not those of what was shown.
    """
    count = len(done.traces)
    if shown.clips:
        parts, steps = frame_pictures(shown.clips[0].frames, inputs, 0, processor)
        if count == 1:
            trace, place = done.traces[0], film_place(done.traces[0], steps)
            scores = (
                [stage and {place(token): score for token, score in stage.items()} for stage in done.scores[0]]
                if place
                else []
            )
            return DepthView((DepthStrip(film(parts, steps), on_film(trace, steps), scores, steps),), done.depth)
    else:
        parts = (
            [cropped_picture(shown.pictures[0], inputs, 0, processor)]
            if count == 1
            else part_pictures(inputs, processor, count)
        )
    if len(parts) != count:
        raise ValueError(f"what was shown makes {count} spans in this model, which cannot be drawn on it")
    return DepthView(tuple(DepthStrip(*part) for part in zip(parts, done.traces, done.scores, strict=True)), done.depth)


def _cut(strip: Image.Image, steps: int) -> list[Image.Image]:
    tall = strip.height // steps
    return [strip.crop((0, step * tall, strip.width, (step + 1) * tall)) for step in range(steps)]


def tiled(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in rows of four."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (width * min(ACROSS, len(pictures)), height * -(-len(pictures) // ACROSS)), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % ACROSS * width, number // ACROSS * height))
    return sheet


def _story(strip: DepthStrip, x: float, y: float, layer: int) -> str:
    if strip.trace.span.grid is None:
        return ""
    rows, columns = strip.trace.span.grid
    cell = min(int(y * rows), rows - 1) * columns + min(int(x * columns), columns - 1)
    return history(strip.trace, strip.trace.span.tokens - rows * columns + cell, layer, strip.steps)
