"""The released V2V rules at the edges that no recording reaches, against loops over tokens; and the order of tiles."""

from __future__ import annotations

import pytest
import torch
from mosaic import mosaic_order
from torch import Tensor

from duet_vlm import BudgetError, EncoderView, SpanPlan
from duet_vlm.methods.duet import Duet
from duet_vlm.methods.visionzip import VisionZip
from duet_vlm.ops.merge import merged_rows

ROWS, WIDTH = 17, 6  # CLS and 16 patches


def released_rows(features: Tensor, scores: list[float], keys: Tensor, dominant: int, contextual: int, width: int | None) -> Tensor:
    """Output rows of one image; ``width`` None is the original VisionZip, which merges every patch that is not dominant."""
    keys = keys / keys.norm(dim=-1, keepdim=True)
    best = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept, rest = sorted(best[: dominant - 1]), best[dominant - 1 :]
    if width is None:
        pool = sorted(rest)
        step = max(1, len(pool) // contextual)
    else:
        pool = rest[: max(1, width * contextual)]
        step = max(1, len(pool) // max(1, contextual))
    anchors = pool[::step][:contextual] or pool[:1]
    merged: dict[int, list[int]] = {a: [] for a in anchors}
    for patch in pool:
        if patch not in merged:
            merged[max(anchors, key=lambda a, p=patch: float(keys[p] @ keys[a]))].append(patch)
    patches = features[1:]
    rows = [features[0], *(patches[i] for i in kept)]
    rows += [patches[a] + (patches[members].mean(0) if members else 0) for a, members in merged.items()]
    return torch.stack(rows)


EDGES = [(1, 0, 3), (1, 16, 1), (7, 0, 4), (7, 3, 0), (7, 1, 1), (9, 3, 1), (10, 7, 1), (2, 15, 4), (12, 2, 100), (14, 4, 4), (16, 3, 2)]


CASES = [(False, *edge) for edge in EDGES] + [(True, *edge) for edge in EDGES if edge[1] > 0]  # VisionZip divides by contextual


@pytest.mark.parametrize("original, dominant, contextual, width", CASES)
def test_released_choice_at_the_edges(original: bool, dominant: int, contextual: int, width: int) -> None:
    generator = torch.Generator().manual_seed(dominant * 100 + contextual)
    features = torch.randn(2, ROWS, WIDTH, generator=generator)
    importance, keys = torch.rand(2, ROWS, generator=generator), torch.randn(2, ROWS, WIDTH, generator=generator)
    importance[:, 0] = 9.0  # the CLS row
    reducer = VisionZip.official(dominant, contextual) if original else Duet.official_llava(dominant, contextual, width, schedule=())
    expected = [
        released_rows(f, s[1:].tolist(), k[1:], dominant, contextual, None if original else width)
        for f, s, k in zip(features, importance, keys, strict=True)
    ]
    rows = len(expected[0])
    if rows <= ROWS - 1:
        assert reducer.plan(ROWS - 1, 1, None).entry == rows
    else:  # CLS and every patch are one row more than an image has placeholders
        with pytest.raises(ValueError, match="do not fit"):
            reducer.plan(ROWS - 1, 1, None)
    plan = SpanPlan(ROWS - 1, dominant, rows - dominant, (rows,))
    counts = torch.tensor([[dominant, rows - dominant]] * 2)
    view = EncoderView(torch.ones(2, ROWS, dtype=torch.bool), counts[:, 0], counts[:, 1], (plan,) * 2, importance, keys)
    torch.testing.assert_close(merged_rows(features, reducer.select_tokens(view)), torch.stack(expected))


def test_settings_that_the_released_code_cannot_run_are_refused() -> None:
    with pytest.raises(ValueError, match="CLS row counts"):
        Duet.official_llava(0, 3)
    with pytest.raises(ValueError, match="CLS row counts"):
        VisionZip.official(0, 3)
    with pytest.raises(ValueError, match="at least 1"):
        Duet(dominant=4, contextual=2, cluster_width=0)
    with pytest.raises(BudgetError):
        Duet(schedule=None).plan(16, 8, None)


def test_tiles_are_read_line_by_line_over_the_mosaic() -> None:
    """Three columns and two lines of tiles with 2 x 2 patches, every second patch kept."""
    patches = torch.tensor([[0, 3], [1, 2], [0, 1], [2, 3], [0, 2], [1, 3]])
    side, columns, contextual = 2, 3, 1
    places = []
    for tile, row in enumerate(patches.tolist()):
        for number, patch in enumerate(row):
            line, column = tile // columns * side + patch // side, tile % columns * side + patch % side
            places.append((line, column, tile * 4 + 1 + number))
    expected = [row for _, _, row in sorted(places)] + [tile * 4 for tile in range(6)] + [tile * 4 + 3 for tile in range(6)]
    assert mosaic_order(patches, contextual, columns, side).tolist() == expected
