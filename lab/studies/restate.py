"""Make the statistics of committed result files anew from the answers that they hold: after a change of how intervals
are made.

``python lab/studies/restate.py``; then ``make tables`` and ``make pictures``. Nothing is asked again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from duet_vlm.evaluation import statistics
from duet_vlm.evaluation.results import load
from duet_vlm.evaluation.summary import restated

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for path in (ROOT / "comparison").glob("*/results/*.json"))
IMPORTANCE = Path(__file__).parent / "results" / "importance.json"


def of_counts(found: dict[str, Any]) -> dict[str, Any]:
    """``importance.json``, which holds no answers, but how many were right, won and lost."""
    rows, count = [], found["questions"]
    for row in found["results"]:
        row = row | {"interval": statistics.mean_interval(np.arange(count) < round(row["accuracy"] * count))}
        if row["against"] is not None:
            wins, losses = row["against"]["wins"], row["against"]["losses"]
            places = np.arange(count)
            interval = statistics.difference_interval(places < wins, (places >= wins) & (places < wins + losses))
            row["against"] = row["against"] | {"interval": interval}
        rows.append(row)
    return found | {"results": rows}


def texts() -> dict[Path, str]:
    """Every file as it should be."""
    made = {path: restated(load(path)) for path in FILES} | {IMPORTANCE: of_counts(json.loads(IMPORTANCE.read_text()))}
    return {path: json.dumps(result, indent=1) + "\n" for path, result in made.items()}


if __name__ == "__main__":
    for path, text in texts().items():
        path.write_text(text)
