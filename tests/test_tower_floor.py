"""Less than one token for a crop or frame: a method in the tower leaves one of each, plans it and reports it, or
refuses by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, Picture, Row, forward, shared
from hypothesis import given
from hypothesis import strategies as st

import duet_vlm
from duet_vlm import BudgetError
from duet_vlm.planning.budget import SpanPlan
from duet_vlm.planning.spans import of_each_part, shared_out, tower_counts
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.utils.field_types import merged

LARGE, SMALL = Picture(1, 6, 6, frames=4), Picture(2, 4, 3, frames=6)  # at 4 %: 5 tokens for 4 frames, 2 for 6
CLIPS: list[Row] = [(1, 5, LARGE, 7, 8, 9), (1, 5, SMALL, 7, 8)]
CROPS: list[Row] = [(1, 2, Picture(5, 8, 8), 5, 6, 7), (1, 2, Picture(6, 5, 8), 5, 6, 7)]
PACKED = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "glm46v"]
METHODS = ["contrast", "key_norm", "evit", "checkerboard"]


def kept(handle: Any, tokens: list[list[int]]) -> list[list[list[int]]]:
    """How many tokens of each frame enter; ``tokens``: of a frame of each span of each sample."""

    def of_span(span: Any, size: int) -> list[int]:
        return [
            sum(token // size == frame for token in span.stages[0].kept) for frame in range(span.span.tokens // size)
        ]

    return [
        [of_span(*one) for one in zip(row, sizes, strict=True)] for row, sizes in zip(handle.trace, tokens, strict=True)
    ]


def measured_is_planned(handle: Any) -> None:
    report = handle.report()
    assert report.measured == report.nominal and report.observed.kv_bytes == report.predicted.kv_bytes


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("method", METHODS)
def test_every_frame_keeps_one_beside_a_clip_of_another_size(family: str, method: str) -> None:
    if (family, method) == ("qwen2_5_vl", "evit"):
        pytest.skip("its windows rank no whole picture")
    model, maker = shared(family), FAMILIES[family]
    with duet_vlm.attach(model, method, budget=0.04) as handle:
        alone = []
        for row in CLIPS:
            logits = forward(model, maker.inputs([row])).logits[0, -1]
            alone.append((kept(handle, [[36 if row is CLIPS[0] else 12]])[0][0], logits))
            measured_is_planned(handle)
        logits = forward(model, maker.inputs(CLIPS)).logits[:, -1]
        assert [row[0] for row in kept(handle, [[36], [12]])] == [one for one, _ in alone]
        torch.testing.assert_close(logits, torch.stack([one for _, one in alone]), rtol=1e-3, atol=1e-4)
        measured_is_planned(handle)
        assert handle.report().floored == (1,)
        forward(model, maker.inputs([(*CLIPS[0][:-1], *CLIPS[1][1:])]))
        assert kept(handle, [[36, 12]])[0] == [one for one, _ in alone]
        measured_is_planned(handle)
    assert min(alone[0][0]) >= 1 and sum(alone[0][0]) == 5  # floor(0.04 * 144)
    assert alone[1][0] == [1] * 6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("parts", ["joint", "per_crop"])
def test_crops_of_two_images(method: str, parts: str) -> None:
    model, maker = shared("llava_next"), FAMILIES["llava_next"]
    with duet_vlm.attach(model, method, budget=0.02, options=TokenOptions(crops=parts)) as handle:
        alone = []
        for row in CROPS:
            forward(model, maker.inputs([row]))
            alone.append(handle.trace[0][0].stages[0].kept)
            measured_is_planned(handle)
        forward(model, maker.inputs(CROPS))
        assert [row[0].stages[0].kept for row in handle.trace] == alone
        measured_is_planned(handle)
        assert handle.report().floored == (0, 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("parts", ["auto", "joint", "per_crop"])
@pytest.mark.parametrize("settings", [{"budget": 0.05}, {"keep": 0.05}, {"keep": 1}], ids=str)
def test_a_clip_that_brings_cls_rows(method: str, parts: str, settings: dict[str, Any]) -> None:
    """Video-LLaVA feeds the CLS row of each frame, beside which a patch stays."""
    model, inputs = shared("video_llava"), FAMILIES["video_llava"].inputs([(1, 2, Picture(1, 5, 4, frames=2), 7, 8, 9)])
    with duet_vlm.attach(model, method, **merged(settings, {"options": {"crops": parts}})) as handle:
        forward(model, inputs)
        ((frames,),) = kept(handle, [[17]])
        measured_is_planned(handle)
        assert frames == [2, 2]
        assert bool(handle.report().floored) == ("budget" in settings)


@pytest.mark.parametrize("method", ["contrast", "key_norm"])
@pytest.mark.parametrize("settings", [{"budget": 0.5}, {"keep": 0.5}], ids=str)
def test_newlines_that_are_kept_are_not_counted_with_the_tower(method: str, settings: dict[str, Any]) -> None:
    model, maker = shared("llava_next"), FAMILIES["llava_next"]
    with duet_vlm.attach(model, method, **merged(settings, {"options": {"newline_tokens": "keep"}})) as handle:
        for row in CROPS:
            forward(model, maker.inputs([row]))
            measured_is_planned(handle)
        forward(model, maker.inputs(CROPS))
        measured_is_planned(handle)


@pytest.mark.parametrize("method", ["tome_tower", "tome_tower+duet_plus", "tome_tower+pyramiddrop"])
def test_units_join_down_to_two_of_a_picture(method: str) -> None:
    """The last one may have to predict and is joined by nobody: of four units the other three become one."""
    model = shared("llava_onevision")
    inputs = FAMILIES["llava_onevision"].inputs([(1, 2, Picture(7, 4, 4, frames=3), 5, 6, 7)])
    with duet_vlm.attach(model, method, budget=0.3) as handle:
        forward(model, inputs)
        measured_is_planned(handle)
        if "+" not in method:
            assert handle.report().measured[0] == 2 * 3


def test_a_budget_of_tokens_is_refused_below_the_floor() -> None:
    model, inputs = shared("qwen2_vl"), FAMILIES["qwen2_vl"].inputs(CLIPS)
    with (
        duet_vlm.attach(model, "contrast", budget=5),
        pytest.raises(
            BudgetError,
            match=r"contrast cannot reach 5 .* of 72 tokens: of each of its 6 crops or frames .* floor is 6 tokens",
        ) as error,
    ):
        forward(model, inputs)
    assert error.value.floor == 6
    with (
        duet_vlm.attach(model, "contrast", budget=0.04, options=TokenOptions(small_image_tokens=12)),
        pytest.raises(BudgetError, match="its floor is 6 tokens"),
    ):
        forward(model, inputs)  # frames of 12 tokens are not small enough
    # less than one token of the clip
    with duet_vlm.attach(model, "contrast", budget=0.01, options=TokenOptions(small_image_tokens=13)) as handle:
        forward(model, FAMILIES["qwen2_vl"].inputs(CLIPS[1:]))
        assert handle.report().measured[0] == 6
    assert duet_vlm.handle_of(model) is None


@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.integers(0, 3), st.data())
def test_shares_never_fall_below_the_least(sizes: list[int], few: int, data: st.DataObject) -> None:
    least = [min(size, few) for size in sizes]
    total = data.draw(st.integers(sum(least), sum(sizes)))
    shares = shared_out(total, sizes, least)
    assert sum(shares) == total
    assert all(low <= share <= size for low, share, size in zip(least, shares, sizes, strict=True))
    if total:
        plan = of_each_part(SpanPlan(sum(sizes), 1, 0, (1,) * 4, tower=1), sizes, least)
        assert plan.entry == plan.tower == plan.mean == max(1, sum(least))
        left = tower_counts(SpanPlan(sum(sizes), total, 0, (total,) * 4, tower=total), sizes, least=few)
        assert [n for n, size in zip(left, sizes, strict=True) if size] == [
            max(1, n) for n, size in zip(shares, sizes, strict=True) if size
        ]
