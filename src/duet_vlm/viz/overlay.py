"""Panels side by side: the image, what V2V made of it, and which tokens are left after each drop inside the decoder."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from duet_vlm.pictures import rgb
from duet_vlm.tokens import SpanTrace, StageTrace

Color = tuple[int, int, int]

PAPER: Color = (250, 250, 248)
INK: Color = (28, 28, 32)
FAINT: Color = (112, 112, 120)
SHADE: Color = (14, 16, 24)  # dropped patches fade into this
DROPPED = 0.82  # share of SHADE in a dropped patch
MEMBER = 0.52  # share of the group's colour in a merged patch
ANCHOR = 0.18
MARGIN, GAP, HEAD, PER_ROW = 20, 14, 46, 4


@dataclass(frozen=True)
class Panel:
    """One picture with a bold line and a faint line above it."""

    title: str
    note: str
    picture: Image.Image


def palette(count: int) -> list[Color]:
    """``count`` strong colours, far apart for neighbours (golden-angle hues, three brightnesses)."""
    out: list[Color] = []
    for i in range(count):
        r, g, b = colorsys.hsv_to_rgb((0.58 + i * 0.61803399) % 1.0, (0.85, 0.6, 0.95)[i % 3], (1.0, 0.95, 0.8)[i % 3])
        out.append((round(r * 255), round(g * 255), round(b * 255)))
    return out


def draw(image: Image.Image, trace: SpanTrace, *, title: str = "", size: int = 352) -> Image.Image:
    """The history of one image as a picture.

    Parameters
    ----------
    image : PIL.Image.Image
        The image as the model sees it (``duet_vlm.viz.seen``); it is stretched to the token grid.
    trace : SpanTrace
        From ``handle.trace``: one entry per sample and image.
    title : str
        A line above the panels.
    size : int
        Longer side of a panel in pixels, rounded to whole patches.

    Returns
    -------
    PIL.Image.Image
        RGB. First panel: the image. Then one per stage, that of a reduced tower in front: kept patches are clear, merged ones tinted in the
        colour of their group with the anchor outlined, dropped ones dark.

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
    panels = [Panel("image", f"{trace.span.tokens} visual tokens", base)]
    if trace.tower is not None:
        through = SpanTrace(trace.span, {}, (trace.tower,))
        panels.append(_panel(base, through, 0, cell))
    panels += [_panel(base, trace, number, cell) for number in range(len(trace.stages))]
    return _sheet(panels, title, bool(trace.merged))


def cell_box(trace: SpanTrace, token: int, cell: int) -> tuple[int, int, int, int] | None:
    """Pixels (left, top, right, bottom) of a token within a panel; None for rows outside the grid (a CLS row in front)."""
    assert trace.span.grid is not None
    rows, columns = trace.span.grid
    place = token - (trace.span.tokens - rows * columns)
    if place < 0:
        return None
    top, left = divmod(place, columns)
    return left * cell, top * cell, (left + 1) * cell, (top + 1) * cell


def _panel(base: Image.Image, trace: SpanTrace, number: int, cell: int) -> Panel:
    stage = trace.stages[number]
    colors = dict(zip(sorted(trace.merged), palette(len(trace.merged)), strict=True))
    pixels = np.asarray(base, np.float32)
    out = _mix(pixels, SHADE, DROPPED)

    def paint(token: int, source: np.ndarray) -> None:
        box = cell_box(trace, token, cell)
        if box is not None:
            left, top, right, bottom = box
            out[top:bottom, left:right] = source[top:bottom, left:right]

    for token in stage.kept:
        paint(token, pixels)
    for anchor, color in colors.items():
        if number and anchor not in stage.kept:
            continue
        paint(anchor, _mix(pixels, color, ANCHOR))
        if number == 0:
            tinted = _mix(pixels, color, MEMBER)
            for member in trace.merged[anchor]:
                if member not in stage.kept:
                    paint(member, tinted)
    picture = Image.fromarray(np.rint(out).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for anchor, color in colors.items():
        box = cell_box(trace, anchor, cell)
        if box is not None and anchor in stage.kept:
            _outline(pen, box, color, max(2, cell // 8))
    return Panel(*_words(trace, stage, number), picture)


def _words(trace: SpanTrace, stage: StageTrace, number: int) -> tuple[str, str]:
    alive = len(stage.kept)
    if number:
        merged = len({member for group in stage.merged.values() for member in group})
        into = f", {merged} merged into {len(stage.merged)} of them" if merged else ""
        return f"from layer {stage.layer}: {alive} tokens", f"{alive} kept{into}, {len(stage.dropped)} dropped here"
    if stage.layer < 0:
        return f"vision tower: {alive} tokens", f"{alive} go through it, {len(stage.dropped)} do not"
    members = len({member for group in trace.merged.values() for member in group})
    anchors = len(trace.merged)
    groups = f", {anchors} of them merged with {members} others" if anchors else ""
    return f"entry: {alive} tokens", f"{alive} kept{groups}, {len(stage.dropped)} dropped"


def _mix(pixels: np.ndarray, color: Color, share: float) -> np.ndarray:
    return pixels * (1 - share) + np.asarray(color, np.float32) * share


def _outline(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], color: Color, width: int) -> None:
    left, top, right, bottom = box
    pen.rectangle((left, top, right - 1, bottom - 1), outline=color, width=width)
    pen.rectangle((left + width, top + width, right - 1 - width, bottom - 1 - width), outline=SHADE)  # stands out on bright images too


def _sheet(panels: list[Panel], title: str, merges: bool) -> Image.Image:
    bold, small = ImageFont.load_default(17), ImageFont.load_default(13)
    wide, tall = panels[0].picture.size
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    column = max(wide, *(round(ruler.textlength(text, font)) for p in panels for text, font in ((p.title, bold), (p.note, small))))
    across = min(len(panels), PER_ROW)
    down = -(-len(panels) // across)
    above = MARGIN + (34 if title else 0)
    width = max(2 * MARGIN + across * column + (across - 1) * GAP, 2 * MARGIN + round(ruler.textlength(title, bold)))
    sheet = Image.new("RGB", (width, above + down * (HEAD + tall + GAP) + 30), PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((MARGIN, MARGIN), title, INK, ImageFont.load_default(19))
    for number, panel in enumerate(panels):
        row, place = divmod(number, across)
        x, y = MARGIN + place * (column + GAP), above + row * (HEAD + tall + GAP)
        pen.text((x, y), panel.title, INK, bold)
        pen.text((x, y + 23), panel.note, FAINT, small)
        sheet.paste(panel.picture, (x, y + HEAD))
    _legend(sheet, pen, merges, above + down * (HEAD + tall + GAP) + 2)
    return sheet


def _legend(sheet: Image.Image, pen: ImageDraw.ImageDraw, merges: bool, y: int) -> None:
    font, x, clear = ImageFont.load_default(13), MARGIN, (214, 208, 196)
    blue, orange = (64, 140, 255), (255, 150, 60)
    items: list[tuple[str, Color, Color | None]] = [("kept", clear, None)]
    if merges:
        items += [("merged: one colour per group", _blend(clear, orange), None), ("anchor the group is merged into", clear, blue)]
    items.append(("dropped", _blend(clear, SHADE, DROPPED), None))
    for text, fill, border in items:
        pen.rectangle((x, y, x + 13, y + 13), fill=fill, outline=border or (150, 150, 150), width=3 if border else 1)
        pen.text((x + 20, y - 1), text, INK, font)
        x += 20 + round(pen.textlength(text, font)) + 26


def _blend(first: Color, second: Color, share: float = MEMBER) -> Color:
    r, g, b = (round(a * (1 - share) + b * share) for a, b in zip(first, second, strict=True))
    return r, g, b
