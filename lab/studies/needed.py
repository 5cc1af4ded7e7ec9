"""How many patches the questions of ``tiny-chain`` need, by kind: ``python lab/studies/needed.py`` writes
lab/comparison/tiny-chain/needed.json.

Drawn questions alone, no model.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from duet_vlm_lab.tasks import chain

FILE = Path(__file__).resolve().parent.parent / "comparison" / "tiny-chain" / "needed.json"
KINDS, EACH, SEED = ("hop1", "hop2", "hop3"), 50, 0


def main() -> None:
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    index = 0
    while any(len(counts) < EACH for counts in found.values()):
        item = chain.sample("test", index, SEED)
        if len(found.get(item.kind, [0] * EACH)) < EACH:
            found[item.kind].append(int(item.needed.sum()))
        index += 1
    patches = {
        kind: {"mean": float(np.mean(counts)), "p90": float(np.quantile(counts, 0.9))} for kind, counts in found.items()
    }
    FILE.write_text(
        json.dumps({"split": "test", "seed": SEED, "questions_of_a_kind": EACH, "patches": patches}, indent=1) + "\n"
    )
    print(patches)


if __name__ == "__main__":
    main()
