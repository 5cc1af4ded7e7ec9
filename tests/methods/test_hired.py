"""HiRED: counts per crop and the most attended tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
from families import FAMILIES, Picture, any_res_crops, any_res_layout, forward, shared
from method_views import IMAGES, best_tokens, kept_tokens, square_images

import duet_vlm
from duet_vlm.methods.encoder.hired import HiRED


def split(weights: list[int], sizes: list[int], total: int) -> list[int]:
    """Largest remainders, where no crop is filled."""
    exact = [total * w / sum(weights) for w in weights]
    counts = [math.floor(x + 1e-4) for x in exact]
    assert all(n < size for n, size in zip(counts, sizes, strict=True))
    order = sorted(range(len(weights)), key=lambda i: (-(exact[i] - counts[i]), i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


@pytest.mark.parametrize("picture", [Picture(1, 8, 8), Picture(2, 5, 10)])
def test_hired_counts_what_is_important_where_a_crop_shows_it(picture: Picture) -> None:
    """By hand, on a packed picture of LLaVA-NeXT: overview of 4 x 4, crops whose borders are cut off."""
    model, seen = shared("llava_next"), []

    class Spy(HiRED):
        def select_tokens(self, view: Any) -> Any:
            seen.append(view)
            return super().select_tokens(view)

    with duet_vlm.attach(model, Spy(keep=0.4)) as handle:
        forward(model, FAMILIES["llava_next"].inputs([(1, picture, 5, 6)]))
        kept = sorted(handle.trace[0][0].stages[0].kept)
        plan = handle.plan(FAMILIES["llava_next"].tokens(picture))
    (view,) = seen
    layout, (rows, columns) = any_res_layout(picture), any_res_crops(picture)
    late, early = (layer.importance[0] for layer in view.layers)
    crop = {i: at[0] for i, at in enumerate(layout) if at is not None}
    mosaic = [
        ((at[0] - 1) // columns * 4 + at[1] // 4, (at[0] - 1) % columns * 4 + at[1] % 4)
        for at in layout
        if at is not None and at[0]
    ]
    top, bottom, left, right = (f(place[axis] for place in mosaic) for axis in (0, 1) for f in (min, max))
    weights = [0] * (rows * columns)
    for token in best_tokens(early, [i for i in crop if crop[i] == 0], 8):
        y, x = layout[token][1] // 4, layout[token][1] % 4
        down, across = top + (y + 0.5) / 4 * (bottom + 1 - top), left + (x + 0.5) / 4 * (right + 1 - left)
        weights[int(down // 4) * columns + int(across // 4)] += 1
    full = min(16, int(plan.entry * 0.5))
    sizes = [sum(number == each for number in crop.values()) for each in range(1, 1 + len(weights))]
    counts = [full, *split(weights, sizes, plan.entry - full)]
    expected = [i for each, n in enumerate(counts) for i in best_tokens(late, [i for i in crop if crop[i] == each], n)]
    assert kept == sorted(expected) and len(kept) == plan.entry


def test_hired_keeps_the_most_attended_tokens_of_a_picture_that_is_whole() -> None:
    view = square_images(IMAGES)
    for row, (side, n) in enumerate(IMAGES):
        assert kept_tokens(HiRED(keep=1), view)[row] == sorted(best_tokens(view.importance[row], range(side**2), n))
