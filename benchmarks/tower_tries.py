"""Other rules for what goes through the tower, tried beside those that ship: ``python benchmarks/tower_tries.py``, results/tower_tries.json.

At 44 % of the patches, in front of ``duet_plus`` at 11 %, on questions that no other table uses. What did not help is kept here and nowhere else.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import HERE, environment
from torch import Tensor, nn

from duet_vlm import TowerReducer, TowerView, register
from duet_vlm.evaluate.experiment import Experiment
from duet_vlm.evaluate.run import run_experiment
from duet_vlm.tiny import load
from duet_vlm.tiny.labels import coverage
from duet_vlm.tiny.recipe.tower import to_pixels
from duet_vlm.tiny.render import render, shape_mask
from duet_vlm.tiny.scenes import GRID, Scene, scene

BUDGET, KEEP, WHOLE, METHOD = 0.11, 0.44, "whole tower", "duet_plus"
TASKS = {"tiny": "tiny", "tiny-crowded": "tiny", "tiny-video": "tiny-video"}
PICTURES = 4000  # that the scorer learns from


@register("tower_try")
@dataclass(frozen=True)
class Try(TowerReducer):
    """Contrast plus ``weight`` times another score, each over its spread in the picture."""

    paper = "-"
    summary = "a rule that is tried"
    tower_signals = frozenset({"contrast", "pixels", "key_norm"})

    rule: str = "chroma"
    weight: float = 0.5

    def boundaries(self, depth: int) -> Sequence[int]:
        return (0, 2) if self.rule == "second" else (0,)

    def stay(self, view: TowerView) -> Tensor:
        if view.after:
            assert view.key_norm is not None
            return best(-view.key_norm, view)
        assert view.contrast is not None
        return best(even(view.contrast) + (self.weight * even(RULES[self.rule](view)) if self.rule in RULES else 0), view)


def best(score: Tensor, view: TowerView) -> Tensor:
    order = score.masked_fill(~view.valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(view.valid).scatter(1, order, torch.arange(order.shape[1]) < view.keep[:, None])


def even(score: Tensor) -> Tensor:
    return (score - score.mean(1, keepdim=True)) / score.std(1, keepdim=True).clamp(min=1e-6)


def colours(view: TowerView) -> Tensor:
    """[P, U, 3, side, side]."""
    assert view.pixels is not None
    pixels = view.pixels[:, :, 0].float().unflatten(-1, (3, -1))
    side = round(pixels.shape[-1] ** 0.5)
    return pixels.unflatten(-1, (side, side))


def chroma(view: TowerView) -> Tensor:
    pixels = colours(view)
    return (pixels.amax(2) - pixels.amin(2)).mean((-1, -2))


def edges(view: TowerView) -> Tensor:
    pixels = colours(view)
    return (pixels.diff(dim=-1).square().mean((-1, -2, -3)) + pixels.diff(dim=-2).square().mean((-1, -2, -3))).sqrt()


def around(view: TowerView) -> Tensor:
    """Contrast of the neighbourhood: mean over 3 x 3 patches."""
    assert view.contrast is not None
    grid = nn.functional.pad(view.contrast.unflatten(1, view.grids[0])[:, None], (1, 1, 1, 1), mode="replicate")
    return nn.functional.avg_pool2d(grid, 3, 1)[:, 0].flatten(1)


def change(view: TowerView) -> Tensor:
    """From the frame before."""
    assert view.pixels is not None and view.contrast is not None
    score, pixels = torch.zeros_like(view.contrast), view.pixels[:, :, 0].float()
    for frame, before in enumerate(view.before):
        if before >= 0:
            score[frame] = (pixels[frame] - pixels[before]).abs().mean(-1)
    return score


class Scorer(nn.Module):
    """What a patch shows, from its embedding and those around it: a little over 1 % of the tower's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(128, 24, 1), nn.GELU(), nn.Conv2d(24, 24, 3, padding=1), nn.GELU(), nn.Conv2d(24, 1, 1))

    def forward(self, embedded: Tensor) -> Tensor:
        return self.layers(embedded - embedded.mean((2, 3), keepdim=True))[:, 0]


def embedding() -> Any:
    return load()[0].model.vision_tower.embeddings.patch_embedding


def shown(drawn: Scene) -> np.ndarray:
    """The share of each patch that a thing or its print covers."""
    out = np.zeros(GRID * GRID, np.float32)
    for thing in drawn.things:
        boxes = [(thing.x, thing.y, shape_mask(thing.shape, thing.size))]
        if thing.tag:
            boxes.append((thing.tag.x, thing.tag.y, np.ones((thing.tag.height, thing.tag.width), np.float32)))
        for box in boxes:
            patches, share = coverage(*box)
            out[patches] = np.maximum(out[patches], share)
    return out


@functools.cache
def scorer() -> Scorer:
    """Trained on pictures of the training split to tell patches that show something."""
    torch.manual_seed(0)
    net, embed, data = Scorer(), embedding(), []
    for first in range(0, PICTURES, 8):
        scenes = [scene("train", 900, first + i, dense=i % 3 == 0, crowded=i % 3 != 0) for i in range(8)]
        with torch.no_grad():
            data.append((embed(to_pixels([render(s) for s in scenes])), torch.from_numpy(np.stack([shown(s) for s in scenes])).view(8, GRID, GRID)))
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=4 * len(data))
    for number in torch.cat([torch.randperm(len(data)) for _ in range(4)]).tolist():
        embedded, cover = data[number]
        loss = nn.functional.binary_cross_entropy_with_logits(net(embedded), (cover > 0.03).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def learned(view: TowerView) -> Tensor:
    embedded = torch.einsum("nucij,dcij->ndu", colours(view), embedding().weight)
    return scorer()(embedded.unflatten(2, (GRID, GRID))).flatten(1)


RULES = {"chroma": chroma, "edges": edges, "around": around, "change": change, "learned": learned}


def cells(task: str) -> list[dict[str, Any]]:
    def behind(tower: str, label: str, **settings: Any) -> dict[str, Any]:
        own = {f"{tower}_{key}": value for key, value in {"keep": KEEP, **settings}.items()}
        return {"method": f"{tower}+{METHOD}", "budgets": [BUDGET], "settings": own, "label": label}

    start = [
        {"method": METHOD, "budgets": [BUDGET], "label": WHOLE},
        behind("contrast", "contrast"),
        behind("contrast", "contrast, no mass", mass=False),
        behind("contrast", "contrast, ground 8%", ground=0.08),
    ]
    if task == "tiny-video":
        return [
            *start,
            behind("tower_try", "contrast + change, no mass", rule="change", mass=False),
            behind("rlt", "change"),
            behind("motion", "motion"),
            behind("motion", "motion, mass", mass=True),
        ]
    tried = {"chroma": "chroma", "edges": "edges", "around": "neighbourhood"}
    return [
        *start,
        behind("contrast", "contrast, ground 4%", ground=0.04),
        behind("contrast", "contrast, ground 16%", ground=0.16),
        *(behind("tower_try", f"contrast + {name}", rule=rule) for rule, name in tried.items()),
        behind("tower_try", "learned scorer", rule="learned", weight=10.0),
        behind("tower_try", "contrast, then short keys after 2 blocks", rule="second", keep=0.37),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--seed", type=int, default=508)
    args = parser.parse_args()
    torch.set_num_threads(1)
    scorer()
    rows = []
    for task, model in TASKS.items():
        job = Experiment(task, tuple(cells(task)), model, (args.seed,), args.limit, against=WHOLE)
        with tempfile.TemporaryDirectory() as folder:
            result = run_experiment(job, "tower", Path(folder) / "journals", workers=1, timing_rounds=0)
        for row in result["runs"][1:]:
            rows.append({"task": task, "tower": row["label"], "accuracy": row["accuracy"], "full": result["runs"][0]["accuracy"]})
            if row.get("against"):
                rows[-1] |= {"difference": row["against"]["difference"], "interval": row["against"]["interval"]}
            print(*rows[-1].values(), flush=True)
    out = {"benchmark": "tower_tries", "questions": args.limit, "seed": args.seed, "environment": environment(), "results": rows}
    (HERE / "results" / "tower_tries.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
