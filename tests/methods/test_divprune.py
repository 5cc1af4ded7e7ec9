"""DivPrune: greedy choice and the rows that it compares."""

from __future__ import annotations

import pytest
import reference_ops
from families import FAMILIES, FIRST, MIXED, forward, shared
from method_views import PICTURES, chosen_tokens, encoded, tower_rows
from test_signals import content_rows

import duet_vlm


@pytest.mark.parametrize("family", FIRST)
def test_divprune_looks_at_projected_rows(family: str) -> None:
    inputs, model = FAMILIES[family].inputs(MIXED), shared(family)
    expected = []
    for rows, picture in zip(encoded(model, inputs), PICTURES, strict=True):
        content = content_rows(family, picture)
        expected.append(sorted(content[i] for i in reference_ops.divprune_entry(rows[content].tolist(), 5)))
    with duet_vlm.attach(model, "divprune", keep=5) as handle:
        forward(model, inputs)
        assert chosen_tokens(handle) == expected
    if family == "llava":  # the choice by tower rows would be another one
        assert expected != [
            sorted(reference_ops.divprune_entry(rows.tolist(), 5)) for rows in tower_rows(model, inputs)
        ]
