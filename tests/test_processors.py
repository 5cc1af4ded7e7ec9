"""Real processors with generated pictures of many shapes: each family counts its own grid, and the reduced model spends
what was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, Inputs, forward, generate, shared
from method_matrix import REDUCING, TOO_EARLY
from PIL import Image
from processors import PINPOINTS, STOCK, inputs_for, picture, processor

import duet_vlm
from duet_vlm import BudgetError
from duet_vlm.models.lookup import families
from duet_vlm.planning.budget import SpanPlan
from duet_vlm.planning.tokens import SpanTrace
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.scheduled import ScheduledReducer

Size = tuple[int, int]  # width and height in pixels
WIDE, TALL, SQUARE, TINY, ODD = (120, 40), (40, 120), (80, 80), (9, 7), (101, 67)
SIZES = (WIDE, TALL, SQUARE, TINY, ODD)
ROWS: tuple[tuple[Size, ...], ...] = ((WIDE,), (TALL, SQUARE, TINY), (), (ODD,))  # one, three and no pictures
KINDS = ("gradient", "noise", "shapes")
DEPTH, NEW, BUDGET = 8, 3, 0.3
NAMES = [name for name in STOCK if name in FAMILIES]


def drawn(rows: Sequence[Sequence[Size]]) -> list[list[Image.Image]]:
    return [[picture(KINDS[number % 3], *size) for number, size in enumerate(row)] for row in rows]


# ---- visual tokens by hand: per picture the tokens of each of its spans; ``together`` pictures are in its prompt

Count = Callable[[Size, int], list[int]]


def fixed(tokens: int) -> Count:
    return lambda size, together: [tokens]


def best_canvas(size: Size, canvases: Sequence[Sequence[int]]) -> Size:
    """The canvas (height, width as the settings write them) that shows most pixels of a picture; among equals the
    smallest."""
    width, height = size

    def shown(canvas: Sequence[int]) -> int:
        scale = min(Fraction(canvas[1], width), Fraction(canvas[0], height))
        return min(math.floor(width * scale) * math.floor(height * scale), width * height)

    chosen = min(canvases, key=lambda canvas: (-shown(canvas), canvas[0] * canvas[1]))
    return chosen[1], chosen[0]


def unpadded(size: Size, canvases: Sequence[Sequence[int]], patch: int) -> tuple[Size, Size]:
    """Columns and rows of the patches that show the picture on its canvas, and how many are cut off at the left and at
    the top."""
    (width, height), canvas = size, best_canvas(size, canvases)
    columns, rows = canvas[0] // patch, canvas[1] // patch
    if width * rows > height * columns:
        cut = (rows - height * columns // width) // 2
        return (columns, rows - 2 * cut), (0, cut)
    cut = (columns - width * rows // height) // 2
    return (columns - 2 * cut, rows), (cut, 0)


def any_res(size: Size, together: int = 1, canvases: Sequence[Sequence[int]] = PINPOINTS, crop: int = 56) -> list[int]:
    """LLaVA-NeXT: the overview, then line by line what shows the picture, each line with a newline."""
    (columns, rows), _ = unpadded(size, canvases, 14)
    return [(crop // 14) ** 2 + rows * (columns + 1)]


def onevision_grid(size: Size) -> Size:
    """LLaVA-OneVision resizes what is larger than its limit (here 1 crop of 4 x 4 patches) to about the limit."""
    (columns, rows), _ = unpadded(size, PINPOINTS, 14)
    ratio = math.sqrt(rows * columns / 16)
    return (int(columns // ratio), int(rows // ratio)) if ratio > 1.1 else (columns, rows)


def onevision(size: Size, together: int) -> list[int]:
    """Pictures that share a prompt are one crop and one newline each."""
    columns, rows = onevision_grid(size)
    return [16 + (rows * (columns + 1) if together == 1 else 1)]


def in_limits(size: Size, unit: int, least: int, most: int) -> list[int]:
    """Qwen: sides rounded to whole tokens of ``unit`` pixels, after scaling to what the limits in pixels leave."""
    area = size[0] * size[1]
    sides = [round(side / unit) for side in size]
    if math.prod(sides) * unit**2 > most:
        sides = [max(1, math.floor(side / unit * math.sqrt(most / area))) for side in size]
    elif math.prod(sides) * unit**2 < least:
        sides = [math.ceil(side / unit * math.sqrt(least / area)) for side in size]
    return [math.prod(sides)]


def qwen(size: Size, together: int) -> list[int]:
    return in_limits(size, 8, 16 * 16, 64 * 64)


def glm(size: Size, together: int) -> list[int]:
    """As Qwen, after pictures with a side of less than a token were enlarged."""
    scale = max(Fraction(8, min(size)), Fraction(1))
    return qwen((math.floor(size[0] * scale), math.floor(size[1] * scale)), together)


def packed(merge: int) -> Count:
    """Pixtral: shrunk to the longest side allowed (never enlarged), then as many tokens of 4 * merge pixels as it takes
    to cover it."""
    unit = 4 * merge

    def count(size: Size, together: int) -> list[int]:
        shrink = min(Fraction(12 * unit, max(size)), Fraction(1))
        return [math.prod(math.ceil(math.floor(side * shrink) / unit) for side in size)]

    return count


def tiles(size: Size, together: int) -> list[int]:
    """Idefics3: the longest side becomes 80 pixels, the other an even number; tiles of 40 x 40 that cover this, and the
    overview: spans of 25."""
    other = math.floor(Fraction(80 * min(size), max(size)))
    return [25] * (2 * math.ceil((other + other % 2) / 40) + 1)


def internvl(size: Size, together: int) -> list[int]:
    """InternVL: up to 4 tiles of 32 x 32 pixels in the grid most like the picture, of equals the largest with less than
    twice its area."""
    grids = [(columns, rows) for columns in range(1, 5) for rows in range(1, 4 // columns + 1)]
    apart = {grid: abs(Fraction(*size) - Fraction(*grid)) for grid in grids}
    alike = sorted(math.prod(grid) for grid in grids if apart[grid] == min(apart.values()))
    shown = max([alike[0], *(tiles for tiles in alike if tiles * 32 * 32 < 2 * math.prod(size))])
    return [16] * (shown + (shown > 1))


COUNTS: dict[str, Count] = {
    "llava": fixed(36),
    "vipllava": fixed(16),
    "video_llava": fixed(16),
    "llava_next": any_res,
    "llava_next_video": any_res,
    "llava_onevision": onevision,
    "qwen2_vl": qwen,
    "qwen2_5_vl": qwen,
    "qwen3_vl": qwen,
    "qwen3_5": qwen,
    "gemma3": fixed(16),
    "paligemma": fixed(25),
    "glm4v": glm,
    "glm46v": glm,
    "internvl": internvl,
    "idefics3": tiles,
    "smolvlm": tiles,
    "mistral3": packed(2),
    "pixtral": packed(1),
}


def counted(name: str, rows: Sequence[Sequence[Size]]) -> list[list[int]]:
    """Per prompt the tokens of its spans."""
    return [[tokens for size in row for tokens in COUNTS[name](size, len(row))] for row in rows]


def test_counts_by_hand_at_the_sizes_of_released_checkpoints() -> None:
    """Worked out on paper from the papers and the released settings."""
    next_canvases = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    assert any_res((672, 672), 1, next_canvases, 336) == [24 * 24 + 48 * 49]
    assert any_res((1024, 768), 1, next_canvases, 336) == [576 + 36 * 49]  # 48 x 36 of 48 x 48 patches show the picture
    # 72 x 24, of which 21.6 lines are needed: one is cut at each side
    assert any_res((1000, 300), 1, next_canvases, 336) == [576 + 22 * 73]
    assert in_limits((1920, 1080), 28, 56 * 56, 28 * 28 * 1280) == [47 * 26]
    assert in_limits((20, 30), 28, 56 * 56, 28 * 28 * 1280) == [2 * 3]
    assert in_limits((640, 480), 28, 56 * 56, 28 * 28 * 1280) == [23 * 17]


def test_every_family_has_its_processor_here() -> None:
    assert set(families()) <= set(STOCK) and set(STOCK) == set(COUNTS)


# ---- one batch of all shapes through generate()


@dataclass
class Ran:
    """What a model made of a batch: untouched, attached and keeping everything, reduced, and after detaching."""

    inputs: Inputs
    plain: Any
    whole: Any
    reduced: Any
    after: Any
    report: duet_vlm.Report
    trace: list[list[SpanTrace]]
    slots: torch.Tensor


def run(name: str, inputs: Inputs) -> Ran:
    model = shared(name)
    plain = generate(model, inputs, NEW)
    with duet_vlm.attach(model, "duet", budget=1.0):
        whole = generate(model, inputs, NEW)
    with duet_vlm.attach(model, "duet", budget=BUDGET) as handle:
        reduced = generate(model, inputs, NEW)
        report, trace, slots = handle.report(), handle.trace, handle.slots
    return Ran(inputs, plain, whole, reduced, generate(model, inputs, NEW), report, trace, slots)


def entering(tokens: int, budget: float) -> int:
    """DUET on 8 layers: all that enter on 4, half of them on 2, none on 2; the most that keep the mean within the
    budget."""
    return max(n for n in range(tokens + 1) if 4 * n + 2 * (n // 2) <= DEPTH * budget * tokens + 1e-9)


def text_places(inputs: Inputs) -> list[list[int]]:
    """Per prompt the slots of everything that is neither padding nor a visual token."""
    text = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != IMAGE)
    return [row.nonzero()[:, 0].tolist() for row in text]


def check_cache(cache: Any, inputs: Inputs, schedules: Sequence[Sequence[Sequence[int]]], new: int = NEW) -> None:
    """The cache of each layer with keys is as long as the longest row: its text, what its spans' schedules say, and the
    new tokens."""
    text = [len(places) for places in text_places(inputs)]
    for layer, entry in enumerate(cache.layers):
        if hasattr(entry, "keys"):  # linear layers have a state instead
            rows = [
                length + sum(schedule[layer] for schedule in spans)
                for length, spans in zip(text, schedules, strict=True)
            ]
            assert cache.get_seq_length(layer) == max(rows) + new - 1


def check_spans(here: Ran, spans: list[list[int]]) -> None:
    assert [[span.span.tokens for span in row] for row in here.trace] == spans
    assert (here.inputs["input_ids"] == IMAGE).sum(1).tolist() == [sum(row) for row in spans]
    assert here.report.tokens == sum(map(sum, spans))


def check_budget(here: Ran, spans: list[list[int]]) -> None:
    """Within one token per span; what is no visual token (row breaks, tags, words) is left in the last layer, and
    nothing else."""
    wanted = BUDGET * sum(map(sum, spans))
    measured = here.report.measured_mean * len(spans)
    assert wanted - sum(map(len, spans)) < measured <= wanted + 1e-9
    assert here.report.measured == here.report.nominal
    assert [[slot for slot in row if slot >= 0] for row in here.slots.tolist()] == text_places(here.inputs)


def check_undone(here: Ran) -> None:
    """Keeping everything and detaching change no bit, reducing does."""
    for other in (here.whole, here.after):
        assert all(torch.equal(a, b) for a, b in zip(here.plain.logits, other.logits, strict=True))
    assert max(float((a - b).abs().max()) for a, b in zip(here.plain.logits, here.reduced.logits, strict=True)) > 0.05


def check_all(here: Ran, spans: list[list[int]]) -> None:
    check_spans(here, spans)
    entries = [[entering(tokens, BUDGET) for tokens in row] for row in spans]
    check_cache(
        here.reduced.past_key_values, here.inputs, [[[n] * 4 + [n // 2] * 2 + [0] * 2 for n in row] for row in entries]
    )
    check_budget(here, spans)
    check_undone(here)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_every_shape(name: str) -> None:
    check_all(run(name, inputs_for(name, drawn(ROWS))), counted(name, ROWS))


# ---- what processors can be told

# per picture the tokens of its spans, worked out on paper
SETTINGS: dict[str, tuple[str, dict[str, Any], dict[Size, list[int]]]] = {
    "pan and scan": (
        "gemma3",
        {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20, "pan_and_scan_max_num_crops": 4, "pan_and_scan_min_ratio_to_activate": 1.2},
        # the picture, and 3, 3, none, none (too small), 2 crops
        {WIDE: [16] * 4, TALL: [16] * 4, SQUARE: [16], TINY: [16], ODD: [16] * 3},
    ),
    "no tiles": ("idefics3", {"do_image_splitting": False}, dict.fromkeys(SIZES, [25])),
    "no tiles, smolvlm": ("smolvlm", {"do_image_splitting": False}, dict.fromkeys(SIZES, [25])),
    "padded to squares": ("llava", {"do_pad": True}, dict.fromkeys(SIZES, [36])),
    "other limits": (
        "qwen2_5_vl", {"size": {"shortest_edge": 4096, "longest_edge": 8192}},
        {WIDE: [15 * 5], TALL: [5 * 15], SQUARE: [10 * 10], TINY: [10 * 8], ODD: [13 * 8]},
    ),
    "a shorter side": (
        "mistral3", {"size": {"longest_edge": 40}}, {WIDE: [5 * 2], TALL: [2 * 5], SQUARE: [5 * 5], TINY: [2 * 1], ODD: [5 * 4]}
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "setting", [name if name == "pan and scan" else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS]
)
def test_settings_of_the_processor(setting: str) -> None:
    name, options, by_hand = SETTINGS[setting]
    spans = [[tokens for size in row for tokens in by_hand[size]] for row in ROWS]
    check_all(run(name, inputs_for(name, drawn(ROWS), images_kwargs=options)), spans)


# ---- parts and newline rows of any-resolution pictures


def grid_of(name: str, size: Size, together: int) -> tuple[Size, Size]:
    """Columns and rows behind the overview of 16 tokens, each row with a newline at its end, and what was cut off at
    the left and at the top."""
    if name == "llava_onevision":
        return ((0, 1), (0, 0)) if together > 1 else (onevision_grid(size), (0, 0))
    return unpadded(size, PINPOINTS, 14)


def newlines(name: str, size: Size, together: int) -> set[int]:
    (columns, rows), _ = grid_of(name, size, together)
    return {16 + (row + 1) * (columns + 1) - 1 for row in range(rows)}


def crops_of(size: Size) -> list[list[int]]:
    """LLaVA-NeXT: the rows of the overview and of each crop."""
    (columns, rows), (left, top) = unpadded(size, PINPOINTS, 14)
    across = best_canvas(size, PINPOINTS)[0] // 56
    crops = {0: list(range(16))}
    for y in range(rows):
        for x in range(columns):
            crops.setdefault(1 + (y + top) // 4 * across + (x + left) // 4, []).append(16 + y * (columns + 1) + x)
    return list(crops.values())


@pytest.mark.parametrize("newline", ["keep", "drop"])
@pytest.mark.parametrize("parts", ["joint", "per_crop"])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_parts_and_newlines(name: str, parts: str, newline: str) -> None:
    budget, spans = 0.4, counted(name, ROWS)
    with duet_vlm.attach(
        shared(name), "duet", budget=budget, options=TokenOptions(crops=parts, newline_tokens=newline)
    ) as handle:
        generate(shared(name), inputs_for(name, drawn(ROWS)), NEW)
        report, trace = handle.report(), handle.trace
    wanted = budget * sum(map(sum, spans))
    assert wanted - sum(map(len, spans)) < report.measured_mean * len(ROWS) <= wanted + 1e-9
    uneven = 0
    for row, found in zip(ROWS, trace, strict=True):
        for size, span in zip(row, found, strict=True):
            ends, kept = newlines(name, size, len(row)), set(span.stages[0].kept)
            assert kept & ends == (ends if newline == "keep" else set())
            assert not ends & set(span.merged) | ends & {
                member for members in span.merged.values() for member in members
            }
            if name == "llava_next":
                crops = crops_of(size)
                share = len(kept - ends) / sum(map(len, crops))
                off = [abs(len(kept & set(crop)) - share * len(crop)) for crop in crops]
                uneven += max(off) >= 1
    assert (uneven > 0) == (name == "llava_next" and parts == "joint")


def test_onevision_takes_pictures_in_a_flat_list_as_if_each_were_alone() -> None:
    """The stock processor cuts them all into crops then, and the counts follow."""
    rows = ((WIDE, TALL), (ODD,))
    inputs = inputs_for("llava_onevision", drawn(rows), flat=True)
    check_all(run("llava_onevision", inputs), [[onevision(size, 1)[0] for size in row] for row in rows])


# ---- salient words, read from the ids


@pytest.mark.parametrize("name", NAMES)
def test_salient_words_are_those_of_the_question(name: str) -> None:
    made, rows = processor(name), drawn(((SQUARE,), (ODD, TINY)))
    inputs = inputs_for(name, rows)
    model = shared(name)
    with duet_vlm.attach(
        model, "duet", budget=BUDGET, processor=made, options=duet_vlm.TokenOptions(text_query="salient")
    ) as handle:
        forward(model, inputs)
        together = handle.trace
        for number, row in enumerate(rows):
            forward(model, inputs_for(name, [row], first=number))
            if name != "llava_onevision" or len(row) == 1:  # which cuts a picture that is alone into crops
                assert [span.stages for span in handle.trace[0]] == [span.stages for span in together[number]]


# ---- more combinations


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_sizes_at_random(name: str) -> None:
    """Placeholders only: no model looks at these pictures."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.randint(5, 260, (60, 2), generator=generator).tolist()
    for width, height in sides:
        ids = inputs_for(name, drawn([[(width, height)]]))["input_ids"]
        assert int((ids == IMAGE).sum()) == sum(COUNTS[name]((width, height), 1)), (width, height)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_picture_alone(name: str, size: Size, kind: str) -> None:
    check_all(run(name, inputs_for(name, [[picture(kind, *size)]])), counted(name, [[size]]))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_other_modes(name: str, mode: str) -> None:
    image = picture("shapes", *ODD).convert(mode)
    check_all(run(name, inputs_for(name, [[image]])), counted(name, [[ODD]]))


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_in_a_batch_equals_the_prompt_alone(name: str, side: str) -> None:
    """Same survivors and, where text is padded on the left as generate() wants it, the same words with the same
    certainty."""
    model, rows = shared(name), drawn(ROWS)
    with duet_vlm.attach(model, "duet", budget=BUDGET) as handle:
        together = generate(model, inputs_for(name, rows, text_kwargs={"padding_side": side}), NEW)
        traces = handle.trace
        for sample, row in enumerate(rows):
            if not row:
                continue
            alone = generate(model, inputs_for(name, [row], first=sample), NEW)
            assert [(s.merged, s.stages) for s in handle.trace[0]] == [(s.merged, s.stages) for s in traces[sample]]
            for step, logits in enumerate(together.logits if side == "left" else ()):
                torch.testing.assert_close(logits[sample : sample + 1], alone.logits[step], rtol=1e-3, atol=2e-4)


def newline_rows(name: str) -> list[list[int]]:
    """Per prompt the newline rows of its spans."""
    if name not in ("llava_next", "llava_next_video", "llava_onevision"):
        return [[0] * len(row) for row in counted(name, ROWS)]
    return [[len(newlines(name, size, len(row))) for size in row] for row in ROWS]


def schedule(plan: SpanPlan, most: int) -> list[int]:
    """Tokens per layer: of a picture that is reduced the newline rows leave first, so no more than the others enter."""
    return [min(count, most) for count in plan.counts] if plan.reduces_entry else list(plan.counts)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [6, 20, 0.5])
@pytest.mark.parametrize("method", REDUCING)
@pytest.mark.parametrize("name", NAMES)
def test_methods_and_budgets(name: str, method: str, budget: float) -> None:
    """An int counts per span: what is no larger is kept whole. Methods that drop inside the decoder only cannot go
    below what their first layers need."""
    late = isinstance(duet_vlm.make_method(method), ScheduledReducer) or method in (
        "fastv",
        "fitprune",
        "pyramiddrop",
        "stateful",
    )
    whole_cache = (
        {"options": {"trim_kv_cache": False}}
        if isinstance(duet_vlm.make_method(method), duet_vlm.DecoderReducer)
        else {}
    )
    spans, model, inputs = counted(name, ROWS), shared(name), inputs_for(name, drawn(ROWS))
    flat = [tokens for row in spans for tokens in row]
    wanted = sum(min(budget, tokens) if isinstance(budget, int) else budget * tokens for tokens in flat)
    try:
        with duet_vlm.attach(model, method, budget=budget, **whole_cache) as handle:
            written = generate(model, inputs, NEW)
            report, plans = handle.report(), [[handle.plan(tokens) for tokens in row] for row in spans]
            assert [[span.span.tokens for span in row] for row in handle.trace] == spans
    except BudgetError as error:
        assert late and isinstance(budget, int) and error.floor is not None and budget < error.floor
        return
    except ValueError as error:
        assert method in TOO_EARLY and "has no attention to rank tokens by" in str(error)
        return
    most = [
        [tokens - lines for tokens, lines in zip(*row, strict=True)]
        for row in zip(spans, newline_rows(name), strict=True)
    ]
    schedules = [[schedule(*span) for span in zip(*row, strict=True)] for row in zip(plans, most, strict=True)]
    check_cache(written.past_key_values, inputs, schedules)
    assert wanted - len(flat) < report.measured_mean * len(ROWS) <= wanted + 1e-9
    assert report.clamped == tuple(
        number for number, tokens in enumerate(flat) if tokens <= budget and isinstance(budget, int)
    )
