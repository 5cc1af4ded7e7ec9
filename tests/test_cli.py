"""Every verb of the command line, on the embedded model: output, JSON, errors and exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import duet_vlm
from duet_vlm import tiny
from duet_vlm.cli import demo as demo_verb
from duet_vlm.cli.main import app
from duet_vlm.cli.options import budget_of, settings_of
from duet_vlm.loading import chat_text
from duet_vlm.pictures import MAX_PIXELS

PICTURE = tiny._HERE / "demo" / "scene_1.png"
QUESTION = "What color is the ring?"


def call(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def as_json(*arguments: Any, code: int = 0) -> Any:
    return json.loads(call(*arguments, "--json", code=code).stdout)


def full_answer(question: str) -> str:
    """Straight from the library's loader, by the stock generate."""
    model, processor = tiny.load()
    inputs = processor(images=Image.open(PICTURE), text=tiny.prompt(question), return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=4)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_prompt_is_what_the_model_was_trained_on() -> None:
    _, processor = tiny.load()
    assert chat_text(processor, QUESTION, 1) == tiny.prompt(QUESTION)


def test_run_streams_compares_and_reports() -> None:
    shown = call("run", "-i", PICTURE, "-p", QUESTION, "--budget", "0.22", "--compare").stdout
    expected = full_answer(QUESTION)
    assert f"full | {expected}" in shown
    assert "duet | " in shown and "FLOPs-bound" in shown
    assert ("same answer" in shown) == (shown.split("duet | ")[1].split("\n")[0].strip() == expected)


def test_run_json() -> None:
    got = as_json("run", "-i", PICTURE, "-p", QUESTION, "-b", "64", "--compare")
    assert got["full_answer"] == full_answer(QUESTION)
    assert got["report"]["measured_mean"] == got["report"]["nominal_mean"] <= 64
    assert got["report"]["budget"] == 64


def test_run_with_settings_positions_two_images_and_a_local_folder() -> None:
    schedule = "schedule=((4, 0.5), (8, 0.25))"
    got = as_json("run", "-m", tiny.path(), "-i", PICTURE, "-i", PICTURE, "-p", QUESTION, "--positions", "compact", "--set", schedule)
    assert got["report"]["measured"] == [512] * 4 + [256] * 4 + [128] * 4
    assert got["report"]["settings"]["positions"] == "compact"


def test_run_salient_gets_the_processor() -> None:
    got = as_json("run", "-i", PICTURE, "-p", QUESTION, "-b", "0.3", "--set", "text_query=salient", "--compare")
    assert got["report"]["settings"]["text_query"] == "salient"
    assert got["full_answer"] == full_answer(QUESTION)


@pytest.mark.parametrize("method", ["duet", "visionzip", "pyramiddrop", "fastv"])
@pytest.mark.parametrize("budget", ["0.5", "100"])
def test_budget_predicts_what_run_measures(method: str, budget: str) -> None:
    ran = as_json("run", "-i", PICTURE, "-p", QUESTION, "-b", budget, "--method", method)["report"]
    text = round(ran["full"]["kv_bytes"] / (2 * 12 * 128 * 4)) - 256
    solved = as_json("budget", "-b", budget, "--method", method, "--text", text)
    assert solved["plan"]["counts"] == ran["measured"]
    assert solved["full"] == ran["full"]
    for name in ("vision_flops", "decoder_flops", "kv_bytes"):
        assert solved["planned"][name] == ran["observed"][name], name


def test_budget_reads_no_weights(tmp_path: Path) -> None:
    for file in tiny.path().glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shown = call("budget", "-m", tmp_path, "-b", "64").stdout
    assert "85 kept + 17 merged" in shown and "63.75" in shown


def test_budget_below_the_floor_names_it() -> None:
    result = call("budget", "-b", "3", "--method", "fastv", code=2)
    assert result.stderr.startswith("error: fastv cannot reach 3") and "21.33" in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1
    assert as_json("budget", "-b", "3", "--method", "fastv", code=2)["floor"] == pytest.approx(256 / 12)


def test_budget_needs_tokens_where_images_differ(tmp_path: Path) -> None:
    from families import FAMILIES

    qwen = next(f for f in FAMILIES.values() if f.mrope) if isinstance(FAMILIES, dict) else next(f for f in FAMILIES if f.mrope)
    qwen.make().config.save_pretrained(tmp_path)
    assert "--tokens" in call("budget", "-m", tmp_path, "-b", "0.5", code=2).stderr
    assert as_json("budget", "-m", tmp_path, "-b", "0.5", "--tokens", "40")["plan"]["tokens"] == 40


def test_methods_lists_all() -> None:
    assert {row["name"] for row in as_json("methods")} == set(duet_vlm.methods())
    shown = call("methods").stdout
    assert all(name in shown for name in duet_vlm.methods())
    duet = next(row for row in as_json("methods") if row["name"] == "duet")
    assert duet["needs_text"] and duet["stage"] == "before the decoder + inside the decoder" and "dominant" in duet["settings"]


def test_models_lists_families() -> None:
    rows = as_json("models")
    assert {"llava", "qwen2_5_vl"} <= {row["family"] for row in rows}
    assert {row["family"]: row["video"] for row in rows}.items() >= {("llava", False), ("qwen2_5_vl", True)}
    assert "llava-hf/llava-1.5-7b-hf" in call("models").stdout.replace("\n", "") or "llava" in call("models").stdout


def test_viz_writes_a_picture_per_image(tmp_path: Path) -> None:
    got = as_json("viz", "-i", PICTURE, "-i", PICTURE, "-p", QUESTION, "-b", "0.22", "-o", tmp_path / "deep" / "er")
    assert len(got["files"]) == 2
    for file in got["files"]:
        with Image.open(file) as sheet:
            assert sheet.width > 4 * 352 and len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 100


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_verb, "ROUNDS", 2)
    got = as_json("demo", "-o", tmp_path)
    assert len(got["questions"]) == 20 and [c["name"] for c in got["columns"]] == ["full", "33%", "22%", "11%"]
    assert all(len(c["answers"]) == 20 for c in got["columns"])
    assert got["columns"][0]["answers"][0] == full_answer(got["questions"][0]["question"])
    assert len(got["pictures"]) == 4 and all(Path(file).is_file() for file in got["pictures"])
    shown = call("demo", "-o", tmp_path).stdout
    assert "/20 agree with the full model" in shown and shown.count("FLOPs-bound speed-up") == 3


# ---- errors: one line, exit code 2


def broken(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that are no pictures, with a word of the message."""
    text, cut, huge, bomb = (folder / name for name in ("text.png", "cut.png", "huge.png", "bomb.png"))
    text.write_text("not a picture")
    cut.write_bytes(PICTURE.read_bytes()[:3000])
    Image.new("1", (20_000, MAX_PIXELS // 20_000 + 1)).save(huge)
    Image.new("1", (20_000, 20_000)).save(bomb)
    return {
        "missing": (folder / "none.png", "no such file"),
        "folder": (folder, "is a folder"),
        "text": (text, "not an image"),
        "cut": (cut, "damaged"),
        "huge": (huge, "64 million"),
        "bomb": (bomb, "64 million"),
    }


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "cut", "huge", "bomb"])
def test_bad_images(kind: str, tmp_path: Path) -> None:
    path, word = broken(tmp_path)[kind]
    result = call("run", "-i", path, "-p", "x", "-b", "0.2", code=2)
    assert result.stderr.startswith("error:") and str(path) in result.stderr and word in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""


@pytest.mark.parametrize("verb", ["run", "viz"])
def test_urls_are_named_and_not_opened(verb: str) -> None:
    """A path keeps one slash of two; the message has both."""
    for option in ("--image", "--video"):
        result = call(verb, option, "https://example.org/a.png", "-p", "x", "-b", "64", code=2)
        assert result.stderr.startswith(f"error: {option} https://example.org/a.png: a URL is not opened") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "dust", "-b", "64"], ["unknown method 'dust'", "duet"]),
        (["-b", "many"], ["--budget many", "64", "0.22"]),
        (["-b", "0"], ["budget=0", "at least 1"]),
        (["-b", "1.5"], ["budget=1.5", "fraction"]),
        (["--set", "dominant"], ["--set dominant", "key=value"]),
        (["-b", "64", "--set", "colour=3"], ["no setting 'colour'", "its settings"]),
        (["-b", "64", "--positions", "round"], ["positions='round'", "'keep'"]),
        (["-m", "./nowhere", "-b", "64"], ["./nowhere", "no such folder"]),
        (["-m", "nowhere", "-b", "64"], ["nowhere", "no such folder", "hub id"]),
        ([], ["needs a budget"]),
    ],
)
@pytest.mark.parametrize("verb", ["run", "budget", "viz"])
def test_bad_options(verb: str, arguments: list[str], words: list[str], tmp_path: Path) -> None:
    where = [] if verb == "budget" else ["-i", PICTURE, "-p", "x"]
    result = call(verb, *where, *arguments, code=2)
    assert result.stderr.startswith("error:") and "Traceback" not in result.output
    assert all(word in result.stderr for word in words), result.stderr
    assert result.stderr.count("\n") == 1


def test_bad_folders(tmp_path: Path) -> None:
    assert "no config.json" in call("budget", "-m", tmp_path, "-b", "64", code=2).stderr
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "(model_type='bert') is not supported" in call("budget", "-m", tmp_path, "-b", "64", code=2).stderr
    (tmp_path / "config.json").write_text("{")
    assert "cannot be loaded" in call("budget", "-m", tmp_path, "-b", "64", code=2).stderr


def test_hub_id_without_network_is_one_line() -> None:
    assert "network" in call("budget", "-m", "nobody/nothing-here", "-b", "64", code=2).stderr


def test_json_errors_are_json_and_debug_shows_the_cause() -> None:
    assert "no such file" in as_json("run", "-i", "none.png", "-p", "x", code=2)["error"]
    result = CliRunner().invoke(app, ["run", "-i", "none.png", "-p", "x", "--debug"])
    assert isinstance(result.exception, ValueError)


def test_usage_errors_and_version() -> None:
    assert call("run", "-p", "x", code=2)
    assert call("fly", code=2)
    assert call("--version").stdout.strip()


def test_values_of_options() -> None:
    assert [budget_of(text) for text in (None, "64", "0.22", "22%", "1.0")] == [None, 64, 0.22, 0.22, 1.0]
    assert [type(budget_of(text)) for text in ("1", "1.0")] == [int, float]
    assert settings_of(["a=1", "b = ((2, .5),)", "c=last", "d=None"]) == {"a": 1, "b": ((2, 0.5),), "c": "last", "d": None}
