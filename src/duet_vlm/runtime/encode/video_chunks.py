"""Encode videos in chunks: some frames at a time, and unchanged frames not at all.

The memory of the tower then depends on the chunk and not on the video. Tokens are selected as without chunks: from the
features and signals of all time steps, concatenated; a step that was not encoded has those of the step that it repeats.
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

from duet_vlm.models.adapter import Adapter, EncoderCall
from duet_vlm.ops.ragged import upload
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.inputs import Input
from duet_vlm.runtime import compat
from duet_vlm.runtime.context import EncodeContext

MEMORY_SHARE = 0.25  # of the free memory of an accelerator, for the activations of one chunk


@dataclass(frozen=True)
class ChunkConfig:
    """Settings of chunked videos.

    Attributes
    ----------
    chunk_frames : int or None
        Frames that are encoded at a time; None: as many as fit.
    still_frames : float or None
        A frame is not encoded if its mean pixel difference from the last encoded frame is at most this in every patch;
        None: all frames are encoded.
    """

    chunk_frames: int | None = None
    still_frames: float | None = None

    def check(self, adapter: Adapter, reducer: Reducer) -> None:
        """Refuse settings that would change the selection, and methods or families without chunks.

        Raises
        ------
        TypeError
            No numbers; a family or a method that needs whole videos.
        ValueError
            Not a number of whole time steps, or no difference.
        """
        if self.chunk_frames is None and self.still_frames is None:
            return
        if self.chunk_frames is not None and (
            isinstance(self.chunk_frames, bool) or not isinstance(self.chunk_frames, int)
        ):
            raise TypeError(f"chunk_frames={self.chunk_frames!r}: a number of frames (int), or None")
        if self.still_frames is not None and (
            isinstance(self.still_frames, bool) or not isinstance(self.still_frames, int | float)
        ):
            raise TypeError(f"still_frames={self.still_frames!r}: a difference of pixel values (float), or None")
        frames_per_step = adapter.temporal_patch_size()
        if self.chunk_frames is not None and (self.chunk_frames < 1 or self.chunk_frames % frames_per_step):
            raise ValueError(
                f"chunk_frames={self.chunk_frames}: {adapter.family} looks at {frames_per_step} frame(s) at once; give a multiple of that, at least one"
            )
        if self.still_frames is not None and not 0 <= self.still_frames < math.inf:
            raise ValueError(
                f"still_frames={self.still_frames}: give a finite mean difference of pixel values, 0 or more"
            )
        reason = _needs_whole_video(reducer)
        if reason:
            name = "chunk_frames" if self.still_frames is None else "still_frames"
            raise TypeError(f"{name}: {reducer.name} {reason}, so a clip goes through it as it is; leave {name} out")

    def plan_chunks(
        self, adapter: Adapter, reducer: Reducer, encoding: EncoderCall, pixels: Tensor
    ) -> ChunkPlan | None:
        """The chunks of one encoder call for videos; None where it stays one call.

        Copies the still frames' flags from the device.
        """
        if encoding.stream != "video" or torch.is_grad_enabled():  # activations are kept for gradients in any case
            return None
        steps_per_chunk = self._steps_per_chunk(adapter, reducer, encoding, pixels)
        if steps_per_chunk is None and self.still_frames is None:
            return None
        lengths = _num_steps(encoding, pixels)
        if self.still_frames is None:
            changed = [[True] * count for count in lengths]
        else:
            changed = []
            for video, count in enumerate(lengths):
                steps = step_pixels(adapter, encoding, video, count)
                changed.append(changed_steps(steps, self.still_frames).tolist())
        if all(map(all, changed)) and (steps_per_chunk is None or sum(lengths) <= steps_per_chunk):
            return None
        encoded_steps = [[t for t, is_new in enumerate(video_steps) if is_new] for video_steps in changed]
        chunk_of_step = [[number - 1 for number in accumulate(video_steps)] for video_steps in changed]
        chunks = []
        for video, video_steps in enumerate(encoded_steps):
            size = steps_per_chunk or len(video_steps)
            for start in range(0, len(video_steps), size):
                chunks.append(
                    Chunk(video, start, video_steps[start : start + size], last=start + size >= len(video_steps))
                )
        return ChunkPlan(chunks, chunk_of_step)

    def _steps_per_chunk(self, adapter: Adapter, reducer: Reducer, encoding: EncoderCall, pixels: Tensor) -> int | None:
        """Time steps of a chunk; None where all fit."""
        if self.chunk_frames is not None:
            return self.chunk_frames // adapter.temporal_patch_size()
        free = compat.free_bytes(pixels.device)
        if free is None or _needs_whole_video(reducer):
            return None
        dims = adapter.vision_dims()
        # per row: activations of a block, and the output of every layer
        values = dims.layers * dims.width + 10 * dims.width + 3 * dims.mlp
        rows = pixels.numel() / dims.patch_inputs / max(1, sum(_num_steps(encoding, pixels)))
        return max(1, int(MEMORY_SHARE * free / (rows * values * max(2, pixels.element_size()))))


def _num_steps(encoding: EncoderCall, pixels: Tensor) -> list[int]:
    """Time steps of each video of a call."""
    return [size[0] for size in encoding.sizes] if encoding.sizes else [pixels.shape[1]] * len(pixels)


def _needs_whole_video(reducer: Reducer) -> str:
    """The reason why a method needs all frames of a video in one call of the tower; empty where it does not."""
    if reducer.tower_reducer is not None:
        return "reduces in the tower"
    return "calls the projector" if Input.PROJECTOR in reducer.requires else ""


def step_pixels(adapter: Adapter, encoding: EncoderCall, video: int, count: int) -> Iterator[Tensor]:
    """The pixels of each of the ``count`` steps of a video, patch by patch [n, m]; only one step is held at a time."""
    for step in range(count):
        ((pixels,),) = adapter.steps(adapter.slice_frames(encoding, video, [step]))
        yield pixels


def changed_steps(steps: Iterable[Tensor], threshold: float) -> Tensor:
    """Time steps that changed: [t] bool, the first always.

    A step [n, m] changed if any of its n patches differs from the last changed step by more than ``threshold`` (mean
    absolute difference of its m values).
    """
    last, changed = None, []
    for step in steps:
        if last is None:
            last = step
            changed.append(torch.ones((), dtype=torch.bool, device=step.device))
            continue
        difference = (step.float() - last.float()).abs().mean(-1).amax()
        changed.append(~(difference <= threshold))  # NaN pixels count as a change, so that the features are refused
        last = torch.where(changed[-1], step, last)
    return torch.stack(changed)


@dataclass(frozen=True)
class Chunk:
    """A chunk of one video.

    Attributes
    ----------
    video : int
        Number of the video in the encoder call.
    start : int
        Number of the first step among the encoded ones of the video.
    steps : list of int
        Time steps of the video.
    last : bool
        It is the last chunk of the video.
    """

    video: int
    start: int
    steps: list[int]
    last: bool


@dataclass(frozen=True)
class ChunkPlan:
    """The chunks of one encoder call.

    Attributes
    ----------
    chunks : list of Chunk
        In order.
    chunk_of_step : list of list of int
        Per video, for every time step the number of the encoded step that has its features.
    """

    chunks: list[Chunk]
    chunk_of_step: list[list[int]]

    def reused_steps(self, video: int, rows: Tensor) -> Tensor:
        """Rows of all steps of a video, from those of its encoded steps."""
        numbers = self.chunk_of_step[video]
        if numbers[-1] + 1 == len(numbers):
            return rows
        return rows.unflatten(0, (numbers[-1] + 1, -1))[upload(numbers, rows.device)].flatten(0, 1)

    def encoded_steps(self, video: int, rows: Tensor) -> Tensor:
        """Rows of the encoded steps, from those of all steps."""
        steps = rows.unflatten(0, (len(self.chunk_of_step[video]), -1))
        return steps[upload([not repeats for repeats in self.repeated_steps[video]], rows.device)].flatten(0, 1)

    @property
    def repeated_steps(self) -> tuple[tuple[bool, ...], ...]:
        """Per video and step: it was not encoded."""
        return tuple(
            tuple(t > 0 and number == steps[t - 1] for t, number in enumerate(steps)) for steps in self.chunk_of_step
        )


@dataclass
class ChunkedFeatures:
    """Features and signals of the chunks of a call, written into one tensor per video, so nothing is held twice.

    Attributes
    ----------
    chunk_plan : ChunkPlan
        The chunks.
    rows : dict
        Video -> features.
    levels : list of dict
        The same of each deepstack level.
    signals : dict
        Signal layer -> name -> video -> signal.
    projects : bool
        ``rows`` come from before the projector.
    """

    chunk_plan: ChunkPlan
    rows: dict[int, Tensor] = field(default_factory=dict)
    levels: list[dict[int, Tensor]] = field(default_factory=list)
    signals: dict[int, dict[str, dict[int, Tensor]]] = field(default_factory=dict)
    projects: bool = False

    def add(self, adapter: Adapter, chunk: Chunk, context: EncodeContext, output: Any) -> None:
        """Add the result of ``chunk``. Rows after the steps of a video come from its last chunk."""
        self.projects = context.recorded.unprojected_rows is not None
        if context.recorded.unprojected_rows is None:
            spans = adapter.spans(output, context.encoding)
        else:
            spans = adapter.unpack_to_spans(context.recorded.unprojected_rows, context.encoding)
        num_step_rows = int((adapter.parts(context.encoding, [len(spans[0])])[0] >= 0).sum())
        self._write(self.rows, chunk, spans[0], num_step_rows)
        levels = [list(level) for level in getattr(output, "deepstack_features", None) or ()]
        self.levels = self.levels or [{} for _ in levels]
        for level, level_rows in zip(self.levels, levels, strict=True):
            self._write(level, chunk, level_rows[0], num_step_rows)
        for layer, signals in context.recorded.signals.items():
            for name, spans in signals.items():
                self._write(self.signals.setdefault(layer, {}).setdefault(name, {}), chunk, spans[0], num_step_rows)

    def concatenate(self) -> tuple[list[Tensor], list[tuple[Tensor, ...]], dict[int, dict[str, list[Tensor]]]]:
        """Rows, levels and signals of every video."""
        signals = {
            layer: {name: list(by_video.values()) for name, by_video in named.items()}
            for layer, named in self.signals.items()
        }
        return list(self.rows.values()), [tuple(level.values()) for level in self.levels], signals

    def _write(self, by_video: dict[int, Tensor], chunk: Chunk, chunk_rows: Tensor, num_step_rows: int) -> None:
        """Write the rows of a chunk; its first ``num_step_rows`` rows belong to its steps."""
        numbers = self.chunk_plan.chunk_of_step[chunk.video]
        rows_per_step = num_step_rows // len(chunk.steps)
        num_content = rows_per_step * len(numbers)
        if chunk.video not in by_video:
            by_video[chunk.video] = chunk_rows.new_empty(
                num_content + len(chunk_rows) - num_step_rows, *chunk_rows.shape[1:]
            )
        video_rows = by_video[chunk.video]
        first = bisect_left(numbers, chunk.start)
        end = bisect_left(numbers, chunk.start + len(chunk.steps))
        steps = chunk_rows[:num_step_rows].unflatten(0, (-1, rows_per_step))
        for step in range(first, end):
            video_rows[step * rows_per_step : (step + 1) * rows_per_step] = steps[numbers[step] - chunk.start]
        if chunk.last:
            video_rows[num_content:] = chunk_rows[num_step_rows:]
