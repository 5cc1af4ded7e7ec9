"""Greedy choices equal their slow twins: ragged spans, ties, duplicates, all tokens, none; and what they must do by
definition."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import reference_ops
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duet_vlm import EncoderView, SpanPlan
from duet_vlm.methods.encoder.divprune import DivPrune
from duet_vlm.methods.encoder.fastervlm import FasterVLM
from duet_vlm.methods.encoder.scope import Scope
from duet_vlm.methods.encoder.vispruner import VisPruner
from duet_vlm.methods.two_stage.duet_plus import DuetPlus
from duet_vlm.ops import greedy
from duet_vlm.reducers.encoder import EncoderReducer

many = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)

# lengths 1 and 2, so that every cosine is a multiple of 1/2 and sums are exact: ties are ties, and duplicates abound
EXACT = [
    [1.0, 0, 0, 0],
    [0, 1.0, 0, 0],
    [0, 0, -1.0, 0],
    [1.0, 1, 1, 1],
    [1.0, -1, 1, 1],
    [-1.0, 1, 1, -1],
    [0.0, 0, 0, 0],
]


@st.composite
def spans(draw: Any, largest: int = 12) -> list[tuple[int, int]]:
    """(tokens, how many to choose) of up to three images, none and all included."""
    sizes = draw(st.lists(st.integers(1, largest), min_size=1, max_size=3))
    return [(n, draw(st.integers(0, n))) for n in sizes]


def view_of(images: list[tuple[int, int]], seed: int, exact: bool) -> EncoderView:
    """Spans padded on the right; importance and features either random or of few exact values."""
    draw, width, batch = torch.Generator().manual_seed(seed), max(n for n, _ in images), len(images)
    if exact:
        features = torch.tensor(EXACT)[torch.randint(len(EXACT), (batch, width), generator=draw)]
        importance = torch.randint(1, 4, (batch, width), generator=draw) / 4
    else:
        features, importance = torch.randn(batch, width, 5, generator=draw), torch.rand(batch, width, generator=draw)
    valid = torch.arange(width) < torch.tensor([n for n, _ in images])[:, None]
    counts = torch.tensor([count for _, count in images])
    plans = tuple(SpanPlan(n, count, 0, (count,) * 4) for n, count in images)
    rows = features * valid[..., None]
    return EncoderView(valid, counts, torch.zeros_like(counts), plans, importance, rows, rows)


def chosen_by(method: EncoderReducer, view: EncoderView) -> list[list[int]]:
    selection = method.select_tokens(view)
    assert selection.source_tokens.shape[1] == 0
    return [index[valid].tolist() for index, valid in zip(selection.index, selection.valid, strict=True)]


def rows_of(table: Tensor | None, sample: int, tokens: int) -> Any:
    assert table is not None
    return table[sample, :tokens].double().tolist()


def exponent(alpha: float, exact: bool) -> float:
    """No roots where ties must be exact. Without saliency two tokens that cover only each other tie whatever they are,
    and rounding decides."""
    return round(alpha) if exact else max(alpha, 0.5)


@many
@given(spans(), seeds, st.booleans(), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_scope(images: list[tuple[int, int]], seed: int, exact: bool, alpha: float) -> None:
    alpha = exponent(alpha, exact)
    view = view_of(images, seed, exact)
    for sample, ((tokens, count), found) in enumerate(zip(images, chosen_by(Scope(alpha=alpha), view), strict=True)):
        expected = reference_ops.scope_entry(
            rows_of(view.importance, sample, tokens), rows_of(view.features, sample, tokens), count, alpha
        )
        assert found == sorted(expected)


@many
@given(spans(), seeds, st.booleans(), st.integers(1, 5))
def test_several_picks_per_step(images: list[tuple[int, int]], seed: int, exact: bool, picks: int) -> None:
    view = view_of(images, seed, exact)
    for sample, ((tokens, count), found) in enumerate(zip(images, chosen_by(Scope(picks=picks), view), strict=True)):
        signals = rows_of(view.importance, sample, tokens), rows_of(view.features, sample, tokens)
        expected = (
            reference_ops.cover_in_steps(*signals, count, picks)
            if picks > 1
            else reference_ops.scope_entry(*signals, count, 1.0)
        )
        assert found == sorted(expected)


@many
@given(spans(), seeds, st.booleans())
def test_divprune(images: list[tuple[int, int]], seed: int, exact: bool) -> None:
    view = view_of(images, seed, exact)
    for sample, ((tokens, count), found) in enumerate(zip(images, chosen_by(DivPrune(), view), strict=True)):
        assert found == sorted(reference_ops.divprune_entry(rows_of(view.features, sample, tokens), count))


@many
@given(spans(), seeds, st.booleans(), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_vispruner(images: list[tuple[int, int]], seed: int, exact: bool, important: float) -> None:
    view = view_of(images, seed, exact)
    for sample, ((tokens, count), found) in enumerate(
        zip(images, chosen_by(VisPruner(important=important), view), strict=True)
    ):
        signals = rows_of(view.importance, sample, tokens), rows_of(view.features, sample, tokens)
        assert found == reference_ops.vispruner_entry(*signals, count, int(count * important))


@many
@given(spans(), seeds, st.booleans())
def test_fastervlm(images: list[tuple[int, int]], seed: int, exact: bool) -> None:
    view = view_of(images, seed, exact)
    for sample, ((tokens, count), found) in enumerate(zip(images, chosen_by(FasterVLM(), view), strict=True)):
        importance = rows_of(view.importance, sample, tokens)
        assert found == sorted(sorted(range(tokens), key=lambda v: (-importance[v], v))[:count])


@many
@given(
    spans(),
    seeds,
    st.booleans(),
    st.integers(0, 2),
    st.sampled_from([0.0, 0.3, 0.5, 1.0, 20.0]),
    st.sampled_from([-1.0, 0.0, 0.5, 1.0]),
)
def test_duet_plus(
    images: list[tuple[int, int]], seed: int, twice: bool, alpha: float, pool: float, tau: float
) -> None:
    """Ties are between tokens that are the same: of others the order of additions would decide, so copies come with
    saliency."""
    view = view_of(images, seed, False)
    if twice:
        alpha, tau = max(alpha, 1), min(tau, 0.9)  # of copies the cosine is 1 but for rounding
        index = torch.randint(
            min(3, view.valid.shape[1]), view.valid.shape, generator=torch.Generator().manual_seed(seed)
        )
        assert view.features is not None and view.importance is not None
        features, importance = (
            view.features.gather(1, index[..., None].expand_as(view.features)),
            view.importance.gather(1, index),
        )
        view = dataclasses.replace(view, features=features * view.valid[..., None], importance=importance)
    selection = DuetPlus(schedule=(), alpha=alpha, pool=pool, tau=tau).select_tokens(view)
    for sample, (tokens, count) in enumerate(images):
        signals = rows_of(view.importance, sample, tokens), rows_of(view.features, sample, tokens)
        chosen, clusters = reference_ops.duet_plus_entry(*signals, count, alpha, pool, tau)
        rows = selection.index[sample].tolist()
        assert [i for i, ok in zip(rows, selection.valid[sample], strict=True) if ok] == chosen
        found: dict[int, list[int]] = {token: [] for token in chosen}
        for member, into in zip(
            selection.source_tokens[sample].tolist(), selection.target_row[sample].tolist(), strict=True
        ):
            if into >= 0:
                found[rows[into]].append(member)
        assert found == clusters


@many
@given(spans(), seeds, st.integers(1, 5))
def test_padding_and_neighbours_in_the_batch_change_nothing(
    images: list[tuple[int, int]], seed: int, spare: int
) -> None:
    """Garbage in padding rows and images beside it leave a span's choice alone."""
    view = view_of(images, seed, exact=True)
    assert view.importance is not None and view.features is not None
    grown = EncoderView(
        torch.cat([view.valid, torch.zeros(len(images), spare, dtype=torch.bool)], 1), view.dominant, view.contextual, view.plans,
        torch.cat([view.importance, torch.full((len(images), spare), 9.0)], 1), None,
        torch.cat([view.features, torch.ones(len(images), spare, 4)], 1),
    )  # fmt: skip
    for method in (Scope(), DivPrune()):
        together = chosen_by(method, view)
        assert chosen_by(method, grown) == together
        for sample, (tokens, _) in enumerate(images):
            one = slice(sample, sample + 1)
            alone = EncoderView(
                view.valid[one, :tokens], view.dominant[one], view.contextual[one], view.plans[one], view.importance[one, :tokens], None,
                view.features[one, :tokens],
            )  # fmt: skip
            assert chosen_by(method, alone) == [together[sample]]


def choose(features: Tensor, importance: Tensor, count: int, alpha: float = 1.0) -> list[int]:
    """The picks in order: what each larger count adds."""
    order: list[int] = []
    for n in range(1, count + 1):
        plan = (SpanPlan(len(features), n, 0, (n,)),)
        valid = torch.ones(1, len(features), dtype=torch.bool)
        view = EncoderView(valid, torch.tensor([n]), torch.tensor([0]), plan, importance[None], None, features[None])
        order += set(chosen_by(Scope(alpha=alpha), view)[0]) - set(order)
    return order


@given(seeds)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_scope_without_saliency_is_facility_location(seed: int) -> None:
    """alpha = 0: the first pick has the largest column sum of positive similarities, and saliency plays no part."""
    draw = torch.Generator().manual_seed(seed)
    features, importance = torch.randn(10, 4, generator=draw), torch.rand(10, generator=draw)
    unit = torch.nn.functional.normalize(features, dim=1)
    order = choose(features, importance, 10, alpha=0.0)
    assert order[0] == int((unit @ unit.T).clamp(min=0).sum(0).argmax())
    assert order == choose(features, importance.flip(0), 10, alpha=0.0)
    assert sorted(order) == list(range(10))


def test_scope_with_strong_saliency_is_top_k() -> None:
    """Saliencies that differ by more than any gain can: the ranking by saliency is left."""
    features, importance = torch.eye(6) + 0.1, torch.tensor([1e0, 1e8, 1e4, 1e12, 1e16, 1e20])
    assert choose(features, importance, 6) == [5, 4, 3, 1, 2, 0]


def test_scope_prefers_what_is_not_covered_yet() -> None:
    """Two groups of equal rows: the second pick comes from the other group, although its saliency is far lower."""
    features = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 2)
    importance = torch.tensor([0.5, 1.0, 0.9, 0.9, 0.9, 0.01, 0.02])
    assert choose(features, importance, 3) == [1, 6, 0]  # then all gains are zero: the lowest index


def test_tokens_that_gain_the_same_tie() -> None:
    """Two that are nearest to each other cover the same, whatever rounding makes of the sums: the lower index."""
    for seed in range(200):
        rows = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(seed))
        table = greedy.cosine(rows, torch.ones(1, 3, dtype=torch.bool))
        if float(table[0, 1, 2]) > max(0.0, float(table[0, 0, 1:].amax())):
            chosen = greedy.greedy_coverage(
                table, torch.tensor([[9.0, 1.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool), torch.tensor([2]), 2
            )
            assert chosen.tolist() == [[True, True, False]]


def test_a_row_of_largest_importance_comes_first() -> None:
    """The CLS row of models that feed it is given the largest float as its importance."""
    features, importance = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.rand(5)
    importance[2] = torch.finfo(torch.float32).max
    assert choose(features, importance, 5)[0] == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_similarity_is_float32_whatever_the_model_is(dtype: torch.dtype) -> None:
    rows = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    valid = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    found = greedy.cosine(rows, valid)
    assert found.dtype == torch.float32 and torch.equal(found, greedy.cosine(rows.float(), valid))
    for b in range(2):
        for i in range(7):
            for j in range(7):
                expected = (
                    reference_ops.cosine(rows[b, i].tolist(), rows[b, j].tolist())
                    if valid[b, i] and valid[b, j]
                    else 0.0
                )
                assert float(found[b, i, j]) == pytest.approx(expected, abs=1e-6)


def test_tokens_that_differ_by_rounding_only_tie_for_the_largest_determinant() -> None:
    kernel = torch.diag(torch.tensor([0.5, 1.0, 1.0 + 5e-7]))[None]
    chosen = greedy.greedy_dpp_map(kernel, torch.ones(1, 3, dtype=torch.bool), torch.tensor([1]), 1)
    assert chosen.tolist() == [[False, True, False]]
