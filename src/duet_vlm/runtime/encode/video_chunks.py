"""Clips through the encoder in pieces: some frames at a time, and frames that did not change not at all.

What the tower needs then depends on the piece and not on the clip. What is chosen from is as in one piece: rows and signals of all steps of
time, put together again; a step that was not encoded has those of the one that it repeats.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from duet_vlm.models.adapter import Adapter, Encoding
from duet_vlm.ops.ragged import upload
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.inputs import Input
from duet_vlm.runtime import compat
from duet_vlm.runtime.context import EncodeContext

SHARE = 0.25  # of the free memory of an accelerator, for what the tower makes of one piece


@dataclass(frozen=True)
class ChunkConfig:
    """How clips go through the encoder: ``frames`` at a time (None: as many as fit), and which are ``still``: in no patch is the mean difference of
    pixels from the last frame that was encoded larger than that (None: all are encoded)."""

    chunk_frames: int | None = None
    still_frames: float | None = None

    def check(self, adapter: Adapter, reducer: Reducer) -> None:
        """Refuse what would change what is chosen, or nothing can be cut for.

        Raises
        ------
        TypeError
            No numbers; a family or a method that clips cannot be cut for.
        ValueError
            Not a number of whole steps of time, or no difference.
        """
        if self.chunk_frames is None and self.still_frames is None:
            return
        if self.chunk_frames is not None and (isinstance(self.chunk_frames, bool) or not isinstance(self.chunk_frames, int)):
            raise TypeError(f"chunk_frames={self.chunk_frames!r}: a number of frames (int), or None")
        if self.still_frames is not None and (isinstance(self.still_frames, bool) or not isinstance(self.still_frames, int | float)):
            raise TypeError(f"still_frames={self.still_frames!r}: a difference of pixel values (float), or None")
        together = adapter.temporal_patch_size()
        if self.chunk_frames is not None and (self.chunk_frames < 1 or self.chunk_frames % together):
            raise ValueError(
                f"chunk_frames={self.chunk_frames}: {adapter.family} looks at {together} frame(s) at once; give a multiple of that, at least one"
            )
        if self.still_frames is not None and not 0 <= self.still_frames < math.inf:
            raise ValueError(f"still_frames={self.still_frames}: give a finite mean difference of pixel values, 0 or more")
        if why := _whole(reducer):
            name = "chunk_frames" if self.still_frames is None else "still_frames"
            raise TypeError(f"{name}: {reducer.name} {why}, so a clip goes through it as it is; leave {name} out")

    def plan_chunks(self, adapter: Adapter, reducer: Reducer, call: Encoding, pixels: Tensor) -> ChunkPlan | None:
        """The calls that one call for clips becomes; None where it stays as it is. Reads which frames are still from the device."""
        if call.stream != "video" or torch.is_grad_enabled():  # what gradients need is kept in any case
            return None
        most = self._steps(adapter, reducer, call, pixels)
        if most is None and self.still_frames is None:
            return None
        lengths = _lengths(call, pixels)
        if self.still_frames is None:
            moved = [[True] * count for count in lengths]
        else:
            moved = [changed_steps(per_chunk_backward(adapter, call, clip, count), self.still_frames).tolist() for clip, count in enumerate(lengths)]
        if all(map(all, moved)) and (most is None or sum(lengths) <= most):
            return None
        shown = [[t for t, new in enumerate(some) if new] for some in moved]
        of_step = [[number - 1 for number in accumulate(some)] for some in moved]
        pieces = [
            Chunk(clip, start, some[start : start + (most or len(some))], start + (most or len(some)) >= len(some))
            for clip, some in enumerate(shown)
            for start in range(0, len(some), most or len(some))
        ]
        return ChunkPlan(pieces, of_step)

    def _steps(self, adapter: Adapter, reducer: Reducer, call: Encoding, pixels: Tensor) -> int | None:
        """Steps of time of a piece; None where all fit."""
        if self.chunk_frames is not None:
            return self.chunk_frames // adapter.temporal_patch_size()
        free = compat.free_bytes(pixels.device)
        if free is None or _whole(reducer):
            return None
        shape = adapter.vision_dims()
        values = shape.layers * shape.width + 10 * shape.width + 3 * shape.mlp  # of a row: a block's, and every layer's where they are handed out
        rows = pixels.numel() / shape.patch_inputs / max(1, sum(_lengths(call, pixels)))
        return max(1, int(SHARE * free / (rows * values * max(2, pixels.element_size()))))


def _lengths(call: Encoding, pixels: Tensor) -> list[int]:
    """Steps of time of each clip of a call."""
    return [size[0] for size in call.sizes] if call.sizes else [pixels.shape[1]] * len(pixels)


def _whole(reducer: Reducer) -> str:
    """Why a method needs the frames of a clip in one call of the tower; empty where it does not."""
    if reducer.tower_reducer is not None:
        return "reduces in the tower"
    return "asks the projector" if Input.PROJECTOR in reducer.requires else ""


def per_chunk_backward(adapter: Adapter, call: Encoding, clip: int, count: int) -> Iterator[Tensor]:
    """The pixels of each of the ``count`` steps of a clip, patch by patch [n, m]; no more than one is held."""
    for step in range(count):
        ((pixels,),) = adapter.steps(adapter.slice_frames(call, clip, [step]))
        yield pixels


def changed_steps(steps: Iterable[Tensor], still: float) -> Tensor:
    """Which steps, each [n, m], differ from the last one that did in any of their n patches by more than ``still`` (mean absolute difference of its
    m values): [t] bool, the first always."""
    last, new = None, []
    for step in steps:
        if last is None:
            last = step
            new.append(torch.ones((), dtype=torch.bool, device=step.device))
            continue
        apart = (step.float() - last.float()).abs().mean(-1).amax()
        new.append(~(apart <= still))  # pixels that are no numbers are a change, for the features to be refused
        last = torch.where(new[-1], step, last)
    return torch.stack(new)


@dataclass(frozen=True)
class Chunk:
    """A part of an encoder call: ``steps`` of one ``clip``, of those that are encoded the ones from number ``start`` on, the ``last`` of them or not.
    Its pixels are taken when its turn comes."""

    video: int
    start: int
    steps: list[int]
    last: bool


@dataclass(frozen=True)
class ChunkPlan:
    """The ``pieces`` of a call; ``of_step``: per clip, for every step the number of its rows among those that are encoded."""

    chunks: list[Chunk]
    chunk_of_step: list[list[int]]

    def reused_steps(self, clip: int, rows: Tensor) -> Tensor:
        """Rows of the encoded steps of a clip as those of all its steps."""
        numbers = self.chunk_of_step[clip]
        if numbers[-1] + 1 == len(numbers):
            return rows
        return rows.unflatten(0, (numbers[-1] + 1, -1))[upload(numbers, rows.device)].flatten(0, 1)

    def encoded_steps(self, clip: int, rows: Tensor) -> Tensor:
        """Of rows of all steps those of the encoded ones."""
        steps = rows.unflatten(0, (len(self.chunk_of_step[clip]), -1))
        return steps[upload([not repeats for repeats in self.repeated_steps[clip]], rows.device)].flatten(0, 1)

    @property
    def repeated_steps(self) -> tuple[tuple[bool, ...], ...]:
        """Per clip, which steps were not encoded."""
        return tuple(tuple(t > 0 and number == steps[t - 1] for t, number in enumerate(steps)) for steps in self.chunk_of_step)


@dataclass
class ChunkedFeatures:
    """What the pieces of a call made, by clip: rows, those of deeper levels, and by layer and name the signals of its rows. All of it is written
    where it belongs among the rows of the clip, so nothing is held twice."""

    chunk_plan: ChunkPlan
    rows: dict[int, Tensor] = field(default_factory=dict)
    levels: list[dict[int, Tensor]] = field(default_factory=list)
    signals: dict[int, dict[str, dict[int, Tensor]]] = field(default_factory=dict)
    projects: bool = False  # ``rows`` are those in front of the projector

    def add(self, adapter: Adapter, piece: Chunk, call: EncodeContext, output: Any) -> None:
        """What ``call`` made of ``piece``. Rows behind the steps of a clip are taken from its last one."""
        self.projects = call.unprojected_rows is not None
        spans = adapter.spans(output, call.encoding) if call.unprojected_rows is None else adapter.unpack_to_spans(call.unprojected_rows, call.encoding)
        shows = int((adapter.parts(call.encoding, [len(spans[0])])[0] >= 0).sum())
        self._put(self.rows, piece, spans[0], shows)
        levels = [list(level) for level in getattr(output, "deepstack_features", None) or ()]
        self.levels = self.levels or [{} for _ in levels]
        for level, made in zip(self.levels, levels, strict=True):
            self._put(level, piece, made[0], shows)
        for layer, signals in call.signals.items():
            for name, spans in signals.items():
                self._put(self.signals.setdefault(layer, {}).setdefault(name, {}), piece, spans[0], shows)

    def concatenate(self) -> tuple[list[Tensor], list[tuple[Tensor, ...]], dict[int, dict[str, list[Tensor]]]]:
        """Rows, levels and signals of every clip."""
        signals = {layer: {name: list(some.values()) for name, some in made.items()} for layer, made in self.signals.items()}
        return list(self.rows.values()), [tuple(level.values()) for level in self.levels], signals

    def _put(self, into: dict[int, Tensor], piece: Chunk, made: Tensor, shows: int) -> None:
        """Rows of a piece, the first ``shows`` of which are of its steps."""
        numbers = self.chunk_plan.chunk_of_step[piece.video]
        each = shows // len(piece.steps)
        content = each * len(numbers)
        if piece.video not in into:
            into[piece.video] = made.new_empty(content + len(made) - shows, *made.shape[1:])
        whole = into[piece.video]
        first, end = bisect_left(numbers, piece.start), bisect_left(numbers, piece.start + len(piece.steps))
        steps = made[:shows].unflatten(0, (-1, each))
        for step in range(first, end):
            whole[step * each : (step + 1) * each] = steps[numbers[step] - piece.start]
        if piece.last:
            whole[content:] = made[shows:]
