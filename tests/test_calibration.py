"""Calibration files: what the model does, other models and methods refused, the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, ONE, TEXT, THREE, TWO, forward, shared
from method_views import refused
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import duet_vlm
from duet_vlm.api.calibrate import calibrate
from duet_vlm.cli.main import app
from duet_vlm.reducers.calibration import Calibration


def mean_attention(model: Any, prompts: list[Any], layer: int) -> Tensor:
    """What image tokens get from the last text token, mean over heads and prompts, by the eager model's own maps."""
    found = []
    for inputs in prompts:
        out = model(**inputs, output_attentions=True, use_cache=False)
        there = inputs["input_ids"][0] == model.config.image_token_id
        found.append(out.attentions[layer][0, :, -1][:, there].mean(0))
    return torch.stack(found).mean(0)


def test_calibrated_files_are_what_the_model_does(tmp_path: Path) -> None:
    model, family = shared("llava", "eager"), FAMILIES["llava"]
    first = dict(family.inputs([ONE]))
    prompts = [first, first | {"pixel_values": first["pixel_values"].flip(-1)}]
    with torch.no_grad():
        plain = model(**prompts[0]).logits
        made = calibrate(model, "d2pruner", prompts, tmp_path / "prior.safetensors")
        expected = mean_attention(model, prompts, 1)
        assert torch.equal(model(**prompts[0]).logits, plain)
    (bias,) = made.data.values()
    torch.testing.assert_close(bias.flatten(), expected, rtol=1e-4, atol=1e-6)
    table = calibrate(model, "fitprune", [dict(family.inputs([row])) for row in (ONE, THREE)], tmp_path / "table.json")
    assert [len(line) for line in table.data["curves"]] == [8] * 9
    for name, setting, path in (("d2pruner", "prior", "prior.safetensors"), ("fitprune", "table", "table.json")):
        with duet_vlm.attach(model, name, budget=0.5, **{setting: str(tmp_path / path)}) as handle:
            forward(model, family.inputs([ONE, TWO]))
            assert handle.report().measured_mean > 0
            counts = handle.plan(family.tokens(ONE[2])).counts
    line = [x * family.tokens(ONE[2]) for x in table.data["curves"][4]]
    assert all(abs(a - b) < 0.15 * line[0] for a, b in zip(counts, line, strict=True))  # the line of a half, about


def test_files_of_other_models_and_methods_are_refused(tmp_path: Path) -> None:
    facts = {"family": "llava", "layers": 8, "hidden": 64, "heads": 4, "tokens": None}
    deeper = str(Calibration("fitprune", facts | {"layers": 9}, {"curves": [[1.0] * 9]}).save(tmp_path / "deeper.json"))
    message = "was made for a model with layers 9, this one has 8: make one for this model with 'duet-vlm calibrate"
    refused("fitprune", message, budget=0.5, table=deeper)
    other = str(
        Calibration("d2pruner", facts | {"family": "qwen2_vl"}, {"2x2": torch.ones(2, 2)}).save(
            tmp_path / "other.safetensors"
        )
    )
    refused("d2pruner", "was made for a model with family qwen2_vl, this one has llava", budget=0.5, prior=other)
    refused("fitprune", "was made for the method d2pruner", budget=0.5, table=other)
    refused("fitprune", "no such file; make one", budget=0.5, table=str(tmp_path / "nothing.json"))
    (tmp_path / "text.json").write_text("{}")
    refused("fitprune", "is no file of duet-vlm calibrate", budget=0.5, table=str(tmp_path / "text.json"))
    (tmp_path / "bytes.safetensors").write_bytes(b"nothing")
    refused("d2pruner", "is no file of duet-vlm calibrate", budget=0.5, prior=str(tmp_path / "bytes.safetensors"))
    refused("fitprune", "a schedule says itself what stays", schedule=((2, 0.5),), table=deeper)
    refused("d2pruner", r"important=1.5: a number in \[0, 1\]", budget=0.5, important=1.5)
    with pytest.raises(ValueError, match=r"what fitprune stores is a \.json file"):
        Calibration("fitprune", facts, {"curves": []}).save(tmp_path / "table.txt")


def test_what_cannot_be_calibrated_is_refused() -> None:
    model, family = shared("llava"), FAMILIES["llava"]
    with pytest.raises(ValueError, match="fastv is not calibrated to a model; methods that are: d2pruner, fitprune"):
        calibrate(model, "fastv", [])
    with pytest.raises(ValueError, match="nothing to calibrate by"):
        calibrate(model, "fitprune", [dict(family.inputs([TEXT]))])
    assert duet_vlm.handle_of(model) is None


def test_calibrate_on_the_command_line(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    out = tmp_path / "table.json"
    result = CliRunner().invoke(app, ["calibrate", "fitprune", "--image", str(tmp_path / "red.png"), "--out", str(out)])
    assert result.exit_code == 0 and "knows tiny from 1 image:" in result.output
    assert json.loads(out.read_text())["method"] == "fitprune"
    result = CliRunner().invoke(app, ["calibrate", "duet", "--image", str(tmp_path / "red.png"), "--out", str(out)])
    assert result.exit_code != 0 and "duet is not calibrated to a model" in result.output
