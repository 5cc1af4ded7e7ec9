"""Who is awake at each layer for a question of three hops: ``python lab/studies/chain_picture.py`` draws
docs/images/reentry.png."""

from __future__ import annotations

from pathlib import Path

import torch

import duet_vlm
from duet_vlm.api.loading import load
from duet_vlm.viz import draw
from duet_vlm_lab.tasks import chain

FILE = Path(__file__).resolve().parents[2] / "docs" / "images" / "reentry.png"
INDEX, SEED, BUDGET = 9, 951, 0.05


def main() -> None:
    item = chain.sample("test", INDEX, SEED)
    loaded = load("tiny-chain", "cpu")
    inputs = loaded.inputs([item.image], item.question)
    with (
        torch.no_grad(),
        duet_vlm.attach(loaded.model, "duet_plus", budget=BUDGET, options={"reentry": "layer"}) as handle,
    ):
        out = loaded.model.generate(**inputs, max_new_tokens=4)
        answer = loaded.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        ((trace,),) = handle.trace
    lines = [item.question, f"answer: {answer}"]
    picture = draw(item.image, trace, title=f"duet_plus at {BUDGET:.0%}, re-entry in front of every layer", lines=lines)
    picture.save(FILE, optimize=True)


if __name__ == "__main__":
    main()
