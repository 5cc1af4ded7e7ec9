"""SCOPE: greedy coverage, its definition, and the rows that it compares."""

from __future__ import annotations

import pytest
import reference_ops
from families import FAMILIES, FIRST, MIXED, forward, shared
from method_views import PICTURES, chosen_tokens, tower_rows
from test_signals import content_rows, tower_signals

import duet_vlm


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("family", FIRST)
def test_scope_looks_at_tower_rows_and_attention(family: str, alpha: float) -> None:
    inputs, model = FAMILIES[family].inputs(MIXED), shared(family)
    signals, shown = (
        tower_signals(family, inputs, None, PICTURES),
        [content_rows(family, picture) for picture in PICTURES],
    )
    expected = []
    for (scores, _), rows, content in zip(signals, tower_rows(model, inputs), shown, strict=True):
        expected.append(
            sorted(content[i] for i in reference_ops.scope_entry(scores.tolist(), rows[content].tolist(), 5, alpha))
        )
    with duet_vlm.attach(model, "scope", keep=5, alpha=alpha) as handle:
        forward(model, inputs)
        assert chosen_tokens(handle) == expected
