"""Pictures: known colours at known patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from duet_vlm import Span, SpanTrace, StageTrace
from duet_vlm.palette import GROUPS, group, heat
from duet_vlm.viz import Watched, draw, font, seen, stack
from duet_vlm.viz.overlay import DROPPED, GAP, HEAD, MARGIN, SHADE

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
    color = group(0)
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


def test_groups_of_one_colour_have_numbers_of_their_own() -> None:
    """Nine groups share eight colours: the first and the last differ by what is written on them."""
    span = Span(0, 0, 18, (2, 9))
    merged = {anchor: (anchor + 9,) for anchor in range(9)}
    one = SpanTrace(span, merged, (StageTrace(0, tuple(range(9)), ()),))
    _, entry = panels(draw(Image.new("RGB", (9, 2), GREY), one, size=9 * CELL), 2, 9 * CELL, 2 * CELL)
    first, last = (entry[CELL:, place * CELL : (place + 1) * CELL] for place in (0, 8))
    assert group(0) == group(8) and len(GROUPS) == 8
    assert (first[-1] == last[-1]).all() and (first != last).any()


def test_scores_are_shown_below_by_rank() -> None:
    scores = [{0: 0.9, 1: 5.0, 2: 0.1, 4: 0.1}, None]
    sheet = draw(Image.new("RGB", (90, 60), GREY), trace(), size=3 * CELL, scores=scores)
    pixels, column = np.asarray(sheet), (sheet.width - 2 * MARGIN - 2 * GAP) // 3
    left, top = MARGIN + column + GAP, MARGIN + HEAD + 2 * CELL + GAP
    found = pixels[top : top + 2 * CELL, left : left + 3 * CELL]
    light = [int(np.dot(centre(found, token), (2, 7, 1))) for token in range(6)]
    assert light[1] > light[0] > light[2] == light[4]  # equal scores look equal
    assert centre(found, 3) == centre(found, 5) == DARK  # not ranked
    below = pixels[top : top + 2 * CELL, left + column + GAP : left + column + GAP + 3 * CELL]
    assert (below == below[0, 0]).all()  # nothing decided there


def test_heat_grows_lighter_all_the_way() -> None:
    from test_report import EYES, lab

    for eye in EYES.values():
        lightness = [lab("#" + "".join(f"{part:02x}" for part in heat(step / 40)), eye)[0] for step in range(41)]
        assert all(later > before for before, later in zip(lightness, lightness[1:], strict=False))


@pytest.mark.parametrize("eye", ["all cones", "no L", "no M", "no S"])
def test_groups_can_be_told_apart(eye: str) -> None:
    from test_report import EYES, lab

    colours = [lab(colour, EYES[eye]) for colour in GROUPS]
    assert min(float(np.linalg.norm(a - b)) for i, a in enumerate(colours) for b in colours[:i]) >= 20


def test_a_watched_method_does_what_it_did_and_shows_why() -> None:
    from duet_vlm import attach, tiny

    model, processor = tiny.load()
    item = tiny.demo_images()[0]
    inputs = processor(images=item.image, text=tiny.prompt(item.questions[0][0]), return_tensors="pt")
    for method in ("duet", "fastv", "pyramiddrop", "visionzip", "divprune", "random"):
        with attach(model, method, budget=0.22) as handle, torch.no_grad():
            plain, watched = model(**inputs).logits, Watched(handle.reducer)
            before = handle.trace[0][0]
        with attach(model, watched.reducer, budget=0.22) as handle, torch.no_grad():
            assert torch.equal(model(**inputs).logits, plain)
            span = handle.trace[0][0]
            handle.report()  # runs the method once more, on tensors without numbers
        assert span == before
        for stage, scores in zip(span.stages[1:], watched.of(span, 0)[1:], strict=True):
            if stage.kept and scores is not None:  # those that stayed outrank those that left
                assert set(scores) == {*stage.kept, *stage.dropped}
                assert min(scores[token] for token in stage.kept) >= max(scores[token] for token in stage.dropped)
        entry = watched.of(span, 0)[0]
        assert (entry is not None) == (method in ("duet", "visionzip"))
    assert entry is None


@pytest.mark.parametrize("text, family", [("Straße", "Aileron"), ("Привет", "DejaVu Sans"), ("שלום", "DejaVu Sans")])
def test_the_font_has_the_letters(text: str, family: str) -> None:
    pytest.importorskip("matplotlib")  # brings DejaVu Sans
    ((piece, found),) = font.pieces(text, 17)
    assert piece == text and found.getname()[0] == family and all(font.has(found, letter) for letter in text)


def test_letters_that_no_font_has_are_named() -> None:
    assert "".join(piece for piece, _ in font.pieces("a\U0001f9ffb", 17)) in ("a[U+1F9FF]b", "a\U0001f9ffb")
    assert "".join(piece for piece, _ in font.pieces("\U00050000", 17)) == "[U+50000]"


def test_long_lines_are_broken() -> None:
    lines = font.fitted("one two " + 80 * "w" + " three", 17, 200)
    assert "".join(lines).replace(" ", "") == "onetwo" + 80 * "w" + "three" and all(font.width(line, 17) <= 200 for line in lines)


def test_stacked_pictures() -> None:
    both = stack([Image.new("RGB", (4, 3), "red"), Image.new("RGB", (6, 2), "blue")])
    assert both.size == (6, 5) and both.getpixel((0, 0)) == (255, 0, 0) and both.getpixel((5, 4)) == (0, 0, 255)


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
