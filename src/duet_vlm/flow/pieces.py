"""Clips through the encoder in pieces: some frames at a time, and frames that did not change not at all.

What the tower needs then depends on the piece and not on the clip. What is chosen from is as in one piece: rows and signals of all steps of
time, put together again; a step that was not encoded has those of the one that it repeats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from duet_vlm.flow import compat
from duet_vlm.flow.call import EncoderCall
from duet_vlm.models.adapter import Adapter, Encoding
from duet_vlm.reducer import Reducer

SHARE = 0.25  # of the free memory of an accelerator, for what the tower makes of one piece


@dataclass(frozen=True)
class Pieces:
    """How clips go through the encoder: ``frames`` at a time (None: as many as fit), and which are ``still``: in no patch is the mean difference of
    pixels from the last frame that was encoded larger than that (None: all are encoded)."""

    frames: int | None = None
    still: float | None = None

    def check(self, adapter: Adapter, reducer: Reducer) -> None:
        """Refuse what would change what is chosen, or nothing can be cut for.

        Raises
        ------
        TypeError
            No numbers; a family or a method that clips cannot be cut for.
        ValueError
            Not a number of whole steps of time, or no difference.
        """
        if self.frames is None and self.still is None:
            return
        if self.frames is not None and (isinstance(self.frames, bool) or not isinstance(self.frames, int)):
            raise TypeError(f"chunk_frames={self.frames!r}: a number of frames (int), or None")
        if self.still is not None and (isinstance(self.still, bool) or not isinstance(self.still, int | float)):
            raise TypeError(f"still_frames={self.still!r}: a difference of pixel values (float), or None")
        together = adapter.frames_together()
        if self.frames is not None and (self.frames < 1 or self.frames % together):
            raise ValueError(
                f"chunk_frames={self.frames}: {adapter.family} looks at {together} frame(s) at once; give a multiple of that, at least one"
            )
        if self.still is not None and not 0 <= self.still < math.inf:
            raise ValueError(f"still_frames={self.still}: give a finite mean difference of pixel values, 0 or more")
        if why := _whole(reducer):
            name = "chunk_frames" if self.still is None else "still_frames"
            raise TypeError(f"{name}: {reducer.name} {why}, so a clip goes through it as it is; leave {name} out")

    def cut(self, adapter: Adapter, reducer: Reducer, call: Encoding, pixels: Tensor) -> Cut | None:
        """The calls that one call for clips becomes; None where it stays as it is. Reads which frames are still from the device."""
        if call.stream != "video" or torch.is_grad_enabled():  # what gradients need is kept in any case
            return None
        most = self._steps(adapter, reducer, call, pixels)
        if most is None and self.still is None:
            return None
        if self.still is None:
            moved = [[True] * count for count in _lengths(call, pixels)]
        else:
            moved = [changed(some, self.still).tolist() for some in adapter.steps(call)]
        if all(map(all, moved)) and (most is None or sum(map(len, moved)) <= most):
            return None
        shown = [[t for t, new in enumerate(some) if new] for some in moved]
        of_step = [[number - 1 for number in accumulate(some)] for some in moved]
        pieces = [
            Piece(adapter.of_steps(call, clip, some[start : start + (most or len(some))]), clip, start + (most or len(some)) >= len(some))
            for clip, some in enumerate(shown)
            for start in range(0, len(some), most or len(some))
        ]
        return Cut(pieces, of_step)

    def _steps(self, adapter: Adapter, reducer: Reducer, call: Encoding, pixels: Tensor) -> int | None:
        """Steps of time of a piece; None where all fit."""
        if self.frames is not None:
            return self.frames // adapter.frames_together()
        free = compat.free_bytes(pixels.device)
        if free is None or _whole(reducer):
            return None
        shape = adapter.vision_shape()
        values = shape.layers * shape.width + 10 * shape.width + 3 * shape.mlp  # of a row: a block's, and every layer's where they are handed out
        rows = pixels.numel() / shape.patch_inputs / max(1, sum(_lengths(call, pixels)))
        return max(1, int(SHARE * free / (rows * values * max(2, pixels.element_size()))))


def _lengths(call: Encoding, pixels: Tensor) -> list[int]:
    """Steps of time of each clip of a call."""
    return [size[0] for size in call.sizes] if call.sizes else [pixels.shape[1]] * len(pixels)


def _whole(reducer: Reducer) -> str:
    """Why a method needs the frames of a clip in one call of the tower; empty where it does not."""
    if getattr(reducer, "tower", None) is not None:
        return "reduces in the tower"
    return "asks the projector" if "projector" in getattr(reducer, "reads", ()) else ""


def changed(steps: Tensor, still: float) -> Tensor:
    """Which steps [t, n, m] differ from the last one that did in any of their n patches by more than ``still`` (mean absolute difference of its m
    values): [t] bool, the first always."""
    last, new = torch.zeros((), dtype=torch.long, device=steps.device), []
    for number, step in enumerate(steps):
        apart = (step.float() - steps.index_select(0, last[None])[0].float()).abs().mean(-1).amax()
        new.append(~(apart <= still) | (last == number))  # pixels that are no numbers are a change, for the features to be refused
        last = torch.where(new[-1], number, last)
    return torch.stack(new)


@dataclass(frozen=True)
class Piece:
    """A part of an encoder call: some steps of one ``clip``, the ``last`` ones or not."""

    encoding: Encoding
    clip: int
    last: bool


@dataclass(frozen=True)
class Cut:
    """The ``pieces`` of a call; ``of_step``: per clip, for every step the number of its rows among those that are encoded."""

    pieces: list[Piece]
    of_step: list[list[int]]

    def again(self, clip: int, rows: Tensor, behind: int = 0) -> Tensor:
        """Rows of the encoded steps of a clip, and ``behind`` more, as those of all its steps and the others."""
        numbers = self.of_step[clip]
        if numbers[-1] + 1 == len(numbers):
            return rows
        steps, rest = rows.tensor_split((len(rows) - behind,))
        steps = steps.unflatten(0, (numbers[-1] + 1, -1))[torch.tensor(numbers, device=rows.device)]
        return torch.cat([steps.flatten(0, 1), rest])

    def once(self, clip: int, rows: Tensor) -> Tensor:
        """Of rows of all steps those of the encoded ones."""
        steps = rows.unflatten(0, (len(self.of_step[clip]), -1))
        return steps[torch.tensor([not repeats for repeats in self.repeated[clip]], device=rows.device)].flatten(0, 1)

    @property
    def repeated(self) -> tuple[tuple[bool, ...], ...]:
        """Per clip, which steps were not encoded."""
        return tuple(tuple(t > 0 and number == steps[t - 1] for t, number in enumerate(steps)) for steps in self.of_step)


@dataclass
class Gathered:
    """What the pieces of a call made, by clip: rows, those of deeper levels, and by layer and name the signals of its rows."""

    cut: Cut
    rows: dict[int, list[Tensor]] = field(default_factory=dict)
    levels: list[dict[int, list[Tensor]]] = field(default_factory=list)
    signals: dict[int, dict[str, dict[int, list[Tensor]]]] = field(default_factory=dict)
    behind: dict[int, int] = field(default_factory=dict)  # rows behind the steps of a clip

    def add(self, adapter: Adapter, piece: Piece, call: EncoderCall, output: Any) -> None:
        """What ``call`` made of ``piece``. Rows behind the steps of a clip are taken from its last one."""
        spans = adapter.spans(output, piece.encoding) if call.unprojected is None else adapter.arranged(call.unprojected, piece.encoding)
        shows = int((adapter.parts(piece.encoding, [len(spans[0])])[0] >= 0).sum())
        count = len(spans[0]) if piece.last else shows
        self.behind[piece.clip] = len(spans[0]) - shows

        def put(into: dict[int, list[Tensor]], made: Tensor) -> None:
            into.setdefault(piece.clip, []).append(made[:count])

        put(self.rows, spans[0])
        levels = [list(level) for level in getattr(output, "deepstack_features", None) or ()]
        self.levels = self.levels or [{} for _ in levels]
        for level, made in zip(self.levels, levels, strict=True):
            put(level, made[0])
        for layer, signals in call.signals.items():
            for name, spans in signals.items():
                put(self.signals.setdefault(layer, {}).setdefault(name, {}), spans[0])

    def joined(self) -> tuple[list[Tensor], list[tuple[Tensor, ...]], dict[int, dict[str, list[Tensor]]]]:
        """Rows, levels and signals of every clip."""
        signals = {layer: {name: self._whole(some) for name, some in made.items()} for layer, made in self.signals.items()}
        return self._whole(self.rows), [tuple(self._whole(level)) for level in self.levels], signals

    def _whole(self, made: dict[int, list[Tensor]]) -> list[Tensor]:
        return [self.cut.again(clip, torch.cat(made[clip]), self.behind[clip]) for clip in range(len(self.cut.of_step))]
