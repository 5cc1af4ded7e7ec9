"""Effect of the unguided finish: ``python lab/comparison/checkpoints/measure.py`` writes measured.json beside this
file.

How much of both checkpoints' attention falls on the patches that an answer needs. Accuracy is the business of
``duet-vlm eval``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

import duet_vlm
from duet_vlm.evaluation import tiny
from duet_vlm_lab.recipe.finish import looks
from duet_vlm_lab.recipe.reading import ANSWER_LAYERS, COUNT_HEAD, COUNT_LAYERS, GUIDED_LAYERS, SHARED_LAYERS

HERE = Path(__file__).parent
FILE = HERE / "measured.json"
CHECKPOINTS = {"shipped": tiny.path(), "unguided": HERE / "unguided"}


def attention(model: LlavaForConditionalGeneration, pictures: int) -> dict[str, Any]:
    """Attention of ``ASSISTANT:`` on needed patches, by layer and in the heads that joint training supervised."""
    seen = looks(model, pictures)
    mass, share = torch.tensor(seen["mass"]), torch.tensor(seen["share"])

    def guided(of: torch.Tensor) -> dict[str, float]:
        groups = {
            "lookup heads": of[list(ANSWER_LAYERS), :2],
            "counting heads": of[list(COUNT_LAYERS), COUNT_HEAD],
            "shared layers": of[list(SHARED_LAYERS)],
            "all supervised layers": of[list(GUIDED_LAYERS)],
        }
        return {name: round(part.mean().item(), 4) for name, part in groups.items()}

    by_layer = {"mass": mass.mean(1), "share": share.mean(1)}
    return {
        "needed patches": seen["patches"],
        "mass": guided(mass),
        "share of visual attention": guided(share),
        "by layer": {name: [round(x, 4) for x in values.tolist()] for name, values in by_layer.items()},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=48, help="validation pictures, with 16 questions each")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    for name, folder in CHECKPOINTS.items():
        result[name] = attention(
            LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval(), options.pictures
        )
    settings = {"split": "validation", "pictures": options.pictures}
    environment = {"version": duet_vlm.__version__, "torch": torch.__version__}
    FILE.write_text(json.dumps(result | {"settings": settings, "environment": environment}, indent=1) + "\n")


if __name__ == "__main__":
    main()
