"""Panels side by side: the image, the result of the encoder stage, and of each stage inside the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from duet_vlm.inputs.images import rgb
from duet_vlm.planning.tokens import SpanTrace, StageTrace
from duet_vlm.viz.colors import Color, group, heat
from duet_vlm.viz.font import fitted, width, write
from duet_vlm.viz.merges import numbered, origins, stages

PAPER: Color = (250, 250, 248)
INK: Color = (28, 28, 32)
FAINT: Color = (112, 112, 120)
SHADE: Color = (14, 16, 24)  # dropped patches fade into this
DROPPED = 0.82  # share of SHADE in a dropped patch
NIGHT: Color = (52, 74, 168)  # sleeping patches fade into this
ASLEEP = 0.7  # share of NIGHT in a sleeping patch
MEMBER = 0.52  # share of the group's colour in a merged patch
EVERYWHERE: Color = (150, 150, 158)  # in place of the colour, where every group holds the patch
ANCHOR = 0.18
SCORE = 0.62  # share of the heat scale's colour in a patch that was ranked
MARGIN, GAP, HEAD, PER_ROW = 20, 14, 46, 4
NUMBERED = 11  # pixels of a patch that has room for the number of its group
TITLE, BOLD, SMALL = 19, 17, 13  # sizes of text


@dataclass(frozen=True)
class Panel:
    """One picture with a large line and a faint line above it, and the scores that decided, where there were any, below
    it."""

    title: str
    note: str
    picture: Image.Image
    scores: Image.Image | None = None


def draw(
    image: Image.Image,
    trace: SpanTrace,
    *,
    title: str = "",
    lines: Sequence[str] = (),
    scores: Sequence[Mapping[int, float] | None] = (),
    size: int = 352,
    shows: str = "image",
) -> Image.Image:
    """The history of one image as a picture.

    Parameters
    ----------
    image : PIL.Image.Image
        The image as the model sees it (``duet_vlm.viz.model_view``); it is stretched to the token grid.
    trace : SpanTrace
        From ``handle.trace``: one entry per sample and image.
    title : str
        A line above the panels.
    lines : sequence of str
        Smaller lines below it: the prompt, the answers of the full and the reduced model. Any script that a font on
        this machine has.
    scores : sequence of (mapping or None)
        Of each stage of ``trace.stages``, the score of each token that was ranked there
        (``duet_vlm.viz.ScoreRecorder``): a heat map below the stage, coloured by rank.
    size : int
        Longer side of a panel in pixels, rounded to whole patches.
    shows : str
        Title of the first panel.

    Returns
    -------
    PIL.Image.Image
        RGB. First panel: the image. Then one per stage, beginning with a reduced tower: kept patches are clear, dropped
        ones dark, sleeping ones blue, those merged there tinted in the colour of their group and numbered. The patch
        that they are merged into is outlined and keeps its number in later panels. A line below the legend says at which
        stage each group began.

    Raises
    ------
    ValueError
        If the span has no token grid.
    """
    if trace.span.grid is None:
        raise ValueError(f"the {trace.span.tokens} tokens of this image form no grid, so they cannot be drawn on it")
    rows, columns = trace.span.grid
    cell = max(4, round(size / max(rows, columns)))
    base = rgb(image).resize((columns * cell, rows * cell), Image.Resampling.LANCZOS)
    panels = [Panel(shows, f"{trace.span.tokens} visual tokens", base)]
    if trace.tower is not None:
        through = SpanTrace(trace.span, {}, (trace.tower,))
        panels.append(_panel(base, through, 0, cell))
    shown = [*scores, *[None] * len(trace.stages)]
    panels += [_panel(base, trace, number, cell, shown[number]) for number in range(len(trace.stages))]
    return _sheet(panels, title, lines, origins(trace), asleep=any(stage.asleep for stage in trace.stages))


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other, as wide as the widest."""
    out = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), PAPER)
    top = 0
    for sheet in sheets:
        out.paste(sheet, (0, top))
        top += sheet.height
    return out


def cell_box(trace: SpanTrace, token: int, cell: int) -> tuple[int, int, int, int] | None:
    """Pixels (left, top, right, bottom) of a token within a panel; None for tokens outside the grid (CLS first)."""
    assert trace.span.grid is not None
    rows, columns = trace.span.grid
    number = token - (trace.span.tokens - rows * columns)
    if number < 0:
        return None
    top, left = divmod(number, columns)
    return left * cell, top * cell, (left + 1) * cell, (top + 1) * cell


def _panel(
    base: Image.Image, trace: SpanTrace, number: int, cell: int, scores: Mapping[int, float] | None = None
) -> Panel:
    stage = trace.stages[number]
    reached = [merged for _, merged in stages(trace)][: number + 1 + (trace.tower is not None)]
    merged, kept, begun, numbers = reached[-1], set(stage.kept), set().union(*reached), numbered(trace)
    anchors = [anchor for anchor in numbers if anchor in begun and (anchor in kept or anchor in merged)]
    everywhere = set.intersection(*map(set, merged.values())) if len(merged) > 1 else set()  # of no one group
    members = [(member, anchor) for anchor, joined in merged.items() for member in joined if member not in kept]
    pixels = np.asarray(base, np.float32)
    out = mix(pixels, SHADE, DROPPED)

    def paint(token: int, source: np.ndarray) -> None:
        box = cell_box(trace, token, cell)
        if box is not None:
            left, top, right, bottom = box
            out[top:bottom, left:right] = source[top:bottom, left:right]

    tints = {anchor: mix(pixels, group(numbers[anchor]), MEMBER) for anchor in merged} | {
        None: mix(pixels, EVERYWHERE, MEMBER)
    }
    for token in kept:
        paint(token, pixels)
    for token in stage.asleep:
        paint(token, mix(pixels, NIGHT, ASLEEP))
    for anchor in anchors:
        paint(anchor, mix(pixels, group(numbers[anchor]), ANCHOR))
    for member, anchor in members:
        paint(member, tints[None if member in everywhere else anchor])
    picture = Image.fromarray(np.rint(out).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for anchor in anchors:
        box = cell_box(trace, anchor, cell)
        if box is not None and anchor in kept:
            outline(pen, box, group(numbers[anchor]), max(2, cell // 8))
    if cell >= NUMBERED:
        labels = [(anchor, anchor) for anchor in anchors] + [pair for pair in members if pair[0] not in everywhere]
        for token, anchor in labels:
            number_patch(pen, cell_box(trace, token, cell), numbers[anchor] + 1, cell)
    return Panel(*_words(trace, stage, number), picture, None if not scores else heat_map(pixels, trace, scores, cell))


def number_patch(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int] | None, number: int, cell: int) -> None:
    """The number of a group in the corner of its patch, readable on light and dark."""
    if box is not None:
        pen.text(
            (box[0] + 2, box[1] + 1),
            str(number),
            (255, 255, 255),
            font_size=max(7, cell // 2),
            stroke_width=1,
            stroke_fill=SHADE,
        )


def heat_map(pixels: np.ndarray, trace: SpanTrace, scores: Mapping[int, float], cell: int) -> Image.Image:
    """Ranked patches in the colour of their rank (equal scores share one), the others dark."""
    out = mix(pixels, SHADE, DROPPED)
    grey = np.repeat(pixels.mean(-1, keepdims=True), 3, -1)
    values = sorted(scores.values())
    for token, score in scores.items():
        box = cell_box(trace, token, cell)
        if box is not None:
            left, top, right, bottom = box
            rank = (np.searchsorted(values, score, "left") + np.searchsorted(values, score, "right") - 1) / 2
            color = heat(rank / max(1, len(values) - 1))
            out[top:bottom, left:right] = mix(grey[top:bottom, left:right], color, SCORE)
    return Image.fromarray(np.rint(out).astype(np.uint8))


def _words(trace: SpanTrace, stage: StageTrace, number: int) -> tuple[str, str]:
    alive = len(stage.kept)
    if number:
        merged = len({member for group in stage.merged.values() for member in group})
        into = f", {merged} merged into {len(stage.merged)} of them" if merged else ""
        left = f"{len(stage.asleep)} asleep" if stage.asleep else f"{len(stage.dropped)} dropped here"
        return f"from layer {stage.layer}: {alive} tokens", f"{alive} kept{into}, {left}"
    if stage.layer < 0:
        return f"vision tower: {alive} tokens", f"{alive} go through it, {len(stage.dropped)} do not"
    members = len({member for group in trace.merged.values() for member in group})
    anchors = len(trace.merged)
    groups = f", {anchors} of them merged with {members} others" if anchors else ""
    return f"entry: {alive} tokens", f"{alive} kept{groups}, {len(stage.dropped)} dropped"


def mix(pixels: np.ndarray, color: Color, share: float) -> np.ndarray:
    """Pixels with a share of a colour in them, as floats."""
    return pixels * (1 - share) + np.asarray(color, np.float32) * share


def outline(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], color: Color, width: int) -> None:
    """A frame inside a patch, in a colour and a dark line within."""
    left, top, right, bottom = box
    pen.rectangle((left, top, right - 1, bottom - 1), outline=color, width=width)
    # stands out on bright images too
    pen.rectangle((left + width, top + width, right - 1 - width, bottom - 1 - width), outline=SHADE)


def _sheet(panels: list[Panel], title: str, lines: Sequence[str], merging: str, asleep: bool) -> Image.Image:
    wide, tall = panels[0].picture.size
    column = max(wide, *(width(text, size) for p in panels for text, size in ((p.title, BOLD), (p.note, SMALL))))
    across = min(len(panels), PER_ROW)
    down = -(-len(panels) // across)
    scored = any(panel.scores is not None for panel in panels)
    each = HEAD + tall + GAP + (tall + GAP if scored else 0)
    across_all = max(across * column + (across - 1) * GAP, 2 * wide)
    heads = [(line, TITLE, 8) for line in fitted(title, TITLE, across_all)]
    heads += [(line, BOLD, 6) for text in lines for line in fitted(text, BOLD, across_all)]
    above = MARGIN + (sum(size + room for _, size, room in heads) + 7 if heads else 0)
    below = fitted(merging, SMALL, across_all) if merging else []
    sheet = Image.new("RGB", (2 * MARGIN + across_all, above + down * each + 30 + 20 * len(below)), PAPER)
    pen, y = ImageDraw.Draw(sheet), MARGIN
    for line, size, room in heads:
        write(pen, (MARGIN, y), line, size, INK)
        y += size + room
    for number, panel in enumerate(panels):
        row, index = divmod(number, across)
        x, y = MARGIN + index * (column + GAP), above + row * each
        write(pen, (x, y), panel.title, BOLD, INK)
        write(pen, (x, y + 23), panel.note, SMALL, FAINT)
        sheet.paste(panel.picture, (x, y + HEAD))
        if panel.scores is not None:
            sheet.paste(panel.scores, (x, y + HEAD + tall + GAP))
    _legend(pen, bool(below), asleep, scored, above + down * each + 2)
    for number, line in enumerate(below):
        write(pen, (MARGIN, above + down * each + 21 + 20 * number), line, SMALL, INK)
    return sheet


def _legend(pen: ImageDraw.ImageDraw, merges: bool, asleep: bool, scored: bool, y: int) -> None:
    x, clear = MARGIN, (214, 208, 196)
    items: list[tuple[str, Color, Color | None]] = [("kept", clear, None)]
    if merges:
        items += [
            ("merged: a colour and a number per group", _blend(clear, group(1)), None),
            ("what the group is merged into", clear, group(0)),
        ]
    if asleep:
        items.append(("asleep: may come back", _blend(clear, NIGHT, ASLEEP), None))
    items.append(("dropped", _blend(clear, SHADE, DROPPED), None))
    for text, fill, border in items:
        pen.rectangle((x, y, x + 13, y + 13), fill=fill, outline=border or (150, 150, 150), width=3 if border else 1)
        write(pen, (x + 20, y - 1), text, SMALL, INK)
        x += 20 + width(text, SMALL) + 26
    if scored:
        for step in range(60):
            pen.line((x + step, y, x + step, y + 13), fill=heat(step / 59))
        write(pen, (x + 67, y - 1), "score that decided, by rank", SMALL, INK)


def _blend(first: Color, second: Color, share: float = MEMBER) -> Color:
    r, g, b = (round(a * (1 - share) + b * share) for a, b in zip(first, second, strict=True))
    return r, g, b
