"""How far does a visual token's state move while it would sleep? ``python lab/studies/stale_states.py`` writes
results/stale_states.json.

The untouched models read questions; for gaps of 1, 2 and 4 layers the cosine between the state in front of the gap and
the one behind it, of each visual token, from every layer on. Sleeping for a gap leaves the first in place of the second.
"""

from __future__ import annotations

import json
from pathlib import Path

import benchmark_path  # noqa: F401
import torch
from common import environment

from duet_vlm.api.loading import load
from duet_vlm.evaluation.tasks import task

FILE = Path(__file__).resolve().parent / "results" / "stale_states.json"
MODELS = {"tiny-crowded": "tiny", "tiny-chain": "tiny-chain", "tiny-page": "tiny-page"}  # task -> model
GAPS, QUESTIONS, SEED = (1, 2, 4), 40, 505


def cosines(name: str, model: str) -> dict[str, list[float]]:
    """Mean cosine by gap, from layer 0, 1, ... on."""
    loaded, ask = load(model, "cpu"), task(name).ask
    found: dict[int, list[torch.Tensor]] = {gap: [] for gap in GAPS}
    for number in range(QUESTIONS):
        question = ask(SEED, number)
        inputs = loaded.inputs(question.images, question.text)
        with torch.no_grad():
            states = loaded.model(**inputs, output_hidden_states=True).hidden_states[:-1]  # the last one is normed
        visual = inputs["input_ids"][0] == loaded.model.config.image_token_id
        rows = torch.stack([state[0, visual] for state in states])
        for gap in GAPS:
            found[gap].append(torch.cosine_similarity(rows[:-gap], rows[gap:], dim=-1).mean(1))
    return {str(gap): torch.stack(means).mean(0).tolist() for gap, means in found.items()}


def main() -> None:
    results = {name: {"model": model, "cosines": cosines(name, model)} for name, model in MODELS.items()}
    said = {"environment": environment(), "questions": QUESTIONS, "seed": SEED, "results": results}
    FILE.write_text(json.dumps(said, indent=1) + "\n")
    for name, each in results.items():
        print(name, {gap: [round(value, 3) for value in means] for gap, means in each["cosines"].items()})


if __name__ == "__main__":
    main()
