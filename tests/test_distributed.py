"""Two processes (gloo, CPU) through ``accelerate launch``: DDP and FSDP2 train as one process on the joined batch does.

The configurations are those of docs/configs with only the machine replaced, so what users copy is what runs here.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from families import build
from ranks_data import BUDGET, MOMENTUM, STEPS, Scenario, freeze
from stock_trainer import losses, trainer
from training_data import RATE, Curve, collate, farthest, plain_loop, tokens_wanted, weights
from transformers import LlavaForConditionalGeneration

import duet_vlm

pytestmark = pytest.mark.train

ROOT = Path(__file__).parents[1]
FAMILIES_OF_CONFIGS = pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
TIMEOUT = 240  # seconds; a rank that waits for ever is a failure


@functools.lru_cache
def single(
    family: str, tower: str, reduced: bool = True
) -> tuple[Curve, dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    """One process on the joined batches: curve, weights before and after, and the loss of an evaluation on the second
    step's samples."""
    model = build(family)
    freeze(model, tower)
    before = weights(model)
    handle = duet_vlm.attach(model, "duet", budget=BUDGET) if reduced else None
    curve = plain_loop(model.train(), handle, [[collate(family, first + second)] for first, second in STEPS])
    evaluated = plain_loop(model, handle, [[collate(family, STEPS[1][0] + STEPS[1][1])]], rate=0.0).losses[0]
    return curve, before, weights(model), evaluated


def config_for_two(name: str, folder: Path) -> Path:
    """A configuration of docs/configs for two processes in float32."""
    machine = {"num_processes": "2", "mixed_precision": "'no'"}
    lines = (ROOT / "docs" / "configs" / name).read_text().splitlines()
    path = folder / name
    path.write_text(
        "\n".join(f"{key}: {machine[key]}" if (key := line.split(":")[0]) in machine else line for line in lines) + "\n"
    )
    return path


def launch(config: str, script: str, folder: Path, *arguments: str) -> str:
    """Two ranks of ``script FOLDER ARGUMENTS`` under ``accelerate launch``; what they printed."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_for_two(config, folder)),
        "--main_process_port", "0", str(ROOT / "tests" / "distributed" / script), str(folder), *arguments,
    ]  # fmt: skip
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True
        )
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, 9)
            process.wait()
    printed = (folder / "log.txt").read_text()
    assert code == 0, f"{'hangs' if code is None else f'exit code {code}'}:\n{printed[-6000:]}"
    return printed


def check(found: dict[str, Any], scenario: Scenario) -> None:
    curve, before, after, evaluated = single(scenario.family, scenario.tower)
    full = single(scenario.family, scenario.tower, reduced=False)[0]
    assert found["ranks"] == 2
    assert found["losses"] == pytest.approx(curve.losses, rel=1e-4)
    assert all(abs(a - b) > 1e-3 for a, b in zip(found["losses"], full.losses, strict=True))
    assert found["evaluated"] == pytest.approx(evaluated, rel=1e-4)
    most = tokens_wanted(scenario.family, STEPS[-1][0], BUDGET)
    assert most - 1.5 <= found["measured"] <= most
    trained = {name: w for name, w in found["weights"].items() if name in after}
    assert farthest(trained, after, before) < 1e-3
    moved = [
        name
        for name in after
        if ("vision_tower" in name or "visual" in name) and not torch.equal(trained[name], before[name])
    ]
    assert (len(moved) > 10) == (scenario.tower == "trained")


def scenarios(family: str, *checkpointing: str) -> list[Scenario]:
    """Attached before and after prepare, tower trained and frozen, with each kind of checkpointing."""
    return [
        Scenario(family, attach, tower, mode)
        for attach in ("before", "after")
        for tower in ("trained", "frozen")
        for mode in checkpointing
    ]


def run(config: str, wanted: list[Scenario], folder: Path, kind: str) -> None:
    (folder / "scenarios.json").write_text(json.dumps([asdict(s) for s in wanted]))
    launch(config, "ranks.py", folder)
    for scenario in wanted:
        found = torch.load(folder / f"{scenario.name}.pt", weights_only=True)
        assert found["kind"].endswith(kind)
        check(found, scenario)


@functools.lru_cache
def single_trainer(folder: Path) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The stock Trainer in one process, two samples at once: curve, weights before and after."""
    model = build("llava")
    before = weights(model)
    with duet_vlm.attach(model, "duet", budget=BUDGET):
        done = trainer(model, "llava", folder, optimizer=(torch.optim.SGD, {"lr": RATE, "momentum": MOMENTUM}))
        done.train()
    return losses(done), before, weights(model)


def check_trainer(folder: Path) -> None:
    """The ranks' curve and weights are those of one process, a resumed run's those of the uninterrupted one; the
    checkpoint remembers."""
    curve, before, after = single_trainer(folder)
    curves = json.loads((folder / "curves.json").read_text())
    assert curves["whole"] == pytest.approx(curve, rel=1e-4)
    assert curves["stopped"] == pytest.approx(curve[:2], rel=1e-4)
    assert curves["resumed"] == pytest.approx(curve, rel=1e-4)
    for name in ("whole", "resumed"):
        assert duet_vlm.load_from_config(folder / name) == {"method": "duet", "budget": BUDGET, "settings": ANY}
        saved = LlavaForConditionalGeneration.from_pretrained(folder / name)
        assert farthest(weights(saved), after, before) < 1e-3


@pytest.mark.slow
def test_fsdp2(tmp_path: Path) -> None:
    ways = (("before", "trained", "none"), ("after", "frozen", "model"), ("after", "trained", "plugin"))
    run("fsdp2_llava.yaml", [Scenario("llava", *way) for way in ways], tmp_path, "FSDP")


@pytest.mark.slow
@FAMILIES_OF_CONFIGS
def test_ddp_in_every_way(family: str, tmp_path: Path) -> None:
    run("ddp.yaml", scenarios(family, "none", "model"), tmp_path, "MULTI_CPU")


@pytest.mark.slow
@FAMILIES_OF_CONFIGS
def test_fsdp2_in_every_way(family: str, tmp_path: Path) -> None:
    run(f"fsdp2_{family}.yaml", scenarios(family, "none", "model", "plugin"), tmp_path, "FSDP")


@pytest.mark.slow
def test_zero3(tmp_path: Path) -> None:
    """Skipped where DeepSpeed is not installed (no extra of ours installs it)."""
    pytest.importorskip("deepspeed")
    ways = (
        ("before", "trained", "none"),
        ("after", "trained", "none"),
        ("before", "frozen", "model"),
        ("after", "frozen", "model"),
    )
    run("zero3.yaml", [Scenario("llava", *way) for way in ways], tmp_path, "DEEPSPEED")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "model"])
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2_llava.yaml"])
def test_trainer_saves_and_resumes(config: str, checkpointing: str, tmp_path: Path) -> None:
    launch(config, "trainer.py", tmp_path, checkpointing)
    check_trainer(tmp_path)
