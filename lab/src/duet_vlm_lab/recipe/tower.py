"""Stage A: the vision tower learns to label every patch, and CLS to know what is on the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel

from duet_vlm.evaluation.tiny.labels import LABELS, PRESENCE, patch_labels, presence
from duet_vlm.evaluation.tiny.network import FEATURE_LAYER, WIDTH, tower_config
from duet_vlm.evaluation.tiny.render import render
from duet_vlm.evaluation.tiny.scenes import GRID, scene
from duet_vlm_lab.recipe.optim import optimizers, rate
from duet_vlm_lab.recipe.stages import Stage
from duet_vlm_lab.recipe.starts import start_tower

BATCH = 8
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
SPLITS = [*LABELS.values(), GRID, GRID]
NAMES = [*LABELS, "row", "column"]


def to_pixels(images: list[np.ndarray]) -> Tensor:
    """(B, 3, 224, 224), normalised like the processor does."""
    return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


class Heads(nn.Module):
    """Linear read-outs of the tower: labels per patch, presence from CLS (feature layer and last layer)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, sum(SPLITS)))
        self.early_cls = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, PRESENCE))
        self.cls = nn.Linear(WIDTH, PRESENCE)


@dataclass(frozen=True)
class Targets:
    """Labels (B, 256, 6) int64 and presence (B, PRESENCE) float32."""

    labels: Tensor
    presence: Tensor


def grid_labels(n: int) -> Tensor:
    """Row and column of every patch, (n, 256, 2)."""
    p = torch.arange(GRID * GRID)
    return torch.stack([p // GRID, p % GRID], -1).expand(n, -1, -1)


def dense_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of all patch labels.

    Foreground and background are averaged apart, so that the background cannot drown the rest.

    Parameters
    ----------
    logits : Tensor (B, 256, sum of classes)
    labels : Tensor (B, 256, 6)

    Returns
    -------
    loss : Tensor
    accuracy : dict
        Per label, over the patches that have it.
    """
    labels = torch.cat([labels, grid_labels(len(labels))], -1)
    total, accuracy = logits.new_zeros(()), {}
    for name, part, i in zip(NAMES, logits.split(SPLITS, -1), range(len(NAMES)), strict=True):
        target = labels[..., i]
        loss = F.cross_entropy(part.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        if name in ("row", "column"):
            total = total + 0.1 * loss.mean()
            shown = torch.ones_like(target, dtype=torch.bool)
        else:
            shown = target > 0
            total = (
                total + (loss * shown).sum() / shown.sum().clamp(min=1) + 0.5 * (loss * ~shown).sum() / (~shown).sum()
            )
        hit = (part.argmax(-1) == target) & shown
        accuracy[name] = hit.sum().item() / max(1, shown.sum().item())
    return total, accuracy


def presence_loss(heads: Heads, features: Tensor, cls: Tensor, present: Tensor) -> Tensor:
    """Loss of naming what is on the picture, from CLS of the feature layer (features (B, 257, WIDTH)) and from the last
    one (B, WIDTH)."""
    weight = torch.tensor(3.0)  # most things are absent
    late = F.binary_cross_entropy_with_logits(heads.cls(cls), present, pos_weight=weight)
    return late + F.binary_cross_entropy_with_logits(heads.early_cls(features[:, 0]), present, pos_weight=weight)


def tower_loss(
    tower: CLIPVisionModel, heads: Heads, pixels: Tensor, targets: Targets
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss of labels, loss of presence, and accuracies; also see :func:`dense_loss`."""
    out = tower(pixels, output_hidden_states=True)
    features = out.hidden_states[FEATURE_LAYER].float()
    dense, accuracy = dense_loss(heads.patch(features[:, 1:]), targets.labels)
    cls = out.pooler_output.float()
    seen = presence_loss(heads, features, cls, targets.presence)
    said, true = heads.cls(cls) > 0, targets.presence > 0
    accuracy["presence"] = (said & true).sum().item() / max(1, (said | true).sum().item())
    return dense, seen, accuracy


def draw(split: str, seed: int, first: int, n: int, dense: float = 0.0, plain: float = 0.0) -> tuple[Tensor, Targets]:
    """Pictures ``first`` to ``first + n`` of a stream; the first ``dense`` share of them crowded."""
    scenes = [scene(split, seed, first + i, dense=i < round(dense * n)) for i in range(n)]
    pixels = to_pixels([render(s, plain) for s in scenes])
    labels = torch.from_numpy(np.stack([patch_labels(s) for s in scenes]))
    return pixels, Targets(labels, torch.from_numpy(np.stack([presence(s) for s in scenes])))


class TowerStage(Stage):
    """Tower and read-outs on ``BATCH`` pictures a step: first plain and crowded ones, later with full clutter."""

    def __init__(self, seed: int, steps: int, bf16: bool) -> None:
        super().__init__(seed, steps, bf16)
        self.tower, self.heads = CLIPVisionModel(tower_config("eager")), Heads()
        start_tower(self.tower, torch.Generator().manual_seed(seed))

    def batch(self, step: int) -> dict[str, Any]:
        t = step / self.steps
        plain = 1.0 if t < 0.08 else max(0.0, 1 - (t - 0.08) / 0.32)
        pixels, targets = draw("train", self.seed, step * BATCH, BATCH, 0.75 if t < 0.6 else 0.4, plain)
        return {"pixels": pixels, "targets": targets}

    def forward(self, pixels: Tensor, targets: Targets) -> dict[str, Any]:
        with self.autocast():
            dense, seen, accuracy = tower_loss(self.tower, self.heads, pixels, targets)
        return {
            "loss": dense + 2 * seen,
            "dense": dense.item(),
            "seen": seen.item(),
            **{k: round(v, 2) for k, v in accuracy.items()},
        }

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return optimizers(self.named_parameters(), matrix=0.006, query_key=0.0015, embedding=2e-4, rest=1.5e-3)

    def rate(self, step: int) -> float:
        return rate(step / self.steps)

    @torch.no_grad()
    def validate(self, n: int = 48) -> dict[str, float]:
        """Accuracy per label on validation pictures with full clutter."""
        parts = [tower_loss(self.tower, self.heads, *draw("validation", 0, i, 24))[2] for i in range(0, n, 24)]
        return {k: round(float(np.mean([p[k] for p in parts])), 3) for k in parts[0]}
