"""ApET: approximation by a basis, released rows, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import reference_ops
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_views import drawn, many, sample_spans, seeds, shown_view
from torch import Tensor

from duet_vlm import EncoderView, Selection, SpanPlan
from duet_vlm.methods.two_stage.apet import ApET
from duet_vlm.ops.information import residual
from duet_vlm.ops.merge import merged_rows


@many
@given(samples=sample_spans(), seed=seeds, basis=st.integers(1, 5))
def test_approximation(samples: list[tuple[int, int]], seed: int, basis: int) -> None:
    rows, _, valid, count = drawn(samples, seed, exact=False)
    chosen = ApET(keep=0.5, basis=basis, ridge=1e-2).prune_tokens(shown_view(rows, valid, count))
    for b, (tokens, wanted) in enumerate(samples):
        kept, joined = reference_ops.approximated(rows[b, :tokens].double().tolist(), wanted, basis, 1e-2)
        assert chosen.index[b][chosen.valid[b]].tolist() == kept
        ours: dict[int, list[int]] = {}
        for member, row in zip(chosen.source_tokens[b].tolist(), chosen.target_row[b].tolist(), strict=True):
            if row >= 0:
                ours.setdefault(int(chosen.index[b, row]), []).append(member)
        assert ours == joined


@pytest.mark.parametrize("slots, share", [("released", 0.0), ("released", 0.5), ("behind", 0.0)])
@pytest.mark.parametrize("inside", [False, True])
def test_released_rows_weigh_one_and_neighbours_in_the_batch_change_nothing(
    slots: str, share: float, inside: bool
) -> None:
    rows, _, valid, count = drawn([(12, 5), (7, 7), (9, 1), (10, 2)], 3, exact=False)
    method = ApET(keep=0.5, basis=3, slots=slots, own_share=share)

    def of(rows: Tensor, valid: Tensor, count: Tensor) -> Selection:
        plans = tuple(SpanPlan(n, int(k), 0, ()) for n, k in zip(valid.sum(1).tolist(), count.tolist(), strict=True))
        return (
            method.prune_tokens(shown_view(rows, valid, count))
            if inside
            else method.select_tokens(EncoderView(valid, count, count * 0, plans, features=rows))
        )

    together = of(rows, valid, count)
    made = merged_rows(rows, together)
    for b, tokens in enumerate(valid.sum(1).tolist()):
        alone = of(rows[b : b + 1, :tokens], valid[b : b + 1, :tokens], count[b : b + 1])
        real = together.valid[b]
        assert together.index[b][real].tolist() == alone.index[0][alone.valid[0]].tolist() and int(real.sum()) == int(
            count[b]
        )
        torch.testing.assert_close(made[b][real], merged_rows(rows[b : b + 1, :tokens], alone)[0][alone.valid[0]])
        joins = together.target_row[b] >= 0
        weight = torch.zeros(made.shape[1]).index_add(0, together.target_row[b][joins], together.weights[b][joins])
        torch.testing.assert_close(weight[weight > 0], torch.ones(int((weight > 0).sum())))
    torch.testing.assert_close(made[1], rows[1, together.index[1]])  # nothing leaves, so nothing is merged


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"basis": 0}, "basis=0"), ({"ridge": 0.0}, "ridge=0.0"), ({"start": -1}, "start=-1"), ({"own_share": 1.0}, "own_share=1.0"),
        ({"slots": "mine"}, "slots='mine'"), ({"options": {"cls_token": True, "positions": "compact"}}, "cls_token=True"),
    ],
)  # fmt: skip
def test_what_apet_refuses(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ApET(**{"keep": 0.5} | wrong)


def test_apet_counts_as_released() -> None:
    assert ApET.official_qwen(0.58).plan(50, 4, None).entry == 28  # the truncated float product
    assert ApET(keep=0.58).plan(50, 4, None).entry == 29


def test_tokens_that_are_all_one_are_approximated_exactly() -> None:
    """A blank picture: the Gram matrix of the basis is singular however small its ridge is."""
    for size in (1.0, 100.0, 1e4):
        rows = size * torch.randn(2, 1, 33, generator=torch.Generator().manual_seed(1)).expand(2, 20, 33)
        assert residual(rows, rows[:, :10], 1e-5).abs().max() <= 1e-2 * size
        every = torch.ones(2, 20, dtype=torch.bool)
        chosen = ApET(keep=0.5).prune_tokens(shown_view(rows, every, torch.tensor([12, 12])))
        assert chosen.valid.sum(1).tolist() == [12, 12] and merged_rows(rows, chosen).isfinite().all()
