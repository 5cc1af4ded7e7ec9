"""ADSC: strides and strides within strides."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, ONE, shared

import duet_vlm
from duet_vlm import DecoderView
from duet_vlm.methods.decoder.adsc import Adsc


@pytest.mark.parametrize(
    "tokens, keep, kept",
    [(8, 4, [1, 3, 5, 7]), (9, 3, [2, 5, 8]), (7, 3, [2, 4, 6]), (5, 1, [4]), (4, 4, [0, 1, 2, 3])],
)
def test_the_last_of_each_stride_stays(tokens: int, keep: int, kept: list[int]) -> None:
    every = torch.ones(1, tokens, dtype=torch.bool)
    view = DecoderView(every, torch.tensor([keep]), host_counts=((tokens, keep),))
    assert Adsc(schedule=((2, 0.5),)).prune_tokens(view)[0].nonzero().flatten().tolist() == kept


def test_strides_halve_within_strides() -> None:
    """The paper's halving: after two stages the last of every four."""
    model, family = shared("llava"), FAMILIES["llava"]
    with torch.no_grad(), duet_vlm.attach(model, "adsc", schedule=((2, 0.5), (4, 0.25))) as handle:
        model(**family.inputs([ONE]))
        (span,) = handle.trace[0]
    assert span.span.tokens == 36
    assert [stage.kept for stage in span.stages[-2:]] == [tuple(range(1, 36, 2)), tuple(range(3, 36, 4))]
