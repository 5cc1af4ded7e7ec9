"""A clip in pieces: its frames go through the encoder some at a time, so that what the tower needs depends on the piece and not on the clip.

What is chosen from is the same as in one piece: rows and signals of all frames, put together again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from duet_vlm.flow import compat
from duet_vlm.flow.call import EncoderCall
from duet_vlm.models.adapter import Adapter, Encoding, Piece
from duet_vlm.reducer import Reducer

SHARE = 0.25  # of the free memory of an accelerator, for what the tower makes of one piece


def check_pieces(adapter: Adapter, reducer: Reducer, frames: int | None) -> None:
    """Refuse pieces of ``frames`` frames (None: as many as fit) that would change what is chosen, or that nothing can be cut into.

    Raises
    ------
    TypeError
        No int; a family or a method that clips cannot be cut for.
    ValueError
        Not a number of whole steps of time.
    """
    if frames is None:
        return
    if isinstance(frames, bool) or not isinstance(frames, int):
        raise TypeError(f"chunk_frames={frames!r}: a number of frames (int), or None")
    together = adapter.frames_together()
    if frames < 1 or frames % together:
        raise ValueError(f"chunk_frames={frames}: {adapter.family} looks at {together} frame(s) at once; give a multiple of that, at least one")
    if why := _whole(reducer):
        raise TypeError(f"chunk_frames={frames}: {reducer.name} {why}, so the clip goes through it in one piece; leave chunk_frames out")


def _whole(reducer: Reducer) -> str:
    """Why a method needs the frames of a clip in one call of the tower; empty where it does not."""
    if getattr(reducer, "tower", None) is not None:
        return "reduces in the tower"
    return "asks the projector" if "projector" in getattr(reducer, "reads", ()) else ""


def pieces_of(adapter: Adapter, reducer: Reducer, encoding: Encoding, pixels: Tensor, frames: int | None) -> list[Piece]:
    """The calls that one call for clips is cut into, up to ``frames`` frames each; none where it stays whole."""
    if encoding.stream != "video" or torch.is_grad_enabled():  # what gradients need is kept in any case
        return []
    if frames is None:
        free = compat.free_bytes(pixels.device)
        if free is None or _whole(reducer):
            return []
        frames = _fitting(adapter, encoding, pixels, free)
    cut = adapter.in_pieces(encoding, max(1, frames // adapter.frames_together()))
    return cut if len(cut) > 1 else []


def _fitting(adapter: Adapter, encoding: Encoding, pixels: Tensor, free: int) -> int:
    """Frames of which what a block of the tower makes, and the rows of all its layers (some towers hand them out), take a share of ``free`` bytes."""
    shape, together = adapter.vision_shape(), adapter.frames_together()
    values = shape.layers * shape.width + 10 * shape.width + 3 * shape.mlp
    rows = pixels.numel() // shape.patch_inputs / max(1, _steps(encoding, pixels))  # patches of a step
    return max(1, int(SHARE * free / (rows * values * max(2, pixels.element_size())))) * together


def _steps(encoding: Encoding, pixels: Tensor) -> int:
    return sum(time for time, *_ in encoding.sizes) if encoding.sizes else pixels.shape[0] * pixels.shape[1]


@dataclass
class Gathered:
    """Of every clip of a call: its rows, those of deeper levels, and by layer and name the signals of its rows."""

    rows: list[list[Tensor]]
    levels: list[list[list[Tensor]]] = field(default_factory=list)
    signals: dict[int, dict[str, list[list[Tensor]]]] = field(default_factory=dict)

    @classmethod
    def of(cls, clips: int) -> Gathered:
        return cls([[] for _ in range(clips)])

    def add(self, adapter: Adapter, piece: Piece, call: EncoderCall, output: Any, ends: set[int]) -> None:
        """What ``call`` made of ``piece``. Rows that stand behind the frames of a clip are taken from the piece that ``ends`` it."""
        rows = adapter.spans(output, piece.encoding) if call.unprojected is None else adapter.arranged(call.unprojected, piece.encoding)
        shown = [numbers >= 0 for numbers in adapter.parts(piece.encoding, [len(some) for some in rows])]
        levels = [list(level) for level in getattr(output, "deepstack_features", None) or ()]
        self.levels = self.levels or [[[] for _ in self.rows] for _ in levels]
        for place, clip in enumerate(piece.clips):
            whole = clip in ends or bool(shown[place].all())

            def some(x: Tensor, whole: bool = whole, mask: Tensor = shown[place]) -> Tensor:
                return x if whole else x[mask.to(x.device)]

            self.rows[clip].append(some(rows[place]))
            for level, made in zip(self.levels, levels, strict=True):
                level[clip].append(some(made[place]))
            for layer, signals in call.signals.items():
                for name, of_clips in signals.items():
                    into = self.signals.setdefault(layer, {}).setdefault(name, [[] for _ in self.rows])
                    into[clip].append(some(of_clips[place]))

    def joined(self) -> tuple[list[Tensor], list[tuple[Tensor, ...]], dict[int, dict[str, list[Tensor]]]]:
        """Rows, levels and signals by clip."""
        signals = {layer: {name: list(map(torch.cat, some)) for name, some in made.items()} for layer, made in self.signals.items()}
        return list(map(torch.cat, self.rows)), [tuple(map(torch.cat, level)) for level in self.levels], signals
