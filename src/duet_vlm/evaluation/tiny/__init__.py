"""A small LLaVA that ships inside the package, trained by us on procedural pictures: for tests, demos and honest
benchmarks.

>>> from duet_vlm.evaluation import tiny
>>> model, processor = tiny.load()
>>> item = tiny.samples("test", 1)[0]
>>> inputs = processor(images=item.image, text=tiny.prompt(item.question), return_tensors="pt")
>>> answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
>>> processor.decode(answer, skip_special_tokens=True) == item.answer
True
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from duet_vlm.api.embedded import EmbeddedModel, EmbeddedTask, Sample
from duet_vlm.evaluation.tiny.kinds import KINDS

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["MODEL", "TASK", "DemoImage", "Sample", "demo_images", "draw", "load", "path", "prompt", "sample", "samples"]

_HERE = Path(__file__).parent
TRIES = 16  # scenes drawn for one question; a scene does not offer every kind


@dataclass(frozen=True)
class DemoImage:
    """One shipped picture with (question, answer) pairs."""

    name: str
    image: Image.Image
    questions: tuple[tuple[str, str], ...]


def draw(split: str, seed: int, number: int, kind: str, crowded: bool = False) -> Sample | None:
    """Scene ``number`` of the stream (split, seed, crowded) with a question of a kind; None where the scene offers
    none.

    ``needed`` is (256,), the patches of a picture of 224 x 224.
    """
    from PIL import Image

    from duet_vlm.evaluation.tiny.questions import needed_patches, question
    from duet_vlm.evaluation.tiny.render import render
    from duet_vlm.evaluation.tiny.scenes import scene

    drawn = scene(split, seed, number, crowded=crowded)
    scene_question = question(drawn, kind, drawn.generator(2))
    if scene_question is None:
        return None
    return Sample(
        scene_question.text,
        scene_question.answer,
        kind,
        needed_patches(drawn, scene_question),
        (Image.fromarray(render(drawn)),),
    )


MODEL = EmbeddedModel("tiny", _HERE / "weights")
TASK = EmbeddedTask("tiny", MODEL, KINDS, draw, TRIES)
path, load, prompt, sample, samples = TASK.path, TASK.load, TASK.prompt, TASK.sample, TASK.samples


def demo_images() -> list[DemoImage]:
    """The shipped demo pictures with their questions and right answers."""
    from duet_vlm.inputs.images import open_image

    listed = json.loads((_HERE / "demo" / "questions.json").read_text())
    out = []
    for name, pairs in listed.items():
        out.append(DemoImage(name, open_image(_HERE / "demo" / name), tuple((q, a) for q, a in pairs)))
    return out
