"""One image at one depth of the model: the kept, the merged and the dropped patches there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from duet_vlm.inputs.images import rgb
from duet_vlm.planning.tokens import SpanTrace
from duet_vlm.viz.colors import group
from duet_vlm.viz.merges import numbered, stage_name, stages
from duet_vlm.viz.overlay import (
    ANCHOR,
    ASLEEP,
    DROPPED,
    MEMBER,
    NIGHT,
    NUMBERED,
    SHADE,
    Panel,
    cell_box,
    heat_map,
    mix,
    number_patch,
    outline,
)


@dataclass(frozen=True)
class TokenFates:
    """The tokens of a span at one depth, each in one of four groups.

    ``alive``: kept tokens. ``asleep``: those that a layer leaves out and that may come back (re-entry). ``into``: merged tokens, with the kept tokens that they are merged into. ``dropped``:
    dropped tokens, with the layer before which they are dropped (-1: in the vision tower). Tokens merged into a dropped
    token are dropped with it.
    """

    alive: frozenset[int]
    into: dict[int, tuple[int, ...]]
    dropped: dict[int, int]
    asleep: frozenset[int] = frozenset()


def token_fates(trace: SpanTrace, layer: int) -> TokenFates:
    """The fate of every token of a span at the input of decoder layer ``layer``; -1 is the vision tower, 0 the entry to
    the decoder.

    Raises
    ------
    ValueError
        If ``layer`` is below -1.
    """
    if layer < -1:
        raise ValueError(
            f"layer {layer}: give -1 (the vision tower), 0 (the entry to the decoder) or the number of a layer"
        )
    alive, asleep = frozenset(range(trace.span.tokens)), frozenset[int]()
    joined: dict[int, list[int]] = {}
    dropped: dict[int, int] = {}
    for stage, merged in stages(trace):
        if stage.layer > layer:
            break
        alive, asleep = frozenset(stage.kept), frozenset(stage.asleep)
        dropped |= dict.fromkeys(stage.dropped, stage.layer)
        for anchor, members in merged.items():
            for member in members:
                if member not in alive | asleep:
                    joined.setdefault(member, []).append(anchor)
    into = {}
    for member in joined:
        ends = _ends(member, joined)
        if staying := tuple(sorted(ends & (alive | asleep))):
            into[member] = staying
        else:
            dropped[member] = max(dropped[end] for end in ends)
    return TokenFates(alive, into, dropped, asleep)


def history(trace: SpanTrace, token: int, layer: int, steps: int = 1) -> str:
    """The fate of one token up to a layer, in a sentence; for a video whose grid holds ``steps`` time steps below each
    other, with its step."""
    fates, name = token_fates(trace, layer), _place(trace, token, steps)
    if token in fates.alive:
        members = sum(token in anchors for anchors in fates.into.values())
        joined = f" and stands for {members} others that were merged into it" if members else ""
        return f"{name} is alive{joined}"
    if token in fates.asleep:
        return f"{name} is asleep"
    if token in fates.into:
        groups, anchors = numbered(trace), fates.into[token]
        whom = " and ".join(
            f"{_place(trace, anchor, steps).lower()} (group {groups[anchor] + 1})" for anchor in anchors
        )
        return f"{name} is merged into {whom}"
    return f"{name} was dropped {stage_name(fates.dropped[token])}"


def told(traces: Sequence[SpanTrace], layer: int) -> tuple[str, str]:
    """Numbers of tokens at a layer: alive, and in a second line merged, asleep and dropped; of several spans
    together."""
    fates = [token_fates(trace, layer) for trace in traces]
    left = [where for each in fates for where in each.dropped.values()]
    into, groups = (
        sum(len(each.into) for each in fates),
        sum(len({end for ends in each.into.values() for end in ends}) for each in fates),
    )
    alive, tokens = sum(len(each.alive) for each in fates), sum(trace.span.tokens for trace in traces)
    merged = f"{into} merged into {groups} of them, " if into else ""
    asleep = sum(len(each.asleep) for each in fates)
    merged += f"{asleep} asleep, " if asleep else ""
    here = left.count(layer)
    gone = f"{len(left)} dropped" + (f", {here} of them here" if 0 < here < len(left) else "")
    where = stage_name(layer).replace("in front of", "at")
    return f"{where}: {alive} of {tokens} alive", merged + gone


def at_depth(
    image: Image.Image,
    trace: SpanTrace,
    layer: int,
    scores: Sequence[Mapping[int, float] | None] = (),
    *,
    size: int = 352,
) -> Panel:
    """One image at one depth as a picture.

    Parameters
    ----------
    image : PIL.Image.Image
        As the model sees it (``model_view``); it is stretched to the token grid.
    trace : SpanTrace
        From ``handle.trace``.
    layer : int
        As in ``token_fates``.
    scores : sequence of (mapping or None)
        As for ``draw``. The heat map is that of the last decision before ``layer``.
    size : int
        Longer side in pixels, rounded to whole patches.

    Returns
    -------
    Panel
        Kept patches are clear; merged ones are tinted and numbered by the group of the patch that they are merged into,
        which is outlined; sleeping ones are blue, dropped ones dark. ``scores`` is None where no score decided.

    Raises
    ------
    ValueError
        If the span has no token grid, or the layer is below -1.
    """
    if trace.span.grid is None:
        raise ValueError(f"the {trace.span.tokens} tokens of this image form no grid, so they cannot be drawn on it")
    fates, groups = token_fates(trace, layer), numbered(trace)
    rows, columns = trace.span.grid
    cell = max(4, round(size / max(rows, columns)))
    pixels = np.asarray(rgb(image).resize((columns * cell, rows * cell), Image.Resampling.LANCZOS), np.float32)
    out = mix(pixels, SHADE, DROPPED)
    anchors = {anchor for ends in fates.into.values() for anchor in ends}
    shares = [(token, group(groups[token]), ANCHOR) for token in anchors] + [
        (m, group(groups[ends[0]]), MEMBER) for m, ends in fates.into.items()
    ]
    shares += [(token, NIGHT, ASLEEP) for token in fates.asleep]
    for token in fates.alive - anchors:
        _paint(out, pixels, cell_box(trace, token, cell))
    for token, color, share in shares:
        _paint(out, mix(pixels, color, share), cell_box(trace, token, cell))
    picture = Image.fromarray(np.rint(out).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for token in anchors:
        if (box := cell_box(trace, token, cell)) is not None:
            outline(pen, box, group(groups[token]), max(2, cell // 8))
    if cell >= NUMBERED:
        for token in (*anchors, *fates.into):
            number_patch(
                pen, cell_box(trace, token, cell), groups[token if token in anchors else fates.into[token][0]] + 1, cell
            )
    decided = [number for number, stage in enumerate(trace.stages) if stage.layer <= layer]
    shown = scores[decided[-1]] if decided and decided[-1] < len(scores) else None
    return Panel(*told([trace], layer), picture, heat_map(pixels, trace, shown, cell) if shown else None)


def _ends(member: int, joined: Mapping[int, list[int]]) -> set[int]:
    """The tokens at the end of the chain of merges of a token."""
    return {end for anchor in joined[member] for end in (_ends(anchor, joined) if anchor in joined else {anchor})}


def _paint(out: np.ndarray, source: np.ndarray, box: tuple[int, int, int, int] | None) -> None:
    if box is not None:
        left, top, right, bottom = box
        out[top:bottom, left:right] = source[top:bottom, left:right]


def _place(trace: SpanTrace, token: int, steps: int) -> str:
    rows, columns = trace.span.grid or (1, trace.span.tokens)
    cell = token - (trace.span.tokens - rows * columns)
    if cell < 0:
        return "A token outside the grid"
    step, row = divmod(cell // columns, rows // steps)
    where = f"row {row + 1}, column {cell % columns + 1}"
    return f"Step {step + 1}, {where}" if steps > 1 else where.capitalize()
