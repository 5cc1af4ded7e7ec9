"""VScan: two scans, merging, released windows."""

from __future__ import annotations

import math

import pytest
import torch
from families import FAMILIES, THREE, forward, shared
from method_views import best_tokens, square_images

import duet_vlm
from duet_vlm.methods.two_stage.vscan import VScan


@pytest.mark.parametrize("local", ["limit", "equal"])
@pytest.mark.parametrize("window", [2, 3, 6])
def test_vscan_scans_twice_and_merges_the_rest(window: int, local: str) -> None:
    images = [(6, 14), (4, 15), (5, 3), (3, 1)]
    view, method = square_images(images), VScan(keep=1, window=window, local=local)
    selection = method.select_tokens(view)
    for row, (side, n) in enumerate(images):
        deep, shallow = (layer.importance[row] for layer in view.layers)
        number = max(1, side // window)
        limit, found, given = n // 2 // number**2 if local == "equal" else math.ceil(n // 2 / number**2), [], {}
        for token in best_tokens(shallow, range(side**2), side**2):
            at = min(token // side // window, number - 1), min(token % side // window, number - 1)
            if len(found) < n // 2 and given.get(at, 0) < limit:
                given[at] = given.get(at, 0) + 1
                found.append(token)
        kept = sorted(found + best_tokens(deep, set(range(side**2)) - set(found), n - len(found)))
        index = selection.index[row][selection.valid[row]].tolist()
        assert index == kept
        unit = torch.nn.functional.normalize(view.features[row].double(), dim=-1)
        joined = {
            int(m): index[int(i)]
            for m, i in zip(selection.source_tokens[row], selection.target_row[row], strict=True)
            if i >= 0
        }
        assert joined == {
            m: max(kept, key=lambda k, m=m: float(unit[m] @ unit[k])) for m in range(side**2) if m not in kept
        }


def test_vscan_has_a_plan_for_its_released_windows() -> None:
    assert [VScan.official(n, ()).plan(576, 32, None).entry for n in (64, 75, 96, 100, 192, 576)] == [
        64,
        70,
        96,
        98,
        192,
        576,
    ]
    with pytest.raises(ValueError, match="keep=31 has 15 local tokens for 16 windows: give at least 32"):
        VScan.official(31, ()).plan(576, 32, None)
    plan = VScan().plan(576, 32, 64)
    assert (
        plan.mean <= 64 < VScan().plan(576, 32, 65).mean + 1
        and plan.counts[0] == plan.entry > plan.counts[16] == plan.counts[31]
    )
    with pytest.raises(ValueError, match="with a budget give fractions"):
        VScan(local="equal").plan(576, 32, 64)


def test_vscan_needs_local_tokens_for_the_windows_of_a_picture_not_of_a_batch() -> None:
    inputs, model = FAMILIES["llava"].inputs((THREE, THREE)), shared("llava")  # six pictures in one call of the tower
    tokens = model.get_image_features(inputs["pixel_values"]).pooler_output[0].shape[0]
    each = math.isqrt(tokens) // 2
    with duet_vlm.attach(model, VScan.official(2 * each**2, (), window=2, shallow=1)) as handle:
        forward(model, inputs)
        assert [len(span.stages[0].kept) for row in handle.trace for span in row] == [2 * each**2] * 6
