"""What two ranks train on and how, for test_distributed.py and the scripts that it launches (light to import: no
pytest, no trainers)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from training_data import SAMPLES, Sample

BUDGET = 0.4
MOMENTUM = 0.5

ONE, TEXT, THREE, SILENT, TWO, TEXT2, ONE2, ONE3 = SAMPLES
# per step the samples of either rank: images on both, none on the second, none on the first, images and text mixed
STEPS: tuple[tuple[tuple[Sample, ...], tuple[Sample, ...]], ...] = (
    ((ONE, THREE), (TWO,)),
    ((ONE2, SILENT), (TEXT, TEXT2)),
    ((TEXT2,), (ONE3, TEXT)),
    ((THREE, TEXT), (ONE,)),
)


@dataclass(frozen=True)
class Scenario:
    """``attach``: before or after accelerator.prepare. ``tower``: trained or frozen. ``checkpointing``: none, model or
    plugin."""

    family: str
    attach: str
    tower: str
    checkpointing: str

    @property
    def name(self) -> str:
        return "-".join((self.family, self.attach, self.tower, self.checkpointing))


def freeze(model: nn.Module, tower: str) -> None:
    if tower == "frozen":
        for name, weight in model.named_parameters():
            weight.requires_grad_("vision_tower" not in name and "visual" not in name)
