"""Building blocks by name: equal to the methods that they are taken from, right in every combination, refused where
they cannot be."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import cache
from typing import Any

import pytest
import reference_ops
import torch
from families import FAMILIES, FIRST, ONE, TEXT, THREE, TWO, build, forward, shared
from test_invariants import alive, surviving_logits
from test_ops_clips import dpc
from torch import Tensor

import duet_vlm
from duet_vlm import EncoderView
from duet_vlm.ops import saliency
from duet_vlm.ops.merge import merged_rows
from duet_vlm.ops.merge_targets import merge_into_nearest
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.encoder_view import LayerView, QuestionView
from duet_vlm.reducers.inputs import FEATURE_INPUTS, VISION_LAYER_INPUTS, Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.runtime.validation import check_selection
from duet_vlm_lab.methods.building_blocks import CLOSEST, MERGERS, SCHEDULES, SCORERS, SELECTORS, TAKEN
from duet_vlm_lab.methods.custom import Custom

PICTURES = [(6, 6), (4, 5), (3, 3), (2, 3), (1, 1)]
EVERY = list(itertools.product(SCORERS, SELECTORS, MERGERS))

DUET_PLUS = {
    "selector": "determinantal",
    "merger": "close",
    "schedule": "tapered",
    "scale": "largest",
    "alpha": 0.5,
    "ridge": 0.05,
}

# a method with settings, and the blocks that are the same
SAME: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("fastervlm", {}, {}),
    ("scope", {}, {"selector": "coverage"}),
    ("scope", {"alpha": 0.5}, {"selector": "coverage", "alpha": 0.5}),
    ("divprune", {}, {"selector": "max_min", "compare": "projected"}),
    ("cdpruner", {}, {"scorer": "relevance", "selector": "determinantal"}),
    ("zoo_prune", {"directions": saliency.DIRECTIONS}, {"scorer": "sensitivity", "selector": "apart"}),
    ("vispruner", {"important": 0.3}, {"selector": "distinct", "important": 0.3}),
    ("holov", {"beta": 0.0}, {"selector": "stretches"}),
    ("frames", {}, {"selector": "even"}),  # of images
    ("visionzip", {}, {"merger": "spaced", "compare": "keys"}),
    ("prumerge", {"neighbours": TAKEN}, {"merger": "neighbours", "compare": "keys"}),
    ("duet", {}, {"merger": "local", "compare": "keys", "schedule": "duet"}),
    ("duet", {"cluster_width": 2}, {"merger": "local", "compare": "keys", "schedule": "duet", "pool": 2}),
    ("duet_plus", {}, DUET_PLUS),
    ("duet_plus", {"pool": 1.5, "tau": 0.1, "alpha": 2.0}, DUET_PLUS | {"pool": 1.5, "tau": 0.1, "alpha": 2.0}),
]


@pytest.mark.parametrize("budget", [0.08, 0.2, 0.5, 7])
@pytest.mark.parametrize("family", FIRST)
@pytest.mark.parametrize(("method", "settings", "blocks"), SAME, ids=lambda x: x if isinstance(x, str) else "")
def test_blocks_are_the_method(
    family: str, method: str, settings: dict[str, Any], blocks: dict[str, Any], budget: float
) -> None:
    """The same plans, the same survivors and members, the same logits to the last bit."""
    model, inputs, found = shared(family), FAMILIES[family].inputs((ONE, THREE, TEXT, TWO)), []
    for name, given in ((method, settings), ("custom", blocks)):
        with duet_vlm.attach(model, name, budget=budget, **given) as handle:
            logits = forward(model, inputs).logits
            found.append((handle.trace, logits, [handle.plan(n) for n in (12, 20, 36, 300)]))
    (trace, logits, plans), (again, logits_again, plans_again) = found
    assert trace == again and plans == plans_again and torch.equal(logits, logits_again)


def test_drops_alone_are_those_of_duet() -> None:
    model, inputs, found = shared("llava"), FAMILIES["llava"].inputs((ONE, TWO)), []
    for name in ("duet", "custom"):
        with duet_vlm.attach(model, name, schedule=((3, 0.6), (5, 0.25))) as handle:
            found.append((forward(model, inputs).logits, handle.trace))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


# ---- every combination, on views


def view_of(reducer: Custom, budget: float, seed: int = 0, width: int = 12) -> EncoderView:
    """Pictures of several sizes in all that any block looks at; padding holds numbers that would win."""
    draw, sizes = torch.Generator().manual_seed(seed), [rows * columns for rows, columns in PICTURES]
    batch, most = len(sizes), max(sizes)
    valid = torch.arange(most) < torch.tensor(sizes)[:, None]

    def some(*more: int) -> Tensor:
        return torch.randn(batch, most, *more, generator=draw).masked_fill(
            ~valid.view(batch, most, *(1 for _ in more)), 9.0
        )

    importance, features, keys = some().abs(), some(width), some(width)
    wide = torch.tensor([columns for _, columns in PICTURES])[:, None]
    token = torch.arange(most).expand(batch, -1)
    plans = tuple(reducer.plan(n, 8, budget) for n in sizes)
    count = torch.tensor([[plan.dominant, plan.contextual] for plan in plans])
    turned = torch.randn(width, width, generator=draw)
    words = QuestionView(torch.randn(batch, 3, width, generator=draw), torch.tensor([[True, True, False]] * batch))
    return EncoderView(
        valid, count[:, 0], count[:, 1], plans, importance, keys, features, torch.where(valid, 0, -1), layers=(LayerView(importance, keys=keys),),
        coords=torch.stack([token // wide, token % wide], 2).masked_fill(~valid[..., None], -1), grid_size=torch.tensor(PICTURES),
        crop_grid=torch.zeros(batch, 2).long(), question=words, project=lambda change: change(features).tanh() @ turned,
    )  # fmt: skip


def alone(view: EncoderView, row: int) -> EncoderView:
    """One picture of a view, without padding."""
    tokens = view.plans[row].tokens
    cut = view.select_rows(lambda x: x[row : row + 1, :tokens], lambda x: x[row : row + 1])
    return dataclasses.replace(
        cut,
        dominant=view.dominant[row : row + 1],
        contextual=view.contextual[row : row + 1],
        plans=view.plans[row : row + 1],
    )


def made_of(selection: Selection, row: int) -> dict[int, dict[int, float]]:
    """Where each row stands -> what joins it, with which weight."""
    made: dict[int, dict[int, float]] = {}
    weights = (
        torch.ones_like(selection.source_tokens, dtype=torch.float32)
        if selection.weights is None
        else selection.weights
    )
    for number, (token, real) in enumerate(
        zip(selection.index[row].tolist(), selection.valid[row].tolist(), strict=True)
    ):
        if real:
            here = selection.target_row[row] == number
            pairs = zip(selection.source_tokens[row, here].tolist(), weights[row, here].tolist(), strict=True)
            made[token] = {member: weight for member, weight in pairs if weight}
    return made


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("scorer", SCORERS)
def test_every_combination_chooses_as_planned(scorer: str, selector: str) -> None:
    """Exactly as many rows as planned, nothing twice, nothing of padding (what the flow checks); a picture alone
    chooses the same."""
    for turn, merger in enumerate(MERGERS):
        reducer = Custom(
            scorer=scorer, selector=selector, merger=merger, compare=("features", "keys")[turn % 2], window=2
        )
        view = view_of(reducer, 7, seed=turn)
        selection, code = check_selection(reducer, reducer.select_tokens(view), view, view.plans)
        assert int(code) == 0 and [plan.entry for plan in view.plans] == [7, 7, 7, 6, 1]
        assert bool(torch.isfinite(merged_rows(view.features, selection)[selection.valid]).all())  # type: ignore[arg-type]
        for row, plan in enumerate(view.plans):
            found, single = made_of(selection, row), made_of(reducer.select_tokens(alone(view, row)), 0)
            assert found.keys() == single.keys() and len(found) == plan.entry
            assert all(found[token] == pytest.approx(single[token], rel=1e-4) for token in found)
            if not plan.reduces_entry:  # whole pictures stay bit for bit: nobody joins anybody
                assert not any(found.values())


PAIRED = tuple(family for family in FIRST if family != "llava_gqa")  # which has the tower and the projector of llava


@pytest.mark.parametrize(("selector", "merger"), list(itertools.product(SELECTORS, MERGERS)))
@pytest.mark.parametrize("family", PAIRED)
def test_every_pair_in_a_model(family: str, selector: str, merger: str) -> None:
    """Budgets exact, predictions measured, a row of a batch as alone, nothing left behind; scorers, schedules and what
    is compared take turns."""
    check_in_a_model(family, selector, merger)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in PAIRED])
def test_some_on_every_family(family: str, selector: str) -> None:
    check_in_a_model(family, selector, list(MERGERS)[list(SELECTORS).index(selector) % len(MERGERS)])


def check_in_a_model(family: str, selector: str, merger: str) -> None:
    first, second = list(SELECTORS).index(selector), list(MERGERS).index(merger)
    scorer, schedule = (
        list(SCORERS)[(first + second) % len(SCORERS)],
        ("none", *SCHEDULES)[(first + 2 * second) % (1 + len(SCHEDULES))],
    )
    compare = ("features", "projected", "keys")[(first + second) % 3]
    rows, model = (ONE, TEXT, TWO), shared(family)
    inputs = FAMILIES[family].inputs(rows)
    settings = {
        "scorer": scorer,
        "selector": selector,
        "merger": merger,
        "schedule": schedule,
        "compare": compare,
        "window": 2,
    }
    before = plain(family)
    with duet_vlm.attach(model, "custom", budget=0.3, **settings) as handle:
        together = forward(model, inputs, use_cache=True)
        report, slots, traces = handle.report(), handle.slots, handle.trace
        spans = [span.span.tokens for row in traces for span in row]
        assert all(handle.plan(n).mean <= 0.3 * n for n in spans if not handle.plan(n).floored)
        assert report.predicted == report.observed and report.nominal == report.measured
        sample = (first + second) % 2 * 2  # the shorter one has padding in the batch, the longer one two pictures
        expected = forward(model, FAMILIES[family].inputs([rows[sample]])).logits
        pad = int((inputs["attention_mask"][sample] == 0).sum())
        assert alive(traces[sample]) == alive(handle.trace[0])
        assert [span.merged for span in traces[sample]] == [span.merged for span in handle.trace[0]]
        places, logits = surviving_logits(together.logits, slots, sample)
        own_places, own_logits = surviving_logits(expected, handle.slots, 0)
        assert [p - pad for p in places] == own_places
        torch.testing.assert_close(logits, own_logits, rtol=1e-3, atol=2e-4)
    assert torch.equal(forward(model, inputs).logits, before)


@cache
def plain(family: str) -> Tensor:
    """Logits of the model before anything was attached to it here."""
    return forward(shared(family), FAMILIES[family].inputs((ONE, TEXT, TWO))).logits


@pytest.mark.parametrize(("scorer", "selector", "merger"), EVERY[:: len(EVERY) // 16])
def test_keeping_everything_changes_nothing(scorer: str, selector: str, merger: str) -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs((ONE, TWO))
    plain = forward(model, inputs).logits
    with duet_vlm.attach(model, "custom", keep=1.0, scorer=scorer, selector=selector, merger=merger):
        assert torch.equal(forward(model, inputs).logits, plain)


@pytest.mark.parametrize("merger", MERGERS)
@pytest.mark.parametrize("selector", SELECTORS)
def test_nothing_is_read_back(selector: str, merger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every selection can be made of tensors without values."""
    reducer = Custom(selector=selector, merger=merger, window=2)
    shown = view_of(reducer, 7)
    everything = shown.select_rows(lambda x: x.to("meta"), lambda x: x.to("meta"))
    view = dataclasses.replace(everything, dominant=shown.dominant.to("meta"), contextual=shown.contextual.to("meta"))
    for name in ("item", "tolist", "__bool__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("reads the device"))
    with torch.device("meta"):
        for scorer in SCORERS if merger == "none" and selector == "top" else ("importance",):
            assert dataclasses.replace(reducer, scorer=scorer).select_tokens(view).index.shape[0] == len(PICTURES)


# ---- blocks that no other test sees, by loops


def numbers(view: EncoderView, row: int) -> tuple[list[float], Any, Any]:
    n = view.plans[row].tokens
    assert view.importance is not None and view.features is not None and view.keys is not None
    return view.importance[row, :n].tolist(), view.features[row, :n].tolist(), view.keys[row, :n].tolist()


@pytest.mark.parametrize("scorer", ["key_norm", "feature_norm", "contrast", "uniform"])
def test_scores_by_hand(scorer: str) -> None:
    reducer = Custom(scorer=scorer)
    view = view_of(reducer, 7)
    for row, plan in enumerate(view.plans):
        _, features, keys = numbers(view, row)
        mean = [sum(column) / len(features) for column in zip(*features, strict=True)]
        score = {
            "key_norm": [-math.hypot(*key) for key in keys],
            "feature_norm": [math.hypot(*each) for each in features],
            "contrast": [math.dist(each, mean) for each in features],
            "uniform": [1.0 for _ in features],
        }[scorer]
        kept = reference_ops.best(score, [True] * plan.tokens, plan.entry)
        assert sorted(made_of(reducer.select_tokens(view), row)) == sorted(kept)


@pytest.mark.parametrize("side", [1, 2, 3, 9])
def test_windows_share_by_hand(side: int) -> None:
    """Each window keeps its part of the budget: rounded down, then one more for the largest remainders."""
    reducer = Custom(selector="windows", window=side)
    view = view_of(reducer, 7)
    for row, (plan, (rows, columns)) in enumerate(zip(view.plans, PICTURES, strict=True)):
        importance, _, _ = numbers(view, row)
        down, across = max(1, rows // side), max(1, columns // side)
        windows: dict[int, list[int]] = {}
        for token in range(plan.tokens):
            at = min(token // columns // side, down - 1) * across + min(token % columns // side, across - 1)
            windows.setdefault(at, []).append(token)
        exact = {at: plan.entry * len(tokens) / plan.tokens for at, tokens in windows.items()}
        quota = {at: math.floor(share + 1e-9) for at, share in exact.items()}
        for at in sorted(windows, key=lambda at: (-round(exact[at] - quota[at], 9), at))[
            : plan.entry - sum(quota.values())
        ]:
            quota[at] += 1
        kept = [
            token
            for at, tokens in windows.items()
            for token in sorted(tokens, key=lambda i: (-importance[i], i))[: quota[at]]
        ]
        assert sorted(made_of(reducer.select_tokens(view), row)) == sorted(kept)


@pytest.mark.parametrize(("selector", "alike"), [("nms", 0.2), ("nms", 0.8), ("discount", 0.8), ("apart", 0.8)])
def test_greedy_selectors_by_hand(selector: str, alike: float) -> None:
    reducer = Custom(selector=selector, alike=alike)
    view = view_of(reducer, 7)
    for row, plan in enumerate(view.plans):
        importance, features, _ = numbers(view, row)
        score, chosen = dict(enumerate(importance)), list[int]()
        while len(chosen) < plan.entry:
            left = [i for i in score if i not in chosen]
            likes = {i: [reference_ops.cosine(features[i], features[j]) for j in chosen] for i in left}
            if selector == "nms":
                best = max(left, key=lambda i: (not any(like >= alike for like in likes[i]), score[i]))
            elif selector == "apart":
                best = max(left, key=lambda i: score[i] * (1 - max(likes[i], default=0.0)))
            else:
                best = max(left, key=lambda i: score[i] * math.prod(1 - max(like, 0.0) for like in likes[i]))
            chosen.append(best)
        assert sorted(made_of(reducer.select_tokens(view), row)) == sorted(chosen)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_rest_joins_the_nearest(weighted: bool) -> None:
    """Each row is the mean of all that are nearest to its token, itself too: plain, or by score."""
    reducer = Custom(merger="weighted" if weighted else "nearest")
    view = view_of(reducer, 7)
    rows = merged_rows(view.features, reducer.select_tokens(view))  # type: ignore[arg-type]
    for row, plan in enumerate(view.plans):
        importance, features, _ = numbers(view, row)
        kept = sorted(reference_ops.best(importance, [True] * plan.tokens, plan.entry))
        groups: dict[int, list[int]] = {token: [token] for token in kept}
        for token in set(range(plan.tokens)) - set(kept):
            likes = [reference_ops.cosine(features[token], features[k]) for k in kept]
            groups[kept[likes.index(max(likes))]].append(token)
        for place, (anchor, members) in enumerate(groups.items()):
            share = [importance[m] if weighted else 1.0 for m in members]
            expected = reference_ops.weighed(features, members, [x / sum(share) for x in share])
            assert kept[place] == anchor and rows[row, place].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_weights_of_zero_make_a_plain_mean() -> None:
    index, real, rest = torch.tensor([[0]]), torch.tensor([[True]]), torch.tensor([[False, True, True]])
    selection = merge_into_nearest(index, real, rest, 2, torch.ones(1, 3, 2), torch.zeros(1, 3))
    assert merged_rows(torch.tensor([[[3.0], [6.0], [9.0]]]), selection).tolist() == [[[6.0]]]


def test_density_peaks_by_hand() -> None:
    """Peaks are chosen, or the others gather around their own peaks: DPC-KNN by loops."""
    scored, merged = Custom(scorer="density"), Custom(merger="peaks")
    for row in range(3):  # pictures that leave something out
        view = view_of(scored, 7)
        _, features, _ = numbers(view, row)
        centres, _ = dpc(features, view.plans[row].entry, CLOSEST)
        assert sorted(made_of(scored.select_tokens(view), row)) == sorted(centres)
        view = view_of(merged, 14 if row == 0 else 7)
        importance, features, _ = numbers(view, row)
        plan, found = view.plans[row], made_of(merged.select_tokens(view), row)
        kept = reference_ops.best(importance, [True] * plan.tokens, plan.dominant)
        rest = [token for token in range(plan.tokens) if token not in kept]
        centres, joins = dpc([features[token] for token in rest], plan.contextual, CLOSEST)
        groups = {
            rest[centre]: {rest[i] for i, join in enumerate(joins) if join == centre} - {rest[centre]}
            for centre in centres
        }
        assert {token: set(members) for token, members in found.items()} == {token: set() for token in kept} | groups


@pytest.mark.parametrize(
    ("name", "share", "drops"),
    [
        ("none", 0.3, ()),
        ("duet", 0.3, ((16, 0.5), (24, 0.0))),
        ("pyramid", 0.3, ((8, 0.5), (16, 0.25), (24, 0.125))),
        ("halfway", 0.3, ((16, 1 / 3),)),
        ("tapered", 0.3, ()),
        ("tapered", 0.11, ((8, 1.0), (16, 0.5), (24, 0.0))),
        ("tapered", 0.05, ((8, 0.5), (16, 0.25), (24, 0.0))),
        ("tapered", None, ((8, 1.0), (16, 0.5), (24, 0.0))),
        (((5, 0.5),), 0.3, ((5, 0.5),)),
    ],
)
def test_schedules_by_name(name: Any, share: float | None, drops: Any) -> None:
    method = Custom(schedule=name)
    assert method.drops(32, share) == drops
    assert method.with_paper_schedule(32, share).plan(1000, 32, None).counts == layer_by_layer(1000, drops)
    if share is not None:
        assert 576 * share - 1 < method.plan(576, 32, share).mean <= 576 * share


def layer_by_layer(entry: int, drops: Any) -> tuple[int, ...]:
    kept = [[math.floor(entry * keep + 1e-9) for at, keep in drops if at <= layer] for layer in range(32)]
    return tuple(([entry] + each)[-1] for each in kept)


# ---- what blocks need, and what is refused


@pytest.mark.parametrize(
    ("settings", "needs", "projected", "features"),
    [
        ({}, {"importance"}, False, False),
        ({"selector": "max_min"}, set(), False, True),
        ({"selector": "even", "scorer": "sensitivity"}, set(), False, False),
        ({"selector": "even", "scorer": "sensitivity", "merger": "weighted"}, {"projector"}, True, True),
        ({"selector": "nms", "compare": "keys"}, {"importance", "keys"}, False, False),
        ({"compare": "projected"}, {"importance"}, False, False),
        ({"scorer": "relevance", "selector": "coverage"}, {"question"}, True, True),
        ({"scorer": "contrast", "selector": "windows"}, {"grid"}, False, True),
    ],
)
def test_only_what_is_looked_at_is_made(
    settings: dict[str, Any], needs: set[str], projected: bool, features: bool
) -> None:
    method = Custom(**settings)
    found = {need.value for need in method.requires - FEATURE_INPUTS - {Input.SCORES}}
    assert (found, Input.PROJECTED_FEATURES in method.requires, bool(method.requires & FEATURE_INPUTS)) == (
        needs,
        projected,
        features,
    )


@pytest.mark.parametrize(
    "name", ["contrast+custom", "frames+custom", "custom+pyramiddrop", "divprune+custom", "contrast+frames+custom"]
)
def test_in_compositions(name: str) -> None:
    """Like any method before, or inside, the decoder; a composition needs what its blocks need."""
    alike: dict[str, Any] = {"custom_selector": "max_min", "custom_compare": "projected"}
    settings = {"custom_schedule": "duet"} if name == "divprune+custom" else alike
    reducer = duet_vlm.make_method(name, **settings)
    assert (
        isinstance(reducer, duet_vlm.EncoderReducer)
        and Input.PROJECTED_FEATURES in reducer.requires
        and not reducer.requires & VISION_LAYER_INPUTS
    )
    model, inputs = shared("llava"), FAMILIES["llava"].inputs((ONE, TWO))
    plain = forward(model, inputs).logits
    with duet_vlm.attach(model, name, budget=0.4, **settings) as handle:
        forward(model, inputs)
        report = handle.report()
        assert report.predicted == report.observed and all(handle.plan(n).mean <= 0.4 * n for n in (20, 36))
    assert torch.equal(forward(model, inputs).logits, plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scorer": "atention"}, "scorer='atention': choose one of 'importance', 'uniform'"),
        ({"selector": "dpp"}, "selector='dpp': choose one of 'top', 'even'"),
        ({"merger": "tome"}, "merger='tome': choose one of 'none', 'nearest'"),
        ({"schedule": "late"}, "schedule='late': choose one of 'none', 'duet', 'pyramid', 'halfway', 'tapered'"),
        ({"compare": "queries"}, "compare='queries': choose one of 'features', 'projected', 'keys'"),
        ({"scale": "log"}, "scale='log': choose one of None, 'none', 'largest', 'range'"),
        ({"scale": "none", "scorer": "relevance"}, "scale='none': scores by relevance may be negative"),
        ({"alpha": -1.0}, "alpha=-1.0: must be a number of at least 0"),
        ({"ridge": math.inf}, "ridge=inf: must be a number of at least 0"),
        ({"window": 0}, "window=0: must be a number of at least 1"),
        ({"important": 1.5}, r"important=1.5: must be a number in \[0, 1\]"),
        ({"tau": -2.0}, r"tau=-2.0: must be a number in \[-1, 1\]"),
        ({"alike": math.nan}, "alike=nan: must be a number in"),
        ({"merger": "local", "pool": 0.5}, "pool=0.5: with merger='local' at least 1"),
        ({"options": {"cls_token": True, "positions": "compact"}}, "cls_token=True cannot work with custom"),
        ({"schedule": ((3, 0.5), (3, 0.2))}, "layers must be strictly increasing"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        duet_vlm.attach(shared("llava"), "custom", budget=0.5, **settings)
    assert len(str(caught.value).splitlines()) == 1


def test_budgets_and_settings() -> None:
    with pytest.raises(duet_vlm.BudgetError, match="custom needs a budget"):
        Custom().plan(100, 8, None)
    with pytest.raises(ValueError, match="give either budget= or"):
        Custom(keep=5).plan(100, 8, 0.5)
    with pytest.raises(ValueError, match="with a budget give fractions"):
        Custom(schedule=((3, 5),)).plan(100, 8, 0.5)
    with pytest.raises(duet_vlm.BudgetError, match="at least one token enters"):
        Custom(schedule="pyramid").plan(10, 8, 0.01)
    assert (
        Custom(keep=0).plan(100, 8, None).entry == 0
        and Custom(keep=1, merger="local").plan(100, 8, None).contextual == 0
    )
    assert Custom(schedule="none") == Custom() and Custom(schedule=[[3, 0.5]]) == Custom(schedule=((3, 0.5),))  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [0, 1, 0.3])
@pytest.mark.parametrize("merger", MERGERS)
def test_few_rows_and_crops_by_themselves(merger: str, keep: float) -> None:
    """No row or one, and crops that are reduced each by itself, of which some keep none."""
    model, inputs = shared("llava_next"), FAMILIES["llava_next"].inputs((ONE, THREE))
    with duet_vlm.attach(
        model,
        "custom",
        keep=keep,
        merger=merger,
        selector="nms",
        options=TokenOptions(crops="per_crop" if keep == 0.3 else "joint"),
    ) as handle:
        forward(model, inputs)
        report = handle.report()
        assert report.predicted == report.observed and report.nominal == report.measured


def test_blocks_change_while_attached() -> None:
    """From the next call on, as far as they look at the same layers of the tower."""
    model, inputs = shared("llava"), FAMILIES["llava"].inputs((ONE, TWO))
    with duet_vlm.attach(model, "custom", budget=0.3) as handle:
        forward(model, inputs)
        handle.set(selector="coverage")
        forward(model, inputs)
        changed = handle.trace
        with pytest.raises(ValueError, match="detach and attach again"):
            handle.set(scorer="relevance")
    with duet_vlm.attach(model, "scope", budget=0.3) as handle:
        forward(model, inputs)
        assert handle.trace == changed


def test_training_reaches_what_was_merged() -> None:
    """The loss has a gradient for the tower of what stays and joins; the choice has none."""
    model, inputs = build("llava").train(), FAMILIES["llava"].inputs((ONE, TWO))
    with duet_vlm.attach(model, "custom", budget=0.3, selector="coverage", merger="weighted", schedule="duet"):
        model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] > 20, -100)).loss.backward()
    grad = model.model.multi_modal_projector.linear_1.weight.grad
    assert grad is not None and float(grad.abs().sum()) > 0
