"""PruMerge, PruMerge+ and ToMe equal their slow twins: ragged spans, whole ones, one row, no row; what they plan and
refuse; and training."""

from __future__ import annotations

from typing import Any

import pytest
import reference_ops
import torch
from families import FAMILIES, FIRST, MIXED, ONE, forward, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import duet_vlm
from duet_vlm import EncoderView, SpanPlan
from duet_vlm.methods.encoder.prumerge import PruMerge
from duet_vlm.methods.encoder.prumerge_plus import PruMergePlus, adaptive
from duet_vlm.methods.encoder.tome import ToMe
from duet_vlm.methods.vision_tower.tome_tower import ToMeTower
from duet_vlm.ops.merge import merged_rows
from duet_vlm.ops.score import cls_attention, one_head
from duet_vlm.planning.tokens import Selection
from duet_vlm.profiling.model_dims import VisionDims
from duet_vlm.profiling.selection_cost import choice_flops
from duet_vlm.reducers.encoder import EncoderReducer
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.runtime.validation import check_selection

often = settings(max_examples=80, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
# (tokens, rows that enter) of up to three spans; whole ones included
spans = st.lists(st.integers(1, 24).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1, max_size=3)


def view_of(reducer: EncoderReducer, images: list[tuple[int, int]], seed: int) -> EncoderView:
    draw = torch.Generator().manual_seed(seed)
    width = max(n for n, _ in images)
    plans = tuple(reducer.plan(n, 4, budget) for n, budget in images)
    counts = torch.tensor([[p.dominant, p.contextual] for p in plans])
    valid = torch.arange(width) < torch.tensor([n for n, _ in images])[:, None]
    importance = torch.rand(len(images), width, generator=draw) ** 4
    return EncoderView(
        valid, counts[:, 0], counts[:, 1], plans, importance, torch.randn(len(images), width, 4, generator=draw)
    )


def checked(reducer: EncoderReducer, view: EncoderView) -> Selection:
    selection, code = check_selection(reducer, reducer.select_tokens(view), view, view.plans)
    assert int(code) == 0
    return selection


def made_of(selection: Selection, row: int) -> list[dict[int, float]]:
    """Token -> weight of each row of a span, in order."""
    assert selection.weights is not None
    rows: list[dict[int, float]] = []
    for number, (token, real) in enumerate(
        zip(selection.index[row].tolist(), selection.valid[row].tolist(), strict=True)
    ):
        if real:
            here = (selection.target_row[row] == number).nonzero().flatten()
            pairs = zip(selection.source_tokens[row, here].tolist(), selection.weights[row, here].tolist(), strict=True)
            made: dict[int, float] = {}
            for member, weight in pairs:
                made[member] = made.get(member, 0.0) + weight
            rows.append(made or {token: 1.0})
    return rows


def same(found: list[dict[int, float]], expected: list[dict[int, float]]) -> None:
    assert [sorted(row) for row in found] == [sorted(row) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    "reducer",
    [PruMerge(neighbours=3), PruMerge(neighbours=0), PruMergePlus(neighbours=5), PruMerge(neighbours=2, merge="sum")],
)
@often
@given(images=spans, seed=seeds)
def test_prumerge(reducer: PruMerge, images: list[tuple[int, int]], seed: int) -> None:
    view = view_of(reducer, images, seed)
    selection = checked(reducer, view)
    assert view.importance is not None and view.keys is not None
    for row, (plan, (n, entry)) in enumerate(zip(view.plans, images, strict=True)):
        assert plan.entry == entry and plan.contextual == (1 < entry < n)
        found = made_of(selection, row)
        if not plan.reduces_entry:
            assert found == [{token: 1.0} for token in range(n)]
            continue
        importance, keys = view.importance[row, :n].tolist(), view.keys[row, :n].tolist()
        kept = sorted(reference_ops.best(importance, [True] * n, plan.dominant))
        if isinstance(reducer, PruMergePlus):
            kept = reference_ops.prumerge_plus_entry(importance, plan.dominant, reducer.important)
        assert [int(t) for t in selection.index[row][selection.valid[row]]][: plan.dominant] == kept
        same(
            found,
            reference_ops.around(importance, keys, kept, reducer.neighbours, bool(plan.contextual), reducer.merge),
        )


@pytest.mark.parametrize("pace", [2, 4, 9])
@pytest.mark.parametrize("order", ["raster", "released"])
@often
@given(images=spans, seed=seeds)
def test_tome(order: str, pace: int, images: list[tuple[int, int]], seed: int) -> None:
    reducer = ToMe(order=order, pace=pace)
    view = view_of(reducer, images, seed)
    selection = checked(reducer, view)
    assert view.keys is not None
    for row, (n, entry) in enumerate(images):
        groups = reference_ops.tome_entry(view.keys[row, :n].tolist(), entry, order, pace)
        index = [int(t) for t in selection.index[row][selection.valid[row]]]
        assert index == [group[0] for group in groups]
        found: list[set[int]] = [{token} for token in index]
        for member, into in zip(selection.source_tokens[row].tolist(), selection.target_row[row].tolist(), strict=True):
            if into >= 0:
                found[into].add(member)
        assert found == [set(group) for group in groups]


def test_half_of_the_units_can_leave_in_a_block() -> None:
    """As many as look for another: every second one."""
    for units in (2, 3, 8, 9, 48):
        assert ToMeTower(
            keep=1, shares=(units // 2,), options=TokenOptions(protect_predicting_tokens=False)
        ).stage_counts(units, units - units // 2, 1) == [units - units // 2]
    with pytest.raises(ValueError, match="3 of 8 units cannot be reached, 4 are left"):
        ToMeTower(keep=3, shares=(5,)).stage_counts(8, 3, 1)


def test_ties_go_to_the_lower_index() -> None:
    """Keys all alike: the first other tokens are neighbours, and ToMe pairs the first places with the first odd one."""
    view = EncoderView(
        torch.ones(1, 6, dtype=torch.bool),
        torch.tensor([2]),
        torch.tensor([1]),
        (SpanPlan(6, 2, 1, (3,)),),
        torch.ones(1, 6),
        torch.ones(1, 6, 2),
    )
    same(
        made_of(PruMerge(neighbours=2, merge="sum").select_tokens(view), 0),
        [{0: 1, 1: 1, 2: 1}, {1: 1, 0: 1, 2: 1}, {2: 1, 3: 1, 4: 1, 5: 1}],
    )
    plan = SpanPlan(6, 4, 0, (4,))
    view = EncoderView(view.valid, torch.tensor([4]), torch.tensor([0]), (plan,), None, view.keys)
    selection = ToMe(pace=2).select_tokens(view)
    assert selection.index.tolist() == [[1, 3, 4, 5]] and selection.target_row.tolist() == [[0, -1, 0, -1, -1, -1]]


@pytest.mark.parametrize(
    "reducer", [PruMerge(), PruMergePlus(), ToMe(), PruMergePlus.official(0.25)], ids=lambda r: r.name
)
def test_nothing_is_read_back(reducer: EncoderReducer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every selection can be made of tensors without values."""
    keep = getattr(reducer, "keep", None)
    plans = tuple(reducer.plan(n, 2, None if keep else 9) for n in (40, 25, 9))
    count = torch.empty(3, dtype=torch.long, device="meta")
    view = EncoderView(
        torch.empty(3, 40, dtype=torch.bool, device="meta"),
        count,
        count,
        plans,
        torch.empty(3, 40, device="meta"),
        torch.empty(3, 40, 8, device="meta"),
    )
    for name in ("item", "tolist", "__bool__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("reads the device"))
    with torch.device("meta"):
        selection = reducer.select_tokens(view)
        rows = merged_rows(torch.empty(3, 40, 5, device="meta"), selection)
    # a whole span has no last row
    assert rows.shape[0] == 3 and rows.shape[1] - max(plan.entry for plan in plans) in (0, 1)


def test_plans() -> None:
    for cls in (PruMerge, PruMergePlus):
        assert cls().plan(576, 32, 64) == SpanPlan(576, 63, 1, (64,) * 32)
        assert cls().plan(576, 32, 1) == SpanPlan(576, 1, 0, (1,) * 32)
        assert cls().plan(2, 1, 1) == SpanPlan(2, 1, 0, (1,))
        assert cls(keep=64).plan(576, 1, None) == SpanPlan(576, 64, 1, (65,))
        assert cls(keep=8).plan(9, 1, None) == SpanPlan(9, 9, 0, (9,))  # no token is left for a last row
        assert cls(keep=0).plan(9, 1, None) == SpanPlan(9, 0, 1, (1,))
        assert cls().plan(50, 1, 64).entry == 50
        with pytest.raises(duet_vlm.BudgetError, match="at least one token enters"):
            cls().plan(5, 8, 0.1)
        with pytest.raises(duet_vlm.BudgetError, match="needs a budget"):
            cls().plan(5, 8, None)
    assert PruMerge.official().plan(576, 1, None).entry == 73
    assert (
        PruMerge(keep=0.58, rounding="int").plan(50, 1, None).entry == 29
        and PruMerge(keep=0.58).plan(50, 1, None).entry == 30
    )
    assert PruMergePlus.official().plan(576, 1, None).entry == 145
    assert ToMe().plan(576, 32, 64) == SpanPlan(576, 64, 0, (64,) * 32)


def test_adaptive_choice() -> None:
    """Outliers first, then the tokens of a grid of a third of their distance."""
    importance = torch.linspace(1, 1.1, 64)
    importance[[5, 40, 12, 20]] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    # 64 / 4 = 16, 16 // 3 = 5
    assert adaptive(importance).tolist() == [5, 40, 12, 20, 0, 10, 15, 25, 30, 35, 45, 50, 55, 60]
    with pytest.raises(ValueError, match="0% of the tokens are outliers"):
        adaptive(torch.ones(9))


def test_a_token_kept_twice_has_two_rows_and_the_lowest_other_is_lost() -> None:
    """The released rule of training: token 2 is attended, and on the grid 2, 6, 10, 14."""
    reducer = PruMergePlus.official(0.25, neighbours=2)
    plan = reducer.plan(16, 1, None)
    assert (plan.dominant, plan.contextual) == (4 + 4, 1)  # 2, 6, 10, 14
    importance = torch.full((1, 16), 0.1)
    importance[0, [2, 3, 7, 9]] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    keys = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(1))
    view = EncoderView(
        torch.ones(1, 16, dtype=torch.bool), torch.tensor([8]), torch.tensor([1]), (plan,), importance, keys
    )
    selection = checked(reducer, view)
    assert selection.index[0, :8].tolist() == [2, 3, 7, 9, 0, 6, 10, 14]  # the second row of 2 stands where 0 is lost
    rows = made_of(selection, 0)
    for row in (0, 4):  # each takes in the other, its most similar one, with the attention that it has
        assert rows[row][2] == pytest.approx(1 + 4.0) and len(rows[row]) == 2
    assert not any(0 in row for row in rows)
    assert sorted(rows[8]) == [1, 4, 5, 8, 11, 12, 13, 15]


def test_one_head_reads_the_tower_as_one(request: pytest.FixtureRequest) -> None:
    """What a method is shown with signal_heads="one" equals the attention of the joined heads, of the layer that it
    names."""
    model, inputs = shared("llava"), FAMILIES["llava"].inputs([ONE])
    seen: list[EncoderView] = []

    class Probe(PruMerge):
        def select_tokens(self, view: EncoderView) -> Selection:
            seen.append(view)
            return super().select_tokens(view)

    attention = model.model.vision_tower.encoder.layers[-1].self_attn
    raw: dict[str, Tensor] = {}
    for name in ("q_proj", "k_proj"):
        hook = getattr(attention, name).register_forward_hook(
            lambda module, args, output, name=name: raw.update({name: output.detach()})
        )
        request.addfinalizer(hook.remove)
    with duet_vlm.attach(model, Probe.official(4)):
        forward(model, inputs)
    query, key = raw["q_proj"], raw["k_proj"]
    torch.testing.assert_close(seen[0].keys, key[:, 1:])
    weights = (query[:, :1] @ key.transpose(1, 2) * key.shape[2] ** -0.5).softmax(-1)[:, 0, 1:]
    torch.testing.assert_close(seen[0].importance, weights)
    split = [x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in (query, key)]
    joined = one_head(*split, attention.head_dim**-0.5)
    torch.testing.assert_close(cls_attention(*joined), weights)


def test_flops_count_matching_and_merging() -> None:
    plan = SpanPlan(100, 9, 1, (10,))
    tower = VisionDims(
        layers=1,
        width=32,
        mlp=64,
        mlp_matrices=2,
        patches_per_token=1,
        extra_rows=1,
        patch_inputs=12,
        projector=((32, 64),),
    )
    assert choice_flops(PruMerge(keep=9), (plan,), 8, 32, tower) == 2 * 9 * 100 * 8 + 2 * 10 * 100 * 32
    assert (
        choice_flops(ToMe(keep=25, pace=2), (SpanPlan(100, 25, 0, (25,)),), 8, 32, tower) == 2 * (50 * 50 + 25 * 25) * 8
    )


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("prumerge", {"keep": 1.5}, "keep=1.5: a float is a fraction"),
        ("prumerge", {"neighbours": -1}, "neighbours=-1"),
        ("prumerge", {"merge": "anchor_plus_mean"}, "merge='anchor_plus_mean': choose one of 'mean', 'sum'"),
        ("prumerge", {"order": "size"}, "order='size'"),
        ("prumerge", {"signal_heads": "all"}, "signal_heads='all': choose one of 'each', 'one'"),
        ("prumerge", {"options": {"cls_token": True, "positions": "compact"}}, "the CLS row has no attention"),
        ("prumerge_plus", {"important": 2.0}, "important=2.0: a share"),
        ("prumerge_plus", {"spacing": "odd"}, "spacing='odd'"),
        ("tome", {"order": "size"}, "order='size'"),
        ("tome", {"pace": 1}, "pace=1: at most every second token"),
        ("tome", {"options": {"cls_token": True, "positions": "compact"}}, "the CLS row would be merged"),
    ],
)
def test_bad_settings(method: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        duet_vlm.make_method(method, **fields)


def test_the_grid_needs_a_count() -> None:
    with pytest.raises(ValueError, match="spacing='grid' has counts of its own"):
        PruMergePlus(spacing="grid").plan(64, 4, 8)
    with pytest.raises(ValueError, match="keep=0.01 of 64 tokens is none"):
        PruMergePlus.official(0.01).plan(64, 4, None)


@pytest.mark.parametrize("method", ["prumerge", "prumerge_plus", "tome"])
@pytest.mark.parametrize("family", FIRST)
def test_gradient_reaches_the_tower_and_autocast_leaves_the_merge_alone(family: str, method: str) -> None:
    model, inputs = shared(family), FAMILIES[family].inputs([ONE])
    tower = getattr(model.model, "visual", None) or model.model.vision_tower
    first = next(p for name, p in tower.named_parameters() if "patch" in name and p.requires_grad)
    with duet_vlm.attach(model, method, budget=0.4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        (gradient,) = torch.autograd.grad(loss, [first])
    assert gradient.isfinite().all() and bool(gradient.any())


@pytest.mark.parametrize("parts", ["joint", "per_crop"])
def test_weights_pass_through_parts_and_compositions(parts: str) -> None:
    """A clip frame by frame, and within a pool: everything that is merged is in the pool."""
    for name, fields in (
        ("prumerge", {"options": {"crops": parts}}),
        ("frames+prumerge", {"frames_keep": 0.8} if parts == "joint" else {}),
    ):
        model = shared("qwen2_5_vl")
        with duet_vlm.attach(model, name, budget=0.4, **fields) as handle:
            forward(model, FAMILIES["qwen2_5_vl"].inputs(MIXED))
            assert any(span.merged for row in handle.trace for span in row)
