"""The solver: published settings, exactness, floors, small images. Pure integers: no model is built here but for fixed
towers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from families import FAMILIES, shared
from hypothesis import given, settings
from hypothesis import strategies as st

import duet_vlm
from duet_vlm import BudgetError, SpanPlan, compose
from duet_vlm.methods.baselines.none import NoReduction
from duet_vlm.methods.baselines.tokens import RandomTokens, UniformTokens
from duet_vlm.methods.decoder.fastv import FastV
from duet_vlm.methods.decoder.pyramiddrop import PyramidDrop
from duet_vlm.methods.encoder.divprune import DivPrune
from duet_vlm.methods.encoder.scope import Scope
from duet_vlm.methods.encoder.visionzip import VisionZip
from duet_vlm.methods.two_stage.duet import Duet
from duet_vlm.methods.two_stage.duet_plus import DuetPlus
from duet_vlm.methods.video.frames import Frames
from duet_vlm.planning.budget import check_budget, check_schedule, count_of, largest_int, layer_counts, target_mean
from duet_vlm.planning.solve import plan_or_clamp
from duet_vlm.planning.spans import plan_parts
from duet_vlm.reducers.options import TokenOptions

SOLVERS = {
    method.name: method
    for method in (DivPrune, Duet, DuetPlus, FastV, PyramidDrop, Scope, VisionZip, RandomTokens, UniformTokens)
}
many = settings(max_examples=200, deadline=None, derandomize=True)


# ---- published settings for LLaVA-1.5-7B


@pytest.mark.parametrize(("budget", "dominant", "contextual"), [(192, 300, 7), (128, 170, 35), (64, 85, 17)])
def test_duet_solves_to_the_published_settings(budget: int, dominant: int, contextual: int) -> None:
    plan = Duet().plan(576, 32, budget)
    assert (plan.dominant, plan.contextual) == (dominant, contextual)
    entry = dominant + contextual
    assert plan.counts == (entry,) * 16 + (entry // 2,) * 8 + (0,) * 8
    assert budget - 1 < plan.mean <= budget


@pytest.mark.parametrize(("budget", "dominant", "contextual"), [(64, 54, 10), (128, 108, 20), (192, 162, 30)])
def test_visionzip_solves_to_the_published_settings(budget: int, dominant: int, contextual: int) -> None:
    plan = VisionZip().plan(576, 32, budget)
    assert (plan.dominant, plan.contextual, plan.counts) == (dominant, contextual, (budget,) * 32)


@pytest.mark.parametrize(
    ("budget", "layers"),
    [(64, [2, 8, 16]), (192, [2, 8, 16]), (230, [2, 8, 16, 24]), (270, [8, 16, 24]), (450, [8, 16, 24])],
)
def test_pyramiddrop_stages(budget: int, layers: list[int]) -> None:
    """Up to a share of 0.56 (192 tokens) the early stages, from the paper's 0.5 (270) on the paper's stages, in between
    both."""
    counts = PyramidDrop().plan(576, 32, budget).counts
    assert [layer for layer in range(1, 32) if counts[layer] != counts[layer - 1]] == layers
    if len(layers) == 3:
        first, second, third = (counts[layer] / 576 for layer in layers)
        assert first**2 == pytest.approx(second, abs=2 / 576) and first**3 == pytest.approx(third, abs=2 / 576)


def pyramid_path(depth: int) -> list[list[float]]:
    """Shares per layer along PyramidDrop's rule, from its floor to everything, written out layer by layer in small
    steps."""

    def pyramid(layers: tuple[int, int, int], share: float) -> list[float]:
        at = [max(1, layer * depth // 32) for layer in layers]
        return [share ** sum(first <= layer for first in at) for layer in range(depth)]

    early, late = (2, 8, 16), (8, 16, 24)
    steps = [i / 400 for i in range(401)]
    path = [pyramid(early, 0.56 * step) for step in steps]
    low, high = pyramid(early, 0.56), pyramid(late, 0.5)
    path += [[a + step * (b - a) for a, b in zip(low, high, strict=True)] for step in steps[1:]]
    return path + [pyramid(late, 0.5 + 0.5 * step) for step in steps[1:]]


@pytest.mark.parametrize("depth", [4, 8, 12, 27, 28, 32, 48])
@pytest.mark.parametrize("tokens", [64, 576])
def test_pyramiddrop_never_jumps(tokens: int, depth: int) -> None:
    """A budget is met to within one token, so a step of the budget by b moves along the path by b + 1 tokens of the
    mean at most, and a layer's count by that times the path's steepest slope there, and one more for rounding down."""
    path = pyramid_path(depth)
    means = [sum(shares) / depth for shares in path]
    assert means == sorted(means)
    slopes = [
        max(abs(y - x) for x, y in zip(a, b, strict=True)) / (high - low)
        for a, b, low, high in zip(path, path[1:], means, means[1:], strict=False)
    ]
    before = None
    for budget in range(math.ceil(tokens * means[0]), tokens + 1):
        plan = PyramidDrop().plan(tokens, depth, budget)
        assert budget - 1 < plan.mean <= budget
        here = min(range(len(means)), key=lambda i: abs(means[i] * tokens - plan.mean))
        assert max(
            abs(tokens * share - count) for share, count in zip(path[here], plan.counts, strict=True)
        ) < 1 + 2 * max(slopes)
        if before is not None:
            assert max(abs(a - b) for a, b in zip(before.counts, plan.counts, strict=True)) <= 2 * max(slopes) + 1
            assert plan.mean >= before.mean
        before = plan
    assert plan.counts == (tokens,) * depth


def test_fastv_takes_two_full_layers_where_they_fit() -> None:
    assert FastV().plan(576, 32, 64).counts[:3] == (576, 576, 29)  # 2 * 576 of 32 * 64 leave 896 for 30 layers
    assert FastV().plan(576, 32, 30).counts[:2] == (576, 12)  # 2 * 576 > 32 * 30, 1 * 576 leaves 384 for 31 layers


# ---- never above, within one token


BUDGETS = st.one_of(st.integers(1, 700), st.floats(0.001, 1.0, allow_nan=False))


@pytest.mark.parametrize("method", SOLVERS)
@many
@given(tokens=st.integers(1, 700), depth=st.integers(2, 48), budget=BUDGETS)
def test_never_above_the_budget_and_within_one_token(method: str, tokens: int, depth: int, budget: Any) -> None:
    target = target_mean(budget, tokens)
    try:
        plan = SOLVERS[method]().plan(tokens, depth, budget)
    except BudgetError as error:
        assert error.floor is not None and error.floor > target - 1e-9  # refused only below the floor
        assert f"{error.floor:.4g}" in str(error) and "Raise the budget" in str(error)
        return
    assert plan.mean <= target + 1e-6
    assert plan.mean > target - 1 - 1e-6 or tokens <= target
    assert plan.tokens == tokens and plan.entry <= tokens and len(plan.counts) == depth
    assert all(0 <= b <= a for a, b in zip((plan.entry, *plan.counts), plan.counts, strict=False))
    if target >= tokens:
        assert plan.counts == (tokens,) * depth and plan.entry == tokens


@pytest.mark.parametrize("method", SOLVERS)
@many
@given(tokens=st.integers(1, 700), depth=st.integers(2, 48))
def test_a_floor_is_the_smallest_budget_that_works(method: str, tokens: int, depth: int) -> None:
    with pytest.raises(BudgetError) as caught:
        SOLVERS[method]().plan(tokens, depth, 1e-7)
    floor = caught.value.floor
    assert floor is not None and 0 < floor <= tokens
    assert SOLVERS[method]().plan(tokens, depth, min(1.0, floor / tokens + 1e-9)).mean <= floor + 1e-5
    with pytest.raises(BudgetError):
        SOLVERS[method]().plan(tokens, depth, 0.999 * floor / tokens)


@pytest.mark.parametrize("method", SOLVERS)
@many
@given(tokens=st.integers(1, 300), depth=st.integers(4, 40), small=st.integers(1, 300), more=st.integers(0, 100))
def test_a_larger_budget_never_keeps_fewer(method: str, tokens: int, depth: int, small: int, more: int) -> None:
    try:
        few = SOLVERS[method]().plan(tokens, depth, small)
    except BudgetError:
        return
    assert SOLVERS[method]().plan(tokens, depth, small + more).mean >= few.mean - 1


COMPOSED: dict[str, duet_vlm.Reducer] = {
    "frames+duet": compose(Frames(), Duet()),
    "frames+visionzip": compose(Frames(keep=0.5), VisionZip()),
    "scope+duet_plus": compose(Scope(), DuetPlus()),
    "visionzip+pyramiddrop": compose(VisionZip(), PyramidDrop()),
    "visionzip+fastv": compose(VisionZip(), FastV()),
    "frames+scope+pyramiddrop": compose(Frames(), Scope(), PyramidDrop()),
    "frames+pyramiddrop": compose(Frames(), PyramidDrop()),
    "half the frames+pyramiddrop": compose(Frames(keep=0.5), PyramidDrop()),
    "five rows of frames+fastv": compose(Frames(keep=5), FastV()),
    "random after duet": RandomTokens(follow="duet"),
    "uniform after fastv": UniformTokens(follow="fastv"),
}
ALL: dict[str, duet_vlm.Reducer] = {**{name: method() for name, method in SOLVERS.items()}, **COMPOSED}


def floor_of(method: duet_vlm.Reducer, tokens: int, depth: int) -> float:
    with pytest.raises(BudgetError) as caught:
        method.plan(tokens, depth, 1e-7)
    assert caught.value.floor is not None
    return caught.value.floor


@pytest.mark.parametrize("depth", [3, 4, 12, 28])
@pytest.mark.parametrize("name", ALL)
def test_floors_of_small_spans_are_exact(name: str, depth: int) -> None:
    """A plan is made at the floor, with the floor as its mean, and at nothing below it."""
    for tokens in range(1, 65):
        floor = floor_of(ALL[name], tokens, depth)
        assert 0 < floor <= tokens
        assert ALL[name].plan(tokens, depth, floor / tokens).mean == pytest.approx(floor, abs=1e-12)
        with pytest.raises(BudgetError):
            ALL[name].plan(tokens, depth, floor / tokens * (1 - 1e-6))


@pytest.mark.parametrize("depth", [3, 32])
@pytest.mark.parametrize("name", ALL)
def test_small_spans_are_floored_to_the_floor(name: str, depth: int) -> None:
    """A fraction that a larger image could meet ends no batch for its smallest image; one that none could meet is an
    error."""
    method, large = ALL[name], 60_000
    for tokens in (1, 2, 5, 9, 36, 63, 64, 200):
        for budget in (0.004, 0.02, 0.11, 0.33):
            floor = floor_of(method, tokens, depth)
            if floor <= budget * tokens:
                assert plan_or_clamp(method, tokens, depth, budget) == method.plan(tokens, depth, budget)
            elif tokens < 64 and floor_of(method, large, depth) <= budget * large:
                plan = plan_or_clamp(method, tokens, depth, budget)
                assert plan.floored and plan.mean == pytest.approx(floor) and plan.tokens == tokens
                assert dataclasses.replace(plan, floored=False) == method.plan(tokens, depth, floor / tokens)
            else:
                with pytest.raises(BudgetError, match=r"floor is .* tokens") as caught:
                    plan_or_clamp(method, tokens, depth, budget)
                assert caught.value.floor == floor


@pytest.mark.parametrize(
    ("method", "size"), [(Scope, 1), (VisionZip, 1), (UniformTokens, 1), (Duet, 16 / 32), (DuetPlus, 8 / 32)]
)
def test_what_a_floored_span_keeps(method: Any, size: float) -> None:
    """One token: in every layer, or until the first drop of DUET's and of the deep schedule (half and a quarter of the
    depth)."""
    for tokens in (1, 4, 9):
        assert plan_or_clamp(method(), tokens, 32, 0.01).counts == (1,) * int(32 * size) + (0,) * int(32 - 32 * size)


def test_what_is_never_floored() -> None:
    for method, tokens, budget in (
        (Scope(options=TokenOptions(small_image_tokens=0)), 3, 0.1),
        (Scope(options=TokenOptions(small_image_tokens=9)), 9, 0.1),
        (FastV(), 9, 3 / 576),
        (PyramidDrop(), 60, 2),  # a token count is meant for every image
        (
            compose(
                Scope(options=TokenOptions(small_image_tokens=0)), Duet(options=TokenOptions(small_image_tokens=0))
            ),
            3,
            0.1,
        ),
    ):
        with pytest.raises(BudgetError):
            plan_or_clamp(method, tokens, 32, budget)
    assert (
        plan_or_clamp(Scope(options=TokenOptions(small_image_tokens=9)), 8, 32, 0.1).floored
        and plan_or_clamp(Scope(options=TokenOptions(small_image_tokens=500)), 499, 32, 0.001).floored
    )
    assert plan_or_clamp(
        compose(Scope(options=TokenOptions(small_image_tokens=9)), Duet(options=TokenOptions(small_image_tokens=9))),
        8,
        32,
        0.01,
    ).floored
    assert plan_or_clamp(FastV(), 100, 32, None) == FastV().plan(100, 32, None)
    with pytest.raises(BudgetError, match="duet needs a budget"):
        plan_or_clamp(Duet(), 9, 32, None)
    with pytest.raises(ValueError, match="small_image_tokens=-1: a number of visual tokens, at least 0"):
        Duet(options=TokenOptions(small_image_tokens=-1))
    with pytest.raises(ValueError, match="pyramiddrop wants small_image_tokens=9, duet 64; a composition has one"):
        compose(Duet(), PyramidDrop(options=TokenOptions(small_image_tokens=9)))


def test_a_floored_span_of_parts_stays_marked() -> None:
    def solve(tokens: int) -> SpanPlan:
        return plan_or_clamp(Scope(), tokens, 8, 0.02)

    plan = plan_parts(solve, 0.02, (4, 4, 4), 3, each=True, keep_structure=False)
    assert plan.floored and plan.entry == 1 and plan.parts == ((1, 0), (0, 0), (0, 0))
    assert not plan_parts(solve, 0.02, (40, 40), 3, each=True, keep_structure=False).floored


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("budget", [0.33, 0.22, 0.11])
def test_the_tiny_model(method: str, budget: float) -> None:
    """256 tokens and 12 layers: PyramidDrop and FastV run their first layer at full width, which is 1/12 = 8.3 %."""
    plan = SOLVERS[method]().plan(256, 12, budget)
    assert budget * 256 - 1 < plan.mean <= budget * 256


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
def test_methods_without_v2v_have_a_floor(method: str) -> None:
    full = {"fastv": 1, "pyramiddrop": 2}[method]
    for budget in (10, 10 / 576):
        with pytest.raises(
            BudgetError, match=rf"{method} cannot reach 10 .*floor is {576 * full / 32:.4g} tokens"
        ) as caught:
            SOLVERS[method]().plan(576, 32, budget)
        assert caught.value.floor == 576 * full / 32
    assert SOLVERS[method]().plan(576, 32, 576 * full // 32).mean == 576 * full / 32


@pytest.mark.parametrize("method", SOLVERS)
def test_small_images_stay_whole(method: str) -> None:
    for tokens in (1, 5, 63, 64):
        assert SOLVERS[method]().plan(tokens, 32, 64).counts == (tokens,) * 32
        assert SOLVERS[method]().plan(tokens, 32, 1.0).counts == (tokens,) * 32


@pytest.mark.parametrize("family", ["llava", "llava_gqa"])
def test_floors_are_found_at_attach_for_fixed_towers(family: str) -> None:
    model, tokens = shared(family), FAMILIES[family].tokens(None)  # type: ignore[arg-type]
    with pytest.raises(BudgetError) as caught:
        duet_vlm.attach(model, "fastv", budget=1)
    assert caught.value.floor == tokens / 8
    with duet_vlm.attach(model, "fastv", budget=math.ceil(tokens / 8)) as handle:
        assert handle.plan(tokens).counts[0] == tokens


# ---- explicit settings


def test_duet_default_schedule_belongs_to_the_paper() -> None:
    assert Duet(dominant=85, contextual=17).plan(576, 32, None).counts == (102,) * 16 + (51,) * 8 + (0,) * 8
    assert Duet(dominant=85, contextual=17).plan(576, 28, None).counts == (102,) * 14 + (51,) * 7 + (0,) * 7


def test_keeps_are_relative_to_decoder_entry_and_not_chained() -> None:
    plan = Duet(dominant=0.5, contextual=0, schedule=((2, 0.5), (4, 0.5), (6, 0.1))).plan(100, 8, None)
    assert plan.counts == (50, 50, 25, 25, 25, 25, 5, 5)


@many
@given(st.integers(0, 2000), st.integers(0, 1000))
def test_fractions_are_exact(tokens: int, thousandths: int) -> None:
    """floor(keep * n) of the decimal number that was written, not of its binary neighbour: 0.29 of 100 are 29."""
    assert count_of(thousandths / 1000, tokens) == tokens * thousandths // 1000


def test_released_roundings() -> None:
    assert [count_of(0.58, 50, rule) for rule in ("floor", "int", "round")] == [29, 28, 29]
    assert [count_of(0.29, 100, rule) for rule in ("floor", "int", "round")] == [29, 28, 29]
    assert [count_of(7, 5), count_of(7, 9), count_of(0.5, 5), count_of(1.0, 5), count_of(0.0, 5)] == [5, 7, 2, 5, 0]


def test_asking_for_more_than_there_is_keeps_all() -> None:
    plan = Duet(dominant=40, contextual=10, schedule=((2, 30),)).plan(20, 4, None)
    assert (plan.dominant, plan.contextual, plan.counts) == (20, 0, (20, 20, 20, 20))
    assert VisionZip(dominant=15, contextual=10).plan(20, 4, None).entry == 20


def test_none_keeps_everything_at_any_budget() -> None:
    for budget in (None, 1, 0.01, 10_000):
        assert NoReduction().plan(30, 8, budget).counts == (30,) * 8


@many
@given(st.integers(0, 60), st.integers(1, 20), st.lists(st.tuples(st.integers(0, 19), st.integers(0, 80)), max_size=4))
def test_layer_counts(entry: int, depth: int, stages: list[tuple[int, int]]) -> None:
    stages = sorted({layer: keep for layer, keep in stages if layer < depth}.items())
    expected = [min([entry, *(keep for layer, keep in stages if layer <= at)]) for at in range(depth)]
    assert layer_counts(entry, depth, tuple(stages)) == tuple(expected)


@many
@given(st.integers(0, 500), st.integers(-1, 500))
def test_largest(high: int, edge: int) -> None:
    assert largest_int(high, lambda n: n <= edge) == min(high, edge)


def test_budgets_are_counts_or_fractions() -> None:
    import numpy

    for good in (1, 576, 10**6, 0.5, 1.0, 1e-6, numpy.int64(4), numpy.float32(0.5), None):
        check_budget(good)
    assert (
        target_mean(64, 576) == 64
        and target_mean(0.25, 576) == 144
        and target_mean(1, 576) == 1
        and target_mean(1.0, 576) == 576
    )
    for bad in (True, "64", [64], 1 + 1j):
        with pytest.raises(TypeError, match="budget must be an int"):
            check_budget(bad)  # type: ignore[arg-type]
    for bad in (0, -3, 0.0, -0.5, 1.5, 64.0, math.nan, math.inf):
        with pytest.raises(BudgetError, match="budget="):
            check_budget(bad)


def test_schedules_are_normalised() -> None:
    assert check_schedule([[3, 0.5], [5, 2]]) == ((3, 0.5), (5, 2))
    assert Duet(schedule=[[3, 0.5]]).schedule == ((3, 0.5),)  # type: ignore[arg-type]
    assert hash(Duet(schedule=[[3, 0.5]])) == hash(Duet(schedule=((3, 0.5),)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", sorted(name for name, cls in duet_vlm.list_methods().items() if issubclass(cls, duet_vlm.EncoderReducer))
)
def test_what_enters_is_the_budget_where_nothing_drops_later(name: str) -> None:
    """Every count there is, and of fractions the largest count that is not above them; what the plan divides, it
    divides as for itself."""
    reducer = duet_vlm.make_method(name)
    for tokens in (1, 2, 7, 64, 65):
        for budget in range(1, tokens + 3):
            plan = reducer.plan_entry(tokens, budget, depth=12)
            assert (plan.tokens, plan.entry, plan.counts) == (tokens, min(budget, tokens), (min(budget, tokens),) * 12)
        for share in (0.01, 0.13, 0.5, 0.999, 1.0):
            assert reducer.plan_entry(tokens, share).entry == max(1, int(share * tokens + 1e-9))
    alike = next(plan for share in range(1, 577) if (plan := reducer.plan(576, 32, share / 576)).entry >= 64)
    assert reducer.plan_entry(576, alike.entry).contextual == alike.contextual
    with pytest.raises(duet_vlm.BudgetError, match="budget=0"):
        reducer.plan_entry(64, 0)


def test_counts_of_a_methods_own_and_a_budget_that_enters_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="either budget= or the method's own"):
        duet_vlm.get_method("visionzip")(dominant=5).plan_entry(64, 9)
