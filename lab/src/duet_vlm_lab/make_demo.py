"""Draw the shipped demo pictures: ``python -m duet_vlm_lab.make_demo``.

The first scenes of the test stream ``SEED`` that offer all kinds of question; the model's answers play no part in the
choice.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from duet_vlm.evaluation import tiny
from duet_vlm.evaluation.tiny.questions import KINDS, SceneQuestion, question
from duet_vlm.evaluation.tiny.render import render
from duet_vlm.evaluation.tiny.scenes import Scene, generator, scene

FOLDER = Path(tiny.__file__).with_name("demo")
SEED = 2024
PICTURES, PER_PICTURE = 4, 5


def _ask_all(drawn: Scene) -> list[SceneQuestion] | None:
    """One question of every kind, or None when the scene lacks one."""
    rng = generator("test", SEED, drawn.index, 2)
    asked = [question(drawn, kind, rng) for kind in KINDS]
    return None if None in asked else asked


def make(folder: Path = FOLDER) -> None:
    """Write the pictures and ``questions.json``: per picture, pairs of question and answer."""
    folder.mkdir(parents=True, exist_ok=True)
    listed: dict[str, list[tuple[str, str]]] = {}
    index = 0
    while len(listed) < PICTURES:
        drawn = scene("test", SEED, index)
        asked = _ask_all(drawn)
        index += 1
        if asked is None:
            continue
        first = len(listed) * PER_PICTURE  # rotate, so that every kind is asked somewhere
        chosen = [asked[int(i)] for i in np.arange(first, first + PER_PICTURE) % len(KINDS)]
        name = f"scene_{len(listed) + 1}.png"
        Image.fromarray(render(drawn)).save(folder / name, optimize=True)
        listed[name] = [(q.text, q.answer) for q in chosen]
    (folder / "questions.json").write_text(json.dumps(listed, indent=1) + "\n")


if __name__ == "__main__":
    make()
    print(f"wrote {FOLDER}")
