"""HoloV: shares of crops by attention and variety."""

from __future__ import annotations

import pytest
import torch
from method_views import IMAGES, kept_tokens, square_images

from duet_vlm.methods.encoder.holov import HoloV
from duet_vlm.ops.groups import segment_numbers


@pytest.mark.parametrize("crops", [1, 3, 7])
def test_holov_shares_by_attention_and_variety(crops: int) -> None:
    view, method = square_images(IMAGES), HoloV(keep=1, num_crops=crops)
    stretch = segment_numbers(view.valid, method.num_crops)
    score = method.score(view)
    for row, (side, _) in enumerate(IMAGES):
        total, groups, start = side**2, [], 0
        for number in range(crops):
            size = total // crops + (number < total % crops)
            groups.append(list(range(start, start + size)))
            start += size
        unit = torch.nn.functional.normalize(view.features[row].double(), dim=-1)
        for number, group in enumerate(groups):
            assert all(int(stretch[row, i]) == number for i in group)
            if len(group) < 2:
                assert all(float(score[row, i]) == pytest.approx(float(view.importance[row, i])) for i in group)
                continue
            variety = {}
            for i in group:
                likeness = [0.0 if i == j else float(unit[i] @ unit[j]) for j in group]
                mean = sum(likeness) / (len(group) - 1)
                variety[i] = sum((x - mean) ** 2 for x in likeness) / (len(group) - 1)
            level = sum(float(view.importance[row, i]) for i in group) / sum(variety.values())
            for i in group:
                assert float(score[row, i]) == pytest.approx(
                    float(view.importance[row, i]) + 0.09 * variety[i] * level, rel=1e-4
                )
    assert [len(row) for row in kept_tokens(method, view)] == [n for _, n in IMAGES]
    assert [len(row) for row in kept_tokens(HoloV.official(1, num_crops=crops), view)] == [n for _, n in IMAGES]
