"""The verb that measures: sides in turns, stages that add up, complete result files, pictures, and a model that is left as it was."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, ONE, build
from typer.testing import CliRunner

import duet_vlm
from duet_vlm.bench.inputs import prompt_for
from duet_vlm.bench.plots import draw
from duet_vlm.bench.run import Plan, Side, result, sides_of
from duet_vlm.bench.shapes import random_model
from duet_vlm.cli.main import app
from duet_vlm.measure.devices import SHEETS, Device
from duet_vlm.models.adapter import adapter_for

SHEET = Device("made up", {"fp32": 1e11}, 1e10, 1e10, "made up", measured=True)
FAST = {"new": 3, "rounds": 2, "warmup": 0}


def hooks_of(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    model = build(request.param)
    inputs = FAMILIES[request.param].inputs([ONE])
    with torch.no_grad():
        before = model(**inputs).logits
    hooks = hooks_of(model)
    plan = Plan((*sides_of(["duet", "fastv", "random"], [0.5]), Side("fastv", 1)), (1, 2), (9,), tokens=36, **FAST)
    out = result(request.param, model, plan, SHEET, lambda line: None)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    assert hooks_of(model) == hooks
    return json.loads(json.dumps(out))


def test_every_side_has_a_row_per_batch(found: dict[str, Any]) -> None:
    measured = [(row["side"], row["batch"]) for row in found["rows"] if "ms" in row]
    assert sorted(measured) == sorted((side, batch) for side in ("full", "duet at 50%", "fastv at 50%", "random at 50%") for batch in (1, 2))
    floors = [row for row in found["rows"] if row.get("status") == "infeasible"]
    assert len(floors) == 2 and all(row["floor"] == 36 / 8 for row in floors)
    assert {"torch", "transformers", "threads", "cpu", "dtype", "commit", "attention"} <= set(found["environment"])


def test_stages_add_up(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        if "ms" not in row:
            continue
        ms = {name: spread["median"] for name, spread in row["ms"].items()}
        assert row["ms"]["prefill"]["low"] <= ms["prefill"] <= row["ms"]["prefill"]["high"]
        assert ms["vision"] > 0 and ms["projector"] > 0 and ms["decode step"] > 0
        assert ms["end to end"] > ms["decode step"]
        # two rounds: medians are means, and sums of means are means of sums
        assert ms["vision"] + ms["v2v"] + ms["projector"] + ms["prefill"] == pytest.approx(ms["to first token"], rel=0.01)
        layers = sum(group["ms"] for group in row["groups"]) + sum(row["before_layers_ms"])
        assert 0 < layers < ms["prefill"]


def test_rows_say_what_was_planned(found: dict[str, Any]) -> None:
    rows = {row["side"]: row for row in found["rows"] if "ms" in row and row["batch"] == 1}
    assert rows["full"]["speed_up"]["prefill"] == {"median": 1, "low": 1, "high": 1} and rows["full"]["flops_bound"] == 1
    assert [g["rows"] for g in rows["full"]["groups"]] == [46] and rows["full"]["t2v"] == []
    plan = duet_vlm.get("duet")().plan(36, 8, 0.5)
    assert [n for g in rows["duet at 50%"]["groups"] for n in [g["rows"] - 10] * (g["layers"][1] - g["layers"][0] + 1)] == list(plan.counts)
    assert [stage["layer"] for stage in rows["duet at 50%"]["t2v"]] == [i for i in range(1, 8) if plan.counts[i] != plan.counts[i - 1]]
    for row in rows.values():
        assert row["peak_bytes"] > row["kv_bytes"] > 0 and row["tokens"] == 36
        predicted = row["predicted_ms"]
        assert predicted["to first token"] <= predicted["end to end"] and predicted["prefill"] > 0
    assert rows["random at 50%"]["predicted_ms"]["prefill"] < rows["full"]["predicted_ms"]["prefill"]


def test_pictures(found: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = draw(found, tmp_path / "deep")
    assert {file.name for file in files} == {"time.png", "speed_up.png", "cache.png"}
    assert all(file.stat().st_size > 5000 for file in files)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_for_every_family(family: str) -> None:
    """The stock model takes them, and every row of a batch is the same."""
    model = build(family)
    prompt = prompt_for(adapter_for(model), 2, 7, tokens=30)
    with torch.no_grad():
        logits = model(**prompt.text, **prompt.picture).logits
    assert logits.shape[:2] == (2, prompt.rows) == (2, prompt.tokens + 8)
    assert torch.allclose(logits[0], logits[1], atol=1e-4)


def test_clips_and_what_a_family_has_not() -> None:
    prompt = prompt_for(adapter_for(build("qwen2_vl")), 1, 5, tokens=48, frames=3)
    assert prompt.stream == "video" and prompt.tokens == 48
    with pytest.raises(ValueError, match="llava models take no videos"):
        prompt_for(adapter_for(build("llava")), 1, 5, frames=3)


def test_random_models_come_from_a_config_alone(tmp_path: Path) -> None:
    model = FAMILIES["llava_gqa"].make()
    model.config.save_pretrained(tmp_path)
    made = random_model(tmp_path)
    assert type(made) is type(model) and not made.training and next(made.parameters()).device.type == "cpu"
    assert sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in model.parameters())
    assert all(torch.isfinite(p).all() for p in made.parameters())
    with pytest.raises(ValueError, match="no such file"):
        random_model(tmp_path / "nothing")


# ---- the verb


def call(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def test_the_verb(tmp_path: Path) -> None:
    FAMILIES["llava"].make().config.save_pretrained(tmp_path)
    words = ["--config-only", tmp_path, "--method", "duet", "-b", "0.5", "--rounds", 1, "--new", 2, "--no-predict", "--batch", 1, "--batch", 2]
    shown = call(*words, "--out", tmp_path / "r" / "out.json", "--plots", tmp_path / "pictures").stdout
    assert "duet at 50%" in shown and "batch 2" in shown
    written = json.loads((tmp_path / "r" / "out.json").read_text())
    assert len(written["rows"]) == 4 and math.isfinite(written["rows"][1]["speed_up"]["prefill"]["median"])
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3
    printed = json.loads(call(*words, "--json").stdout)
    assert [row["side"] for row in printed["rows"]] == [row["side"] for row in written["rows"]] and printed["sheet"] is None


def test_what_is_wrong_is_said() -> None:
    assert "choose one of" in call("--dtype", "int4", code=2).stderr
    assert "nosuch" in call("--method", "nosuch", "--no-predict", code=2).stderr
    assert "--budget many" in call("-b", "many", "--no-predict", code=2).stderr


@pytest.mark.parametrize("names", [["llava-1.5-7b"], pytest.param([], marks=pytest.mark.slow)])
def test_the_scripts_for_a_gpu_run_at_a_tiny_shape(names: list[str], tmp_path: Path) -> None:
    """End to end on the CPU: every case, complete rows, the largest batch, anchors that are marked as others' figures."""
    script = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run.py"
    words = [sys.executable, str(script), *names, "--device", "cpu", "--shape", "tiny", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(words, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=300, capture_output=True, text=True)
    assert "not a comparison" in done.stdout and "SIEVE" in done.stdout
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["shape"] == "tiny" and len(found["cases"]) == (2 if names else 12)
    for case in found["cases"]:
        assert case["attention"] == "sdpa" == case["environment"]["attention"]
        assert {"full", "duet at 33%", "duet at 22%", "duet at 11%"} <= {row["side"] for row in case["rows"] if "ms" in row}
        assert all(("end to end" in row["ms"]) == ("largest_batch" in case) for row in case["rows"] if "ms" in row)
    assert set(found["cases"][0]["largest_batch"]) == {"full", "duet at 33%", "duet at 22%", "duet at 11%"}
    assert set(found["cases"][0]["largest_batch"].values()) == {2}


def test_sheets_are_found_by_the_name_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from duet_vlm.bench import run

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert run.sheet_of("cuda") is SHEETS["h200"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    assert run.sheet_of("cuda:0") is None
