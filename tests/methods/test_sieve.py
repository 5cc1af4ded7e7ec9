"""Sieve: discounted greedy choice against loops, and the plane of the text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import reference_ops
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_views import drawn, many, sample_spans, seeds, shown_view

from duet_vlm import DecoderView
from duet_vlm.methods.decoder.sieve import Sieve
from duet_vlm.ops.greedy import cosine, greedy_discounted


@many
@given(samples=sample_spans(), seed=seeds, exact=st.booleans())
def test_discounted(samples: list[tuple[int, int]], seed: int, exact: bool) -> None:
    rows, score, valid, count = drawn(samples, seed, exact)
    chosen = greedy_discounted(cosine(rows, valid).square(), score, valid, count, int(count.max()))
    for b, (tokens, wanted) in enumerate(samples):
        expected = reference_ops.discounted(rows[b, :tokens].double().tolist(), score[b, :tokens].tolist(), wanted)
        assert chosen[b].nonzero().flatten().tolist() == expected


@many
@given(samples=sample_spans(), seed=seeds, words=st.integers(1, 6), heads=st.integers(1, 5), best=st.integers(1, 4))
def test_sieve(samples: list[tuple[int, int]], seed: int, words: int, heads: int, best: int) -> None:
    rows, _, valid, count = drawn(samples, seed, exact=False)
    draw = torch.Generator().manual_seed(seed + 1)
    scores, text = torch.rand(*valid.shape, heads, generator=draw), torch.randn(len(samples), words, 5, generator=draw)
    said = torch.arange(words) < torch.randint(1, words + 1, (len(samples), 1), generator=draw)
    view = replace(
        shown_view(rows, valid, count), scores=scores * valid[..., None], text_hidden_states=text, text_valid=said
    )
    chosen = Sieve(schedule=((2, 0.5),), heads=best).prune_tokens(view)
    for b, (tokens, wanted) in enumerate(samples):
        seen = text[b][said[b]].double().tolist()
        expected = reference_ops.sieved(
            rows[b, :tokens].double().tolist(), seen, scores[b, :tokens].double().tolist(), wanted, best, 0.75
        )
        assert chosen[b].nonzero().flatten().tolist() == expected


def test_what_the_text_says_already_leaves_first() -> None:
    """Two words span a plane; with equal attention the tokens in it leave."""
    text = torch.tensor([[[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 0]]])
    rows = torch.tensor([[[2.0, 1, 0, 0], [0, 0, 1.0, 0], [1.0, 3, 0, 0], [0, 0, 0, 1.0]]])
    every = torch.ones(1, 4, dtype=torch.bool)
    view = DecoderView(
        every,
        torch.tensor([2]),
        host_counts=((4, 2),),
        hidden_states=rows,
        text_hidden_states=text,
        text_valid=every[:, :3],
        scores=torch.ones(1, 4, 2),
    )
    assert Sieve(schedule=((2, 0.5),), energy=1.0).prune_tokens(view).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize(
    "wrong, said", [({"heads": 0}, "heads=0"), ({"energy": 0.0}, "energy=0.0"), ({"energy": 1.5}, "energy=1.5")]
)
def test_what_sieve_refuses(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sieve(schedule=((2, 0.5),), **wrong)
