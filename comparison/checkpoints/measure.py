"""What the unguided finish changed: ``python comparison/checkpoints/measure.py`` writes measured.json beside this file.

Both checkpoints answer the same validation questions of the default and of the crowded stream, whole and with methods attached;
and both tell how much of their attention falls on the patches that an answer needs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from transformers import LlavaForConditionalGeneration

import duet_vlm
from duet_vlm import tiny
from duet_vlm.tiny.evaluate import table
from duet_vlm.tiny.questions import KINDS
from duet_vlm.tiny.recipe.finish import looks
from duet_vlm.tiny.recipe.reading import ANSWER_LAYERS, COUNT_HEAD, COUNT_LAYERS, GUIDED_LAYERS, SHARED_LAYERS

HERE = Path(__file__).parent
FILE = HERE / "measured.json"
CHECKPOINTS = {"shipped": tiny.path(), "unguided": HERE / "unguided"}
METHODS = ("duet", "visionzip", "pyramiddrop", "fastv")
BUDGET = 0.11
BATCH = 35


def answers(model: Any, processor: Any, items: list[tiny.Sample], method: str) -> list[bool]:
    """Which of the answers of ``generate`` are right, with a method attached ("none": the whole model)."""
    inputs = processor(images=[i.image for i in items], text=[tiny.prompt(i.question) for i in items], return_tensors="pt", padding=True)
    with duet_vlm.attach(model, method, budget=1.0 if method == "none" else BUDGET), torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    said = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() == item.answer for text, item in zip(said, items, strict=True)]


def accuracy(model: Any, processor: Any, crowded: bool, questions: int, tick: Any) -> dict[str, dict[str, Any]]:
    """Accuracy with its 95 % interval, and accuracy per kind, of every method on one stream."""
    hits: dict[str, dict[str, list[bool]]] = {method: {kind: [] for kind in KINDS} for method in ("none", *METHODS)}
    for first in range(0, questions, BATCH):
        items = [tiny.sample("validation", i, crowded=crowded) for i in range(first, min(first + BATCH, questions))]
        for method, found in hits.items():
            for item, hit in zip(items, answers(model, processor, items, method), strict=True):
                found[item.kind].append(hit)
            tick()
    out = {}
    for method, found in hits.items():
        rows = table(found)
        whole = rows.pop("all")
        out[method] = {k: whole[k] for k in ("accuracy", "low", "high")} | {"kinds": {k: row["accuracy"] for k, row in rows.items()}}
    return out


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
    parser.add_argument("--questions", type=int, default=350)
    parser.add_argument("--pictures", type=int, default=48, help="pictures with 16 questions each for the attention")
    parser.add_argument("--only", choices=CHECKPOINTS, help="measure this one and keep what the file says of the other")
    options = parser.parse_args()
    settings = {"split": "validation", "budget": BUDGET, "questions": options.questions, "pictures": options.pictures}
    names = [options.only] if options.only else list(CHECKPOINTS)
    result: dict[str, Any] = json.loads(FILE.read_text()) if options.only and FILE.exists() else {}
    if result and result["settings"] != settings:
        raise ValueError(f"{FILE} was measured with {result['settings']}, not {settings}: run without --only")
    with Progress() as progress:
        total = len(names) * 2 * -(-options.questions // BATCH) * (1 + len(METHODS))
        bar = progress.add_task("asking", total=total)
        for name in names:
            model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINTS[name], dtype=torch.float32).eval()
            processor = tiny.load()[1]
            streams = {"default": False, "crowded": True}
            result[name] = {
                stream: accuracy(model, processor, crowded, options.questions, lambda: progress.advance(bar))
                for stream, crowded in streams.items()
            }
            result[name]["attention"] = attention(model, options.pictures)
    environment = {"version": duet_vlm.__version__, "torch": torch.__version__}
    FILE.write_text(json.dumps(result | {"settings": settings, "environment": environment}, indent=1) + "\n")


if __name__ == "__main__":
    main()
