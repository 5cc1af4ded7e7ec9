"""Crops and frames one by one or together, newline rows dropped or kept: counts by mathematics, choices by slow loops,
logits by the oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import CLIPS, FAMILIES, MIXED, ONE, Picture, any_res_layout, forward, generate, pictures_of, shared
from hypothesis import given
from hypothesis import strategies as st
from reference_forward import choices_of, step_logits, walk_batch
from test_families import Probe, seen

import duet_vlm
from duet_vlm import BudgetError
from duet_vlm.methods.encoder.visionzip import VisionZip
from duet_vlm.methods.two_stage.duet import Duet
from duet_vlm.planning.budget import SpanPlan
from duet_vlm.planning.spans import apportion, plan_parts, tower_counts
from duet_vlm.reducers.options import TokenOptions

DEPTH = 8


# ---- counts


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.data())
def test_apportion_is_the_largest_remainder_rule(sizes: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(0, sum(sizes)))
    shares = apportion(total, sizes)
    assert sum(shares) == total
    for share, size in zip(shares, sizes, strict=True):
        exact = total * size / max(1, sum(sizes))
        assert 0 <= share <= size and math.floor(exact) <= share <= math.ceil(exact)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=9),
    st.integers(0, 9),
    st.booleans(),
    st.booleans(),
    st.floats(0.1, 1.0),
)
def test_a_budget_is_met_whatever_the_parts(
    sizes: list[int], newlines: int, each: bool, keep: bool, budget: float
) -> None:
    """Never above it, and within one row of the plan without parts unless the picture has no more rows to give."""
    tokens = sum(sizes) + newlines
    method = VisionZip()
    plain = method.plan(tokens, DEPTH, budget) if budget * tokens >= 1 else None
    if plain is None or (keep and newlines and plain.reduces_entry and plain.entry <= newlines):
        with pytest.raises(BudgetError):
            plan_parts(lambda n: method.plan(n, DEPTH, budget), budget, sizes, newlines, each, keep)
        return
    plan = plan_parts(lambda n: method.plan(n, DEPTH, budget), budget, sizes, newlines, each, keep)
    assert plan.mean <= budget * tokens + 1e-6
    most = tokens if keep or not plain.reduces_entry else sum(sizes)
    assert plan.entry == min(plain.entry, most) == plan.counts[0]
    assert plan.structure == (newlines if keep and plain.reduces_entry else 0)
    if each and plan.reduces_entry:
        assert (
            sum(d for d, _ in plan.parts) == plan.dominant - plan.structure
            and sum(k for _, k in plan.parts) == plan.contextual
        )
        assert all(d >= 0 and k >= 0 and d + k <= size for (d, k), size in zip(plan.parts, sizes, strict=True))


def test_a_tower_leaves_of_every_part_what_enters_of_it() -> None:
    """Shares of a larger sum can be smaller: of these four crops 38 rows enter, 9 of the last, whose share of 39 is 8."""
    sizes = [16, 13, 16, 13]
    parts = tuple((n, 0) for n in apportion(38, sizes))
    plan = SpanPlan(58, 38, 0, (38,), parts=parts, tower=39)
    assert parts[3] == (9, 0) and apportion(39, sizes)[3] == 8
    assert tower_counts(plan, sizes) == [11, 9, 11, 9]


def test_counts_of_a_method_are_per_part_when_parts_are_taken_one_by_one() -> None:
    """Video-LLaVA in the paper: 160 + 32 of each of 8 frames, half of them from layer 16 on, none from 24 on: 960 on
    average."""
    method = Duet(dominant=160, contextual=32, schedule=((16, 0.5), (24, 0.0)))
    plan = plan_parts(lambda n: method.plan(n, 32, None), None, [257] * 8, 0, True, False)
    assert plan.parts == ((160, 32),) * 8
    assert plan.counts == (1536,) * 16 + (768,) * 8 + (0,) * 8 and plan.mean == 960
    assert plan_parts(lambda n: method.plan(n, 32, None), None, [257] * 8, 0, False, False).entry == 192


def test_kept_newlines_come_on_top_of_explicit_counts_and_out_of_budgets() -> None:
    method = VisionZip(dominant=10, contextual=2)
    given = plan_parts(lambda n: method.plan(n, 4, None), None, [20, 20], 6, False, True)
    assert given == SpanPlan(46, 16, 2, (18,) * 4, structure=6)
    solved = plan_parts(lambda n: VisionZip().plan(n, 4, 18), 18, [20, 20], 6, False, True)
    assert (solved.entry, solved.structure, solved.counts) == (18, 6, (18,) * 4)


def test_a_span_that_is_kept_whole_keeps_its_newlines() -> None:
    whole = Duet(dominant=1.0, contextual=0, schedule=())
    for each in (True, False):
        assert plan_parts(lambda n: VisionZip().plan(n, 4, 46), 46, [20, 20], 6, each, False) == SpanPlan(
            46, 46, 0, (46,) * 4
        )
        assert plan_parts(lambda n: whole.plan(n, 4, None), None, [20, 20], 6, each, False) == SpanPlan(
            46, 46, 0, (46,) * 4
        )


def test_a_budget_below_the_newlines_is_refused() -> None:
    with pytest.raises(
        BudgetError,
        match=r"newline_tokens='keep': the budget lets 6 of 46 rows enter .* 6 of them are newlines; raise the budget",
    ):
        plan_parts(lambda n: VisionZip().plan(n, 4, 6), 6, [20, 20], 6, False, True)


@pytest.mark.parametrize(("name", "value"), [("crops", "frames"), ("newline_tokens", "all")])
def test_other_words_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value!r}: choose one of"):
        VisionZip(options=TokenOptions(**{name: value}))


# ---- choices


def part_rows(family: str, picture: Picture) -> list[list[int]]:
    """Rows of each crop or frame, by hand."""
    if family == "llava_next":
        layout = any_res_layout(picture)
        crops = 1 + max(place[0] for place in layout if place is not None)
        return [
            [i for i, place in enumerate(layout) if place is not None and place[0] == crop] for crop in range(crops)
        ]
    frames, size = picture.frames or 1, picture.height * picture.width
    return [list(range(t * size, (t + 1) * size)) for t in range(frames)]


@pytest.mark.every_family
@pytest.mark.parametrize(("family", "rows"), [("llava_next", MIXED), ("qwen2_vl", CLIPS), ("qwen2_5_vl", CLIPS)])
def test_every_part_keeps_its_own_best_rows(family: str, rows: Any) -> None:
    model, inputs = shared(family), FAMILIES[family].inputs(rows)
    seen.clear()
    with duet_vlm.attach(model, Probe(dominant=0.4, contextual=0.0, options=TokenOptions(crops="joint"))):
        forward(model, inputs)
    importance = {view.modality: view.importance for view in seen}
    with duet_vlm.attach(
        model, VisionZip(dominant=0.4, contextual=0.0, options=TokenOptions(crops="per_crop"))
    ) as handle:
        forward(model, inputs)
        kept = [set(span.stages[0].kept) for row in handle.trace for span in row]
    numbers = {"image": 0, "video": 0}
    for picture, left in zip(pictures_of(rows), kept, strict=True):
        stream = "video" if picture.frames else "image"
        scores, expected = importance[stream][numbers[stream]], set()
        numbers[stream] += 1
        for part in part_rows(family, picture):
            best = sorted(part, key=lambda row: (-float(scores[row]), row))
            expected |= set(best[: math.floor(0.4 * len(part) + 1e-9)])
        assert left == expected


@pytest.mark.parametrize("method", ["duet", "visionzip", "divprune"])
@pytest.mark.parametrize("parts", ["joint", "per_crop"])
def test_kept_newlines_all_enter(method: str, parts: str) -> None:
    model, inputs = shared("llava_next"), FAMILIES["llava_next"].inputs(MIXED)
    for newline in ("keep", "drop"):
        with duet_vlm.attach(
            model, method, budget=0.5, options=TokenOptions(crops=parts, newline_tokens=newline)
        ) as handle:
            forward(model, inputs)
            report = handle.report()
            entered = [set(span.stages[0].kept) for row in handle.trace for span in row]
        for picture, kept in zip(pictures_of(MIXED), entered, strict=True):
            newlines = {i for i, place in enumerate(any_res_layout(picture)) if place is None}
            assert kept & newlines == (newlines if newline == "keep" else set())
        spans = [len(any_res_layout(picture)) for picture in pictures_of(MIXED)]
        wanted = sum(spans) / 2 / len(MIXED)
        assert wanted - len(spans) < report.measured_mean <= wanted + 1e-6


SETTINGS = [
    ("llava_next", MIXED, {"options": {"crops": "per_crop", "newline_tokens": "drop"}}),
    ("llava_next", MIXED, {"options": {"crops": "joint", "newline_tokens": "keep"}}),
    ("llava_next", MIXED, {"options": {"crops": "per_crop", "newline_tokens": "keep"}}),
    ("qwen2_5_vl", CLIPS, {"options": {"crops": "per_crop"}}),
]
COUNTS = {"dominant": 0.4, "contextual": 0.2, "schedule": ((3, 0.6), (5, 0.25))}


@pytest.mark.every_family
@pytest.mark.parametrize(("family", "rows", "options"), SETTINGS, ids=str)
@pytest.mark.parametrize("method", [COUNTS, {"budget": 0.4}], ids=["counts", "budget"])
def test_generation_equals_the_oracle(family: str, rows: Any, options: dict[str, Any], method: dict[str, Any]) -> None:
    model, inputs = shared(family), FAMILIES[family].inputs(rows)
    with duet_vlm.attach(model, "duet", **method, **options) as handle:
        result = generate(model, inputs)
        choices = choices_of(handle)
        report = handle.report()
    assert report.predicted == report.observed
    new = result.sequences[:, inputs["input_ids"].shape[1] :]
    expected = step_logits(walk_batch(shared(family, "eager"), inputs, choices, new), choices, len(result.logits))
    for ours, wanted in zip(result.logits, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=2e-3)


def test_parts_of_one_image_are_the_image() -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs([ONE])
    kept = []
    for parts in ("joint", "per_crop"):
        with duet_vlm.attach(model, "duet", budget=0.4, options=TokenOptions(crops=parts)) as handle:
            forward(model, inputs)
            kept.append(handle.trace)
    assert kept[0] == kept[1]


@pytest.mark.parametrize("less", [1, 3, 9])
def test_budgets_just_below_an_image_with_its_newlines(less: int) -> None:
    """Newlines make a span larger than all that the tower looked at; they leave first."""
    picture = Picture(1, 6, 6)
    tokens = FAMILIES["llava_next"].tokens(picture)
    with duet_vlm.attach(shared("llava_next"), "visionzip", budget=tokens - less) as handle:
        forward(shared("llava_next"), FAMILIES["llava_next"].inputs([(1, picture, 5)]))
        (span,) = handle.trace[0]
    assert tokens == 88 and len(span.stages[0].kept) == min(80, tokens - less)
