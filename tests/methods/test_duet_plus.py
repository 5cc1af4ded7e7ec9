"""DUET+: its choice and clusters, its plans."""

from __future__ import annotations

import pytest
import reference_ops
from families import FAMILIES, FIRST, MIXED, forward, shared
from method_views import PICTURES, chosen_tokens, tower_rows
from test_signals import content_rows, tower_signals

import duet_vlm


@pytest.mark.parametrize("alpha", [0.0, 2.0])
@pytest.mark.parametrize("family", FIRST)
def test_duet_plus_looks_at_tower_rows_and_attention(family: str, alpha: float) -> None:
    inputs, model = FAMILIES[family].inputs(MIXED), shared(family)
    signals, shown = (
        tower_signals(family, inputs, None, PICTURES),
        [content_rows(family, picture) for picture in PICTURES],
    )
    rows = [all_rows[content] for all_rows, content in zip(tower_rows(model, inputs), shown, strict=True)]
    expected = [
        reference_ops.duet_plus_entry(s.tolist(), some.tolist(), 5, alpha, 1.0, 0.1)
        for (s, _), some in zip(signals, rows, strict=True)
    ]
    with duet_vlm.attach(model, "duet_plus", keep=5, schedule=(), alpha=alpha, pool=1.0, tau=0.1) as handle:
        forward(model, inputs)
        assert chosen_tokens(handle) == [
            [content[i] for i in chosen] for (chosen, _), content in zip(expected, shown, strict=True)
        ]
        found = [
            {anchor: sorted(members) for anchor, members in span.merged.items()} for row in handle.trace for span in row
        ]
    assert found == [
        {content[anchor]: sorted(content[m] for m in members) for anchor, members in clusters.items() if members}
        for (_, clusters), content in zip(expected, shown, strict=True)
    ]
    assert any(found)


def test_duet_plus_plans() -> None:
    """Under DUET's schedule the same rows in every layer as DUET; by itself without drops, with DUET's, or with earlier
    ones, by the budget."""
    reducer = duet_vlm.get_method("duet_plus")
    for budget in (1, 0.05, 64, 0.11, 0.33, 300, 0.7, 500, 0.99, 576):
        plus, duet = (
            reducer(schedule=((16, 0.5), (24, 0.0))).plan(576, 32, budget),
            duet_vlm.get_method("duet")().plan(576, 32, budget),
        )
        assert plus.counts == duet.counts and plus.entry == duet.entry
    assert (
        reducer().plan(576, 32, 64).counts
        == duet_vlm.get_method("duet")().plan(576, 32, 64).counts
        == (102,) * 16 + (51,) * 8 + (0,) * 8
    )
    # half, and half of that
    assert reducer().plan(576, 32, 0.05).counts == (66,) * 8 + (33,) * 8 + (16,) * 8 + (0,) * 8
    assert reducer().plan(576, 32, 500).counts == (500,) * 32
    assert (
        reducer().plan(100, 8, 14).counts == (14,) * 8
        and reducer().plan(100, 8, 13).counts == (21,) * 4 + (10,) * 2 + (0,) * 2
    )
    assert reducer(keep=100).with_paper_schedule(32).plan(576, 32, None).counts == (100,) * 16 + (50,) * 8 + (0,) * 8
    scope = duet_vlm.make_method("scope+duet_plus")
    for budget in (0.05, 0.11, 0.4):  # a composition's drops depend on the budget in the same way
        assert scope.plan(576, 32, budget).counts == reducer().plan(576, 32, budget).counts
    assert (
        reducer(keep=100, schedule=((8, 0.5), (16, 0.0))).plan(576, 32, None).counts
        == (100,) * 8 + (50,) * 8 + (0,) * 16
    )
    assert reducer(keep=100, schedule=((2, 0.25),)).plan(64, 4, None).counts == (64, 64, 16, 16)
    assert reducer(schedule=((2, 0.25),)).plan(64, 4, None).counts == (64, 64, 16, 16)
    with pytest.raises(duet_vlm.BudgetError, match="needs a budget"):
        reducer().plan(64, 4, None)
    with pytest.raises(ValueError, match="not both"):
        reducer(keep=4).plan(64, 4, 0.5)
    with pytest.raises(ValueError, match="with a budget give fractions"):
        reducer(schedule=((2, 10),)).plan(64, 4, 0.5)
