"""Pictures: known colours at known patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from duet_vlm import Span, SpanTrace, StageTrace
from duet_vlm.viz import draw, seen
from duet_vlm.viz.overlay import DROPPED, GAP, HEAD, MARGIN, SHADE, palette

CELL = 20
GREY = (120, 120, 120)
DARK = tuple(round(g * (1 - DROPPED) + s * DROPPED) for g, s in zip(GREY, SHADE, strict=True))


def trace(rows: int = 2, columns: int = 3, extra: int = 0) -> SpanTrace:
    """Tokens 0, 1, 2 enter; 3 is merged into 1; 4 and 5 are dropped; then only 1 stays."""
    stages = (
        StageTrace(0, tuple(t + extra for t in (0, 1, 2)), tuple(t + extra for t in (4, 5))),
        StageTrace(4, (1 + extra,), (extra, 2 + extra)),
    )
    return SpanTrace(Span(0, 0, rows * columns + extra, (rows, columns)), {1 + extra: (3 + extra,)}, stages)


def panels(sheet: Image.Image, count: int, wide: int, tall: int) -> list[np.ndarray]:
    """Pixels of each panel, found by their even spacing from the right margin."""
    pixels = np.asarray(sheet)
    column = (sheet.width - 2 * MARGIN - (count - 1) * GAP) // count
    lefts = [MARGIN + i * (column + GAP) for i in range(count)]
    return [pixels[MARGIN + HEAD : MARGIN + HEAD + tall, left : left + wide] for left in lefts]


def centre(panel: np.ndarray, token: int, columns: int = 3) -> tuple[int, ...]:
    row, column = divmod(token, columns)
    return tuple(panel[row * CELL + CELL // 2, column * CELL + CELL // 2].tolist())


@pytest.mark.parametrize("extra", [0, 1])
def test_kept_merged_and_dropped_patches(extra: int) -> None:
    sheet = draw(Image.new("RGB", (90, 60), GREY), trace(extra=extra), size=3 * CELL)
    image, entry, later = panels(sheet, 3, 3 * CELL, 2 * CELL)
    assert all(centre(image, t) == GREY for t in range(6))
    (color,) = palette(1)
    assert centre(entry, 0) == centre(entry, 2) == GREY
    assert centre(entry, 4) == centre(entry, 5) == DARK
    member, anchor = np.array(centre(entry, 3)), np.array(centre(entry, 1))
    away = np.abs(np.array(color) - np.array(GREY)).sum()
    assert np.abs(member - color).sum() < 0.6 * away  # clearly the group's colour
    assert 0 < np.abs(anchor - GREY).sum() < 0.3 * away  # a hint of it
    assert tuple(entry[0, CELL]) == tuple(entry[CELL - 1, 2 * CELL - 1]) == color  # the anchor's outline
    assert tuple(later[0, CELL]) == color
    assert [centre(later, t) == DARK for t in range(6)] == [True, False, True, True, True, True]


def test_anchor_loses_its_outline_when_it_is_dropped() -> None:
    gone = SpanTrace(trace().span, trace().merged, (trace().stages[0], StageTrace(4, (0,), (1, 2))))
    _, _, later = panels(draw(Image.new("RGB", (90, 60), GREY), gone, size=3 * CELL), 3, 3 * CELL, 2 * CELL)
    assert centre(later, 1) == DARK and tuple(later[0, CELL]) == DARK


def test_many_stages_wrap_and_no_grid_is_an_error() -> None:
    stages = tuple(StageTrace(i, (0,), ()) for i in range(6))
    span = Span(0, 0, 6, (2, 3))
    tall = draw(Image.new("RGB", (3, 2)), SpanTrace(span, {}, stages), title="title")
    short = draw(Image.new("RGB", (3, 2)), SpanTrace(span, {}, stages[:2]), title="title")
    assert tall.height > 1.5 * short.height
    with pytest.raises(ValueError, match="no grid"):
        draw(Image.new("RGB", (3, 2)), SpanTrace(Span(0, 0, 7), {}, stages))


def test_palette_has_no_twins() -> None:
    assert len(set(palette(40))) == 40


def test_seen_is_the_centre_that_the_processor_cut_out() -> None:
    from duet_vlm import tiny

    _, processor = tiny.load()
    wide = Image.new("RGB", (672, 224), (200, 30, 30))
    wide.paste((20, 180, 40), (224, 0, 448, 224))
    pixels = processor.image_processor(wide, return_tensors="pt")["pixel_values"][0]
    view = np.asarray(seen(wide, pixels, processor)).astype(int)
    assert view.shape == (224, 224, 3)
    assert np.abs(view - (20, 180, 40)).max(-1).mean() < 6
    assert seen(wide, torch.zeros(4, 8), processor).size == wide.size
