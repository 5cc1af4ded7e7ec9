"""Pictures: known colours at known patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from duet_vlm import Span, SpanTrace, StageTrace
from duet_vlm.viz import ScoreRecorder, draw, font, model_view, stack
from duet_vlm.viz.colors import GROUPS, group, heat
from duet_vlm.viz.merges import origins
from duet_vlm.viz.overlay import DROPPED, GAP, HEAD, MARGIN, MEMBER, SHADE

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


def test_patches_merged_inside_the_decoder() -> None:
    """At layer 4 token 0 is merged into 2, and 3 into 1, which is the anchor of group 1 since the entry; at layer 6
    group 1 goes into 2."""
    stages = (
        StageTrace(0, (0, 1, 2, 3), (5,)),
        StageTrace(4, (1, 2), (), {1: (3,), 2: (0,)}),
        StageTrace(6, (2,), (), {2: (1,)}),
    )
    span = Span(0, 0, 6, (2, 3))
    sheet = draw(Image.new("RGB", (90, 60), GREY), SpanTrace(span, {1: (4,)}, stages), size=3 * CELL)
    image, entry, four, six = panels(sheet, 4, 3 * CELL, 2 * CELL)

    def tinted(number: int) -> tuple[int, ...]:
        return tuple(round(g * (1 - MEMBER) + c * MEMBER) for g, c in zip(GREY, group(number), strict=True))

    def outline(panel: np.ndarray, token: int) -> tuple[int, ...]:
        row, column = divmod(token, 3)
        return tuple(panel[row * CELL, column * CELL].tolist())

    assert [centre(entry, t) for t in (0, 2, 3, 4, 5)] == [GREY, GREY, GREY, tinted(0), DARK]
    assert [centre(four, t) for t in (0, 3, 4, 5)] == [tinted(1), tinted(0), DARK, DARK]
    assert [outline(four, t) for t in (1, 2)] == [group(0), group(1)] and outline(entry, 2) == GREY
    assert [centre(six, t) for t in (0, 1, 3)] == [DARK, tinted(1), DARK] and outline(six, 2) == group(1)
    numbers = [
        panel[2 : CELL // 2, column * CELL + 3 : column * CELL + CELL // 2]
        for panel, column in ((entry, 1), (four, 1), (four, 2), (six, 2))
    ]
    white = [number.min(-1) > 200 for number in numbers]
    assert white[0].any() and (white[0] == white[1]).all()  # a group keeps its number
    assert (white[2] == white[3]).all() and (white[1] != white[2]).any()


@pytest.mark.parametrize("method", ["apet", "holitom", "sparsevlm", "tokencarve"])
def test_every_group_of_a_method_that_merges_in_the_decoder(method: str) -> None:
    """On a grey picture, merged patches have the colour of their group at the stage that merged them, and whoever holds
    others is outlined there and as long as it lives."""
    from duet_vlm import attach
    from duet_vlm.evaluation import tiny

    model, processor = tiny.load()
    item = tiny.demo_images()[0]
    inputs = processor(images=item.image, text=tiny.prompt(item.questions[0][0]), return_tensors="pt")
    with attach(model, method, budget=0.22) as handle, torch.no_grad():
        model(**inputs)
        one = handle.trace[0][0]
    assert any(stage.merged for stage in one.stages)
    rows, columns = one.span.grid
    sheet = np.asarray(draw(Image.new("RGB", (columns, rows), GREY), one, size=columns * CELL))
    lefts = sheet.shape[1] - 2 * MARGIN
    across, begun = min(4, 1 + len(one.stages)), {}
    column = (lefts - (across - 1) * GAP) // across
    for number, stage in enumerate(one.stages):
        down, place = divmod(number + 1, across)
        top, left = MARGIN + HEAD + down * (HEAD + rows * CELL + GAP), MARGIN + place * (column + GAP)
        panel = sheet[top : top + rows * CELL, left : left + columns * CELL]
        merged = stage.merged if number else one.merged
        begun |= {anchor: len(begun) + more for more, anchor in enumerate(sorted(set(merged) - set(begun)))}
        for anchor in begun:
            row, place = divmod(anchor, columns)
            assert (tuple(panel[row * CELL, place * CELL]) == group(begun[anchor])) == (anchor in stage.kept)
            for member in set(merged.get(anchor, ())) - set(stage.kept):
                expected = [g * (1 - MEMBER) + c * MEMBER for g, c in zip(GREY, group(begun[anchor]), strict=True)]
                row, place = divmod(member, columns)
                assert np.abs(panel[(row + 1) * CELL - 2, (place + 1) * CELL - 2] - expected).max() <= 1
        assert all(centre(panel, token, columns) == DARK for token in stage.dropped)


def test_the_legend_says_where_groups_began() -> None:
    stages = (StageTrace(0, (0, 1, 2, 3), ()), StageTrace(4, (1, 2), (), {1: (3,), 2: (0,)}), StageTrace(6, (1,), (2,)))
    span = Span(0, 0, 6, (2, 3))
    assert origins(SpanTrace(span, {1: (4, 5)}, stages)).endswith(
        "begins: 1 at the entry to the decoder, 2 in front of layer 4"
    )
    assert origins(SpanTrace(span, {0: (4,), 1: (5,)}, stages[:1])).endswith("begins: 1-2 at the entry to the decoder")
    nothing = SpanTrace(span, {}, (StageTrace(0, (0, 1), (2, 3, 4, 5)),))
    assert origins(nothing) == ""
    one = SpanTrace(span, {0: (2, 3), 1: (4, 5)}, (StageTrace(0, (0, 1), ()),))
    # the line has a place
    assert draw(Image.new("RGB", (3, 2)), one).height > draw(Image.new("RGB", (3, 2)), nothing).height


def test_sleeping_patches_are_blue_and_are_in_the_legend() -> None:
    stages = (StageTrace(0, (0, 1, 2, 3), (4, 5)), StageTrace(4, (1,), (), {}, (0, 2, 3)))
    sheet = draw(Image.new("RGB", (90, 60), GREY), SpanTrace(Span(0, 0, 6, (2, 3)), {}, stages), size=3 * CELL)
    pixels, column = np.asarray(sheet), (sheet.width - 2 * MARGIN - 2 * GAP) // 3
    left, top = MARGIN + 2 * (column + GAP), MARGIN + HEAD
    panel = pixels[top : top + 2 * CELL, left : left + 3 * CELL]
    asleep = centre(panel, 0)
    assert asleep == centre(panel, 3) and asleep[2] > 1.5 * asleep[0]
    assert centre(panel, 1) == GREY and centre(panel, 4) == DARK
    never = draw(Image.new("RGB", (90, 60), GREY), SpanTrace(Span(0, 0, 6, (2, 3)), {}, stages[:1]), size=3 * CELL)
    legends = [np.asarray(each)[-30:, :, 2].astype(int) - np.asarray(each)[-30:, :, 0] for each in (sheet, never)]
    assert [bool((blue > 50).any()) for blue in legends] == [True, False]


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
    from duet_vlm import attach
    from duet_vlm.evaluation import tiny

    model, processor = tiny.load()
    item = tiny.demo_images()[0]
    inputs = processor(images=item.image, text=tiny.prompt(item.questions[0][0]), return_tensors="pt")
    for method in ("duet", "fastv", "pyramiddrop", "visionzip", "divprune", "random"):
        with attach(model, method, budget=0.22) as handle, torch.no_grad():
            plain, watched = model(**inputs).logits, ScoreRecorder(handle.reducer)
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


@pytest.mark.parametrize("text, family", [("Street", "Aileron"), ("Привет", "DejaVu Sans"), ("שלום", "DejaVu Sans")])
def test_the_font_has_the_letters(text: str, family: str) -> None:
    pytest.importorskip("matplotlib")  # brings DejaVu Sans
    ((piece, found),) = font.pieces(text, 17)
    assert piece == text and found.getname()[0] == family and all(font.has(found, letter) for letter in text)


def test_letters_that_no_font_has_are_named() -> None:
    assert "".join(piece for piece, _ in font.pieces("a\U0001f9ffb", 17)) in ("a[U+1F9FF]b", "a\U0001f9ffb")
    assert "".join(piece for piece, _ in font.pieces("\U00050000", 17)) == "[U+50000]"


def test_long_lines_are_broken() -> None:
    lines = font.fitted("one two " + 80 * "w" + " three", 17, 200)
    assert "".join(lines).replace(" ", "") == "onetwo" + 80 * "w" + "three" and all(
        font.width(line, 17) <= 200 for line in lines
    )


def test_stacked_pictures() -> None:
    both = stack([Image.new("RGB", (4, 3), "red"), Image.new("RGB", (6, 2), "blue")])
    assert both.size == (6, 5) and both.getpixel((0, 0)) == (255, 0, 0) and both.getpixel((5, 4)) == (0, 0, 255)


def test_seen_is_the_centre_that_the_processor_cut_out() -> None:
    from duet_vlm.evaluation import tiny

    _, processor = tiny.load()
    wide = Image.new("RGB", (672, 224), (200, 30, 30))
    wide.paste((20, 180, 40), (224, 0, 448, 224))
    pixels = processor.image_processor(wide, return_tensors="pt")["pixel_values"][0]
    view = np.asarray(model_view(wide, pixels, processor)).astype(int)
    assert view.shape == (224, 224, 3)
    assert np.abs(view - (20, 180, 40)).max(-1).mean() < 6
    assert model_view(wide, torch.zeros(4, 8), processor).size == wide.size
