"""Time to the first token of a large model with reduction in the tower, predicted from shapes: ``python
lab/studies/tower_roofline.py``, results/tower_roofline.json. Nothing is measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import benchmark_path  # noqa: F401
from common import environment
from scale import HEAD, MODELS, Input, request

import duet_vlm
from duet_vlm.profiling.selection_cost import tower_choice_flops
from duet_vlm_lab.roofline.devices import SHEETS
from duet_vlm_lab.roofline.predict import Workload, predict

BUDGET, SHARES, BATCH = 0.11, (0.56, 0.5, 0.44), 8
INPUTS = {
    "image, 324 tokens": Input(1, 324),
    "image, 1,296 tokens": Input(1, 1296),
    "page, 4,096 tokens": Input(1, 4096),
}


def reduced(model: Any, what: Input, share: float) -> Workload:
    """Duet at 11 % behind a tower that keeps ``share`` of the patches."""
    work, left = request(model, what, BUDGET), ((((0, int(share * what.each)),),) * what.steps,)
    sample = dataclasses.replace(work.sample, planned_left=left, in_tower_counts=left, projects_survivors_only=True)
    mass = tower_choice_flops(
        duet_vlm.make_method("contrast+duet", contrast_keep=share), sample.in_tower(), model.vision, HEAD
    )
    return dataclasses.replace(work, sample=sample, selection=work.selection + mass)


def main() -> None:
    rows = []
    for size in ("7B",):
        model = MODELS[size]
        for name, what in INPUTS.items():
            sides = {"full model": request(model, what, None), "duet at 11%": request(model, what, BUDGET)}
            sides |= {f"duet at 11%, {share:.0%} of the patches": reduced(model, what, share) for share in SHARES}
            full = predict(model, sides["full model"], SHEETS["h100"], "bf16", BATCH).first_token
            for label, work in sides.items():
                found = predict(model, work, SHEETS["h100"], "bf16", BATCH)
                stages = {
                    "tower": found.vision.seconds,
                    "choice": found.selection.seconds,
                    "prefill": found.prefill.seconds,
                }
                rows.append({"model": size, "input": name, "side": label, **stages, "first_token": found.first_token})
                rows[-1]["speed_up"] = full / found.first_token
    out = {
        "benchmark": "tower_roofline",
        "device": "h100",
        "batch": BATCH,
        "environment": environment(),
        "results": rows,
    }
    (Path(__file__).parent / "results" / "tower_roofline.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
