"""PruneSID: groups, quotas, thresholds."""

from __future__ import annotations

import pytest
import torch
from method_views import IMAGES, best_tokens, kept_tokens, square_images

from duet_vlm import SpanPlan
from duet_vlm.methods.encoder.prunesid import PruneSID
from duet_vlm.reducers.encoder_view import EncoderView


def test_prunesid_keeps_a_token_of_every_group_and_no_twins_first() -> None:
    """Pictures of four textures, many copies each: without a quota for every group, attention alone would take one
    texture."""
    torch.manual_seed(1)
    # orthogonal, of mean 0
    signs = torch.tensor([[(-1.0) ** bin(row & column).count("1") for column in range(32)] for row in (1, 2, 4, 8)])
    kind = torch.arange(24) % 4
    strength = torch.tensor([0.15, 0.25, 0.35, 0.45])[:, None]
    features = ((0.5 + strength * signs).logit()[kind] + 0.01 * torch.randn(24, 32))[None]
    attention = (kind == 2).float()[None] + torch.rand(1, 24) / 10
    count = torch.tensor([16])
    plan = SpanPlan(24, 16, 0, (16,))
    view = EncoderView(torch.ones(1, 24, dtype=torch.bool), count, count * 0, (plan,), attention, None, features)
    group, groups = PruneSID(keep=16).groups(view)
    assert groups == 4
    for a in range(24):
        for b in range(24):
            assert (group[0, a] == group[0, b]) == (kind[a] == kind[b])
    (kept,) = kept_tokens(PruneSID(keep=16), view)
    assert {int(kind[i]) for i in kept} == {0, 1, 2, 3} and len(kept) == 16
    first = [best_tokens(attention[0], (kind == k).nonzero().flatten().tolist(), 1)[0] for k in range(4)]
    assert set(first) <= set(kept)


def test_prunesid_threshold_is_the_mean_likeness_of_pairs() -> None:
    view = square_images(IMAGES)
    from duet_vlm.ops.greedy import cosine

    likeness = cosine(view.features, view.valid)
    found = PruneSID(keep=1).threshold(view, likeness)
    for row, (side, n) in enumerate(IMAGES):
        pairs = [float(likeness[row, i, j]) for i in range(side**2) for j in range(i)]
        assert float(found[row]) == pytest.approx(min(sum(pairs) / len(pairs) * n / 32, 0.999), abs=1e-5)
