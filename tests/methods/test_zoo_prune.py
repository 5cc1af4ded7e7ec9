"""ZOO-Prune: sensitivity of the projector."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, ONE, forward, shared

import duet_vlm
from duet_vlm.methods.encoder.zoo_prune import ZooPrune
from duet_vlm.ops.saliency import direction


def test_zoo_prune_measures_how_far_the_projector_moves() -> None:
    model, seen = shared("llava"), []

    class Spy(ZooPrune):
        def select_tokens(self, view: Any) -> Any:
            seen.append((view, self.sensitivity(view), self.score(view)))
            return super().select_tokens(view)

    with duet_vlm.attach(model, Spy(keep=0.4, directions=3, step=0.05)):
        forward(model, FAMILIES["llava"].inputs([ONE]))
    ((view, found, weight),) = seen
    with torch.no_grad():
        pixels = FAMILIES["llava"].inputs([ONE])["pixel_values"]
        rows = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        project, total = model.model.multi_modal_projector, torch.zeros(rows.shape[:2])
        for number in range(3):
            step = 0.05 * direction(0, number, rows.shape[2])
            total += (project(rows + step) - project(rows - step)).norm(dim=-1)
    torch.testing.assert_close(found, total / (3 * 2 * 0.05), rtol=1e-3, atol=1e-6)
    assert float(weight.min()) == 0 and float(weight.max()) == 1 and view.features is not None
    assert float(direction(0, 1, 32).norm()) == pytest.approx(1) and not torch.equal(
        direction(0, 1, 32), direction(1, 1, 32)
    )
