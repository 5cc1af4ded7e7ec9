"""The model for VLMEvalKit, by itself: answers as the library gives them, costs, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import duet_vlm
from duet_vlm.evaluation import tiny
from duet_vlm.evaluation.vlmevalkit import VLMEvalKitModel


def test_answers_equal_the_librarys_own(tmp_path: Path) -> None:
    scenes = [tiny.sample("test", i, 0) for i in range(6)]
    stock, processor = tiny.load()
    expected = []
    with duet_vlm.attach(stock, "duet", budget=0.11):
        for scene in scenes:
            inputs = processor(images=scene.image, text=tiny.prompt(scene.question), return_tensors="pt")
            out = stock.generate(**inputs, max_new_tokens=4)
            expected.append(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    model = VLMEvalKitModel("tiny", budget=0.11, device="cpu", max_new_tokens=4, measured=tmp_path / "m.json")
    model.set_dump_image(lambda line: [])
    said = []
    for i, scene in enumerate(scenes):
        scene.image.save(tmp_path / f"{i}.png")
        message = [{"type": "image", "value": str(tmp_path / f"{i}.png")}, {"type": "text", "value": scene.question}]
        said.append(model.generate(message=message, dataset="Scenes"))
    assert said == expected
    counted = json.loads((tmp_path / "m.json").read_text())
    assert counted["method"] == "duet" and counted["budget"] == 0.11
    scenes_cost = counted["tasks"]["Scenes"]
    assert scenes_cost["images"] == 6 and scenes_cost["measured_mean"] == scenes_cost["nominal_mean"] == 28


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="leave out method"):
        VLMEvalKitModel("tiny", method="duet", preset="duet-64")
    with pytest.raises(ValueError, match="duet has no setting 'depth'"):
        VLMEvalKitModel("tiny", budget=0.5, settings={"depth": 3}, device="cpu")
    model = VLMEvalKitModel("tiny", method="none", device="cpu")
    with pytest.raises(ValueError, match="brings video: duet_vlm reduces images only"):
        model.generate([{"type": "video", "value": "clip.mp4"}])
