"""Which chains of ``tiny-chain`` a training has learned, move by move: ``python benchmarks/chain_moves.py out/tiny-chain/chain``.

Asks about validation pictures with all 256 tokens; writes comparison/tiny-chain/moves.json. A few minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from common import environment

from duet_vlm.evaluation.tiny.network import VISUAL_TOKENS
from duet_vlm_lab.generators.chain_questions import Chain
from duet_vlm_lab.recipe.chain import ChainStage, chosen
from duet_vlm_lab.recipe.chain_lessons import LESSONS, questions
from duet_vlm_lab.recipe.chain_packing import pack
from duet_vlm_lab.recipe.stages import last_checkpoint, weights

HOME = Path(__file__).resolve().parents[1] / "comparison" / "tiny-chain"
ASKED = ["hop1"] * 4 + ["hop2"] * 8 + ["hop3"] * 8 + [kind for kind in LESSONS if kind != "order"]
TOGETHER = 4  # pictures


def name_of(asked: object) -> str:
    """The kind; of chains that the task asks also the moves, by their first letters, or how many are by colour."""
    kind = asked.kind  # type: ignore[attr-defined]
    if not isinstance(asked, Chain) or kind in LESSONS:
        return kind
    colors = asked.moves.count("same color")
    return f"{kind}, {colors} by color" if len(asked.moves) > 2 else f"{kind}: {', '.join(asked.moves)}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the training's checkpoints are")
    parser.add_argument("--pictures", type=int, default=80)
    args = parser.parse_args()
    torch.set_num_threads(1)
    stage = ChainStage(0, 1, False, TOGETHER)
    stage.load_state_dict(weights(args.folder))
    stage.eval()
    hits: dict[str, list[bool]] = defaultdict(list)
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for first in range(0, args.pictures, TOGETHER):
            lessons, seen = stage.held[4].take(first, TOGETHER)
            asked = [questions(lesson.scene, ASKED, rng) for lesson in lessons]
            patches = chosen(lessons, VISUAL_TOKENS, rng)
            _, right = stage.answers(asked, seen, patches, pack(asked, patches, VISUAL_TOKENS))
            for row, mine in zip(right.tolist(), asked, strict=True):
                for hit, one in zip(row, mine, strict=True):
                    hits[name_of(one)].append(hit)
    step = last_checkpoint(args.folder)
    found = {name: {"accuracy": round(float(np.mean(some)), 4), "questions": len(some)} for name, some in sorted(hits.items())}
    out = {"checkpoint": None if step is None else step.name, "pictures": args.pictures, "environment": environment(), "accuracy": found}
    HOME.mkdir(exist_ok=True)
    (HOME / "moves.json").write_text(json.dumps(out, indent=1) + "\n")
    for name, row in found.items():
        print(f"{name:<28} {row['accuracy']:.2f} of {row['questions']}")


if __name__ == "__main__":
    main()
