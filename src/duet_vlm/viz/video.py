"""Videos as pictures: their frames, and their tokens on the grid of these frames."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from PIL import Image

from duet_vlm.planning.tokens import SpanTrace, StageTrace


def film(frames: Sequence[Image.Image], steps: int) -> Image.Image:
    """The frames of a video one below the other, one for each of the model's time steps."""
    chosen = [frames[step * len(frames) // steps] for step in range(steps)]
    width, height = chosen[0].size
    strip = Image.new("RGB", (width, height * steps))
    for step, frame in enumerate(chosen):
        strip.paste(frame, (0, step * height))
    return strip


def on_film(trace: SpanTrace, steps: int) -> SpanTrace:
    """The trace of a video on the grid of its ``film``.

    Families that return a square per frame after its CLS token have no grid: there the CLS tokens are counted first, as
    ``draw`` wants tokens that show no patch, and the patches of all frames after them.
    """
    place, side = film_place(trace, steps), math.isqrt(trace.span.tokens // steps)
    if trace.span.grid is not None or place is None:
        return trace

    def places(tokens: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(map(place, tokens)))

    def groups(merged: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
        return {place(anchor): places(members) for anchor, members in merged.items()}

    def placed(stage: StageTrace) -> StageTrace:
        return StageTrace(
            stage.layer, places(stage.kept), places(stage.dropped), groups(stage.merged), places(stage.asleep)
        )

    return SpanTrace(
        dataclasses.replace(trace.span, grid=(steps * side, side)), groups(trace.merged), tuple(map(placed, trace.stages)),
        trace.tower and placed(trace.tower),
    )  # fmt: skip


def film_place(trace: SpanTrace, steps: int) -> Callable[[int], int] | None:
    """The map of token numbers that ``on_film`` applies; None where a span without a grid is no square per step."""
    each, side = trace.span.tokens // steps, math.isqrt(trace.span.tokens // steps)
    patches, front = side * side, each - side * side
    if trace.span.grid is not None:
        return lambda token: token
    if front > 1 or each * steps != trace.span.tokens:
        return None

    def place(token: int) -> int:
        step, row = divmod(token, each)
        return step * front + row if row < front else steps * front + step * patches + row - front

    return place
