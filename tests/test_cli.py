"""Every verb of the command line, on the embedded model: output, JSON, errors and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import duet_vlm
from duet_vlm.api import catalogue as lists
from duet_vlm.api.loading import chat_text, device_for
from duet_vlm.cli import demo as demo_verb
from duet_vlm.cli.main import app
from duet_vlm.cli.options import budget_of, settings_of, several, several_paths
from duet_vlm.evaluation import tiny
from duet_vlm.inputs.images import MAX_PIXELS
from duet_vlm.profiling.timing import Ratio
from duet_vlm.reducers import registry

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
    assert shown.count(" s to the first token, ") == 2 and shown.index("duet : ") < shown.index(
        "full : "
    ) < shown.index("FLOPs-bound")
    assert "duet | " in shown and "FLOPs-bound" in shown
    assert ("same answer" in shown) == (shown.split("duet | ")[1].split("\n")[0].strip() == expected)


def test_run_json() -> None:
    got = as_json("run", "-i", PICTURE, "-p", QUESTION, "-b", "64", "--compare")
    assert got["full_answer"] == full_answer(QUESTION)
    assert got["report"]["measured_mean"] == got["report"]["nominal_mean"] <= 64
    assert got["report"]["budget"] == 64
    for side in (got["timing"]["reduced"], got["timing"]["full"]):
        assert 0 < side["first_token"] <= side["seconds"] and side["tokens"] > 0
    assert as_json("run", "-i", PICTURE, "-p", QUESTION, "-b", "64")["timing"]["full"] is None


def test_run_with_settings_positions_two_images_and_a_local_folder() -> None:
    schedule = "schedule=((4, 0.5), (8, 0.25))"
    got = as_json(
        "run",
        "-m",
        tiny.path(),
        "-i",
        PICTURE,
        "-i",
        PICTURE,
        "-p",
        QUESTION,
        "--positions",
        "compact",
        "--set",
        schedule,
    )
    assert got["report"]["measured"] == [512] * 4 + [256] * 4 + [128] * 4
    assert got["report"]["settings"]["options"]["positions"] == "compact"


def test_run_salient_gets_the_processor() -> None:
    got = as_json("run", "-i", PICTURE, "-p", QUESTION, "-b", "0.3", "--set", "options.text_query=salient", "--compare")
    assert got["report"]["settings"]["options"]["text_query"] == "salient"
    assert got["full_answer"] == full_answer(QUESTION)


@pytest.mark.parametrize("method", ["duet", "visionzip", "pyramiddrop", "fastv"])
@pytest.mark.parametrize("budget", ["0.5", "100"])
def test_budget_predicts_what_run_measures(method: str, budget: str) -> None:
    ran = as_json("run", "-i", PICTURE, "-p", QUESTION, "-b", budget, "--method", method)["report"]
    text = round(ran["full"]["kv_bytes"] / (2 * 12 * 128 * 4)) - 256
    solved = as_json("budget", "-b", budget, "--method", method, "--prompt-tokens", text)
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
    assert (
        result.stderr.startswith("error: fastv cannot reach 3")
        and "21.33" in result.stderr
        and "Traceback" not in result.stderr
    )
    assert result.stderr.count("\n") == 1
    assert as_json("budget", "-b", "3", "--method", "fastv", code=2)["floor"] == pytest.approx(256 / 12)


def test_budget_needs_tokens_where_images_differ(tmp_path: Path) -> None:
    from families import FAMILIES

    qwen = (
        next(f for f in FAMILIES.values() if f.mrope)
        if isinstance(FAMILIES, dict)
        else next(f for f in FAMILIES if f.mrope)
    )
    qwen.make().config.save_pretrained(tmp_path)
    assert "--tokens" in call("budget", "-m", tmp_path, "-b", "0.5", code=2).stderr
    assert as_json("budget", "-m", tmp_path, "-b", "0.5", "--tokens", "40")["plan"]["tokens"] == 40


def test_methods_lists_all() -> None:
    assert {row["name"] for row in as_json("methods")} == set(duet_vlm.list_methods())
    shown = call("methods").stdout
    assert all(name in shown for name in duet_vlm.list_methods())
    duet = next(row for row in as_json("methods") if row["name"] == "duet")
    one = call("methods", "cdpruner").stdout.replace("\n", " ")
    for word in (
        "determinantal point process",
        "Cost:",
        "needs: question",
        "relevance",
        "official not on",
        "idefics3",
        "shares a space",
    ):
        assert word in " ".join(one.split()), word
    rows = {row["name"]: row for row in as_json("methods")}
    assert (
        rows["cdpruner"]["needs_text"]
        and not rows["hired"]["needs_text"]
        and rows["hired"]["needs"] == ["grid", "importance"]
    )
    assert any(
        "no CLS row" in case["why"] and "paligemma" in case["families"]
        for case in rows["visionzip"]["families_without"]
    )
    assert not rows["duet"]["families_without"] or all(case["preset"] for case in rows["duet"]["families_without"])
    assert (
        duet["needs_text"]
        and duet["stage"] == "before the decoder + inside the decoder"
        and "dominant" in duet["settings"]
    )


def test_presets_are_listed_and_chosen_by_name() -> None:
    from duet_vlm.api.presets import PRESETS

    rows = {row["name"]: row for row in as_json("presets")}
    assert set(rows) == set(PRESETS)
    assert rows["duet-128"] | {"settings": {}, "source": ""} == {
        "name": "duet-128", "method": "duet", "model": "LLaVA-1.5-7B", "tokens": 576, "depth": 32, "mean": 128.0, "published": True, "settings": {},
        "source": "",
    }  # fmt: skip
    assert (rows["duet-128"]["settings"]["dominant"], rows["duet-128"]["settings"]["schedule"]) == (
        170,
        [[16, 0.5], [24, 0.0]],
    )
    shown = call("presets", "duet-128").stdout
    assert "duet-128" in shown and "dominant=170" in shown and "duet-192" not in shown
    assert [row["family"] for row in as_json("models", "llava", "qwen2_vl")] == ["llava", "qwen2_vl"]
    assert "text_query" in call("methods", "fastv").stdout and "visionzip" not in call("methods", "fastv").stdout


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


def test_a_drawing_names_the_tokens_of_its_own_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of one prompt compete inside the decoder, so one keeps more of its tokens than the other."""
    from duet_vlm.cli import viz

    titles: list[str] = []
    drawn = viz.overlay
    monkeypatch.setattr(viz, "overlay", lambda *given: [titles.append(given[5]), drawn(*given)][1])
    other = tmp_path / "grey.png"
    Image.new("RGB", (64, 64), "grey").save(other)
    got = as_json("viz", "-i", PICTURE, "-i", other, "-p", QUESTION, "-b", "0.22", "-o", tmp_path)
    counts = [float(title.split(": ")[1].split()[0]) for title in titles]
    assert counts[0] > counts[1] and sum(counts) == pytest.approx(got["mean_tokens"], abs=0.2)


@pytest.mark.slow
def test_warnings_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "moves.gif"
    Image.new("RGB", (64, 64)).save(path, save_all=True, append_images=[Image.new("RGB", (64, 64), "white")])
    command = [sys.executable, "-m", "duet_vlm", "run", "-i", str(path), "-p", "x", "-b", "64"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert said == f"warning: {path}: shows 2 pictures one after the other, the first is taken\n"


@pytest.mark.slow
def test_pictures_of_other_reductions_are_other_files(tmp_path: Path) -> None:
    options = (
        ["-b", "0.22"],
        ["-b", "0.5"],
        ["-b", "64"],
        ["-b", "64", "--method", "visionzip"],
        ["--preset", "visionzip-64"],
        ["-b", "1.0"],
    )
    options += (["--set", "dominant=64"], ["--set", "dominant=32"], ["--set", "schedule=((3, .5), (6, .25))"])
    files = [as_json("viz", "-i", PICTURE, "-p", QUESTION, *each, "-o", tmp_path)["files"] for each in options]
    assert {Path(name).name for each in files for name in each} == {file.name for file in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == len(options)
    assert (tmp_path / "1-scene_1-duet-0.22.png").is_file() and (tmp_path / "1-scene_1-visionzip-64.png").is_file()


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_verb, "ROUNDS", 2)
    got = as_json("demo", "-o", tmp_path)
    assert len(got["questions"]) == 20 and [c["name"] for c in got["columns"]] == ["full", "33%", "22%", "11%"]
    assert all(len(c["answers"]) == 20 for c in got["columns"])
    assert got["columns"][0]["answers"][0] == full_answer(got["questions"][0]["question"])
    assert len(got["pictures"]) == 5 and all(Path(file).is_file() for file in got["pictures"])
    assert got["pictures"][0] == str(tmp_path / "demo.png")
    shown = call("demo", "-o", tmp_path).stdout
    assert f"look at first: {tmp_path / 'demo.png'}" in shown and shown.count("question  ") == 1  # one table
    (same,) = [line.split() for line in shown.splitlines() if line.startswith("as the full model says")]
    assert same[-4:] == [str(column["agree_with_full"]) for column in got["columns"]]
    (times,) = [
        [float(cell) for cell in line.split()[-4:]]
        for line in shown.splitlines()
        if line.startswith("ms to the first token")
    ]
    (ratios,) = [
        [float(cell.rstrip("x")) for cell in line.split()[-4:]]
        for line in shown.splitlines()
        if line.startswith("speed-up")
    ]
    assert ratios == pytest.approx([times[0] / taken for taken in times], abs=0.02)


def test_demo_prints_the_ratio_of_the_times_that_it_prints() -> None:
    # the median of paired ratios
    full, small = demo_verb.DemoColumn("full", None), demo_verb.DemoColumn("33%", 0.33, speed_up=Ratio(1.39, 1.3, 1.5))
    facts = dict(demo_verb._facts([], full, {"full": 0.0663, "33%": 0.0440}))
    assert [facts["ms to the first token"](each) for each in (full, small)] == ["66.3", "44.0"]
    assert [facts["speed-up"](each) for each in (full, small)] == ["1", "1.51x"]


def test_viz_compares_methods_and_budgets(tmp_path: Path) -> None:
    got = as_json(
        "viz",
        "-i",
        PICTURE,
        "-p",
        QUESTION,
        "-b",
        "0.22",
        "--compare",
        "duet,fastv,0.33",
        "--compare",
        "visionzip@0.11",
        "-o",
        tmp_path,
    )
    names = ["duet-0.22", "fastv-0.22", "duet-0.33", "visionzip-0.11"]
    assert [row["name"] for row in got["compared"]] == names
    assert [round(row["mean_tokens"] / 256, 2) for row in got["compared"]] == [0.22, 0.22, 0.33, 0.11]
    assert got["full_answer"] == full_answer(QUESTION) and got["answer"] == got["compared"][0]["answer"]
    (file,) = got["files"]
    one = as_json("viz", "-i", PICTURE, "-p", QUESTION, "-b", "0.22", "-o", tmp_path / "one")["files"][0]
    assert Path(file).name == f"1-scene_1-{'-vs-'.join(names)}.png"
    assert Image.open(file).height > 3 * Image.open(one).height


@pytest.mark.parametrize(
    "words, said",
    [
        (("-b", "0.22", "--compare", "fastvv"), "did you mean 'fastv'"),
        (("-b", "0.22", "--compare", "fastv@x"), "give a token count"),
        (("--preset", "duet-64", "--compare", "0.11"), "brings its own budget"),
    ],
)
def test_what_cannot_be_compared(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    got = call("viz", "-i", PICTURE, "-p", QUESTION, *words, "-o", tmp_path, code=2)
    assert said in got.stderr


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
        assert (
            result.stderr.startswith(f"error: {option} https://example.org/a.png: a URL is not opened")
            and result.stderr.count("\n") == 1
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "dust", "-b", "64"], ["unknown method 'dust'", "duet"]),
        (["-b", "many"], ["--budget many", "64", "0.22"]),
        (["-b", "0"], ["--budget 0", "at least 1"]),
        (["-b", "1.5"], ["--budget 1.5", "fraction"]),
        (["--set", "dominant"], ["--set dominant", "key=value"]),
        (["-b", "64", "--set", "colour=3"], ["no setting 'colour'", "its settings"]),
        (["-b", "64", "--set", "cluster_wdth=3"], ["no setting 'cluster_wdth' (did you mean 'cluster_width'?)"]),
        (
            ["--method", "frames+deut", "-b", "64"],
            ["unknown method 'deut' (did you mean 'duet'", "'duet-vlm methods' lists"],
        ),
        (["--preset", "duet-65"], ["unknown preset 'duet-65' (did you mean 'duet-64'?)", "fastv-306"]),
        (["-m", "tinny", "-b", "64"], ["tinny", "did you mean 'tiny'?"]),
        (["-m", "tiny-vidoe", "-b", "64"], ["did you mean 'tiny-video'?"]),
        (["-b", "64", "--method", "duet,fastv"], ["--method duet,fastv: give one"]),
        (["-b", "nan"], ["--budget nan"]),
        (["-b", "64", "--positions", "round"], ["positions='round'", "'keep'"]),
        (["-m", "./nowhere", "-b", "64"], ["./nowhere", "no such folder"]),
        (["-m", "nowhere", "-b", "64"], ["nowhere", "no such folder", "hub id"]),
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
    assert "Did you mean 'run'?" in call("rum", code=2).stderr
    assert "--budget" in call("run", "--bugdet", "3", code=2).stderr
    assert call("--version").stdout.strip()


@pytest.mark.parametrize("verb", ["run", "viz"])
def test_one_answer_takes_one_budget(verb: str) -> None:
    for budgets in (["-b", "0.2", "-b", "0.3"], ["-b", "0.2,0.3"]):
        said = call(verb, "-i", PICTURE, "-p", "x", *budgets, code=2).stderr
        assert said == "error: --budget 0.2,0.3: give one; 'duet-vlm eval' and 'duet-vlm bench' compare several\n"


def test_several_values_have_one_convention(tmp_path: Path) -> None:
    assert several([".33,.11", "22%"]) == several([".33", ".11", "22%"]) == [".33", ".11", "22%"]
    by_hand = "duet[schedule=((6, .5), (9, 0));merge=mean]"
    assert several([f"{by_hand},fastv", "random"]) == [by_hand, "fastv", "random"]
    assert several(None) == [] and several([" a , b ,"]) == ["a", "b"]
    (tmp_path / "a,b.png").touch()
    assert several_paths([tmp_path / "a,b.png", Path("c,d.png")]) == [tmp_path / "a,b.png", Path("c"), Path("d.png")]


def test_budgets_one_after_the_other() -> None:
    plans = [as_json("budget", "-b", budget) for budget in ("64", "0.1")]
    assert as_json("budget", "-b", "64", "-b", "0.1") == as_json("budget", "-b", "64,0.1") == plans
    shown = call("budget", "-b", "64,0.1").stdout
    assert shown.index("budget 64") < shown.index("budget 0.1")


def test_several_pictures() -> None:
    both = (["-i", f"{PICTURE},{PICTURE}"], ["-i", PICTURE, "-i", PICTURE])
    reports = [as_json("run", *images, "-p", QUESTION, "-b", "64")["report"] for images in both]
    assert reports[0] == reports[1] and reports[0]["measured"][0] > 102  # of one image enter 102


def test_a_prompt_is_text_and_its_length_a_number() -> None:
    long, short = (as_json("budget", "-b", "64", "--prompt-tokens", count) for count in (60, 30))
    assert (long["text_tokens"], short["text_tokens"]) == (60, 30)
    # keys and values of 12 layers, float32
    assert long["full"]["kv_bytes"] - short["full"]["kv_bytes"] == 30 * 2 * 12 * 128 * 4
    assert "--prompt-tokens" in call("budget", "-b", "64", "--prompt", "60", code=2).stderr


def test_one_token_is_asked_about() -> None:
    for text, warned in (("1", True), ("1.0", False), ("100%", False), ("2", False)):
        assert ("Did you mean 1.0?" in call("budget", "-b", text).stderr) == warned
    assert as_json("budget", "-b", "1")["budget"] == 1  # taken as it stands


def test_frames_belong_to_clips() -> None:
    assert "give --video" in call("run", "-i", PICTURE, "-p", "x", "-b", "64", "--frames", "4", code=2).stderr


def test_a_prompt_with_a_placeholder() -> None:
    assert "--prompt holds '<image>'" in call("run", "-i", PICTURE, "-p", "<image> what?", "-b", "64", code=2).stderr


# ---- devices


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without one")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps", "xpu", "meta", "tpu", ""])
def test_a_device_that_is_not_here_is_named(device: str, tmp_path: Path) -> None:
    asked, out = ["-i", PICTURE, "-p", "x", "-b", "64"], ["--out", tmp_path / "new"]
    for verb in (["run", *asked], ["viz", *asked, *out], ["bench"], ["eval", *out]):
        result = call(*verb, "--device", device, code=2)
        assert result.stderr.startswith(f"error: --device {device}: not on this machine") and result.stderr.endswith(
            "there is cpu\n"
        )


def test_devices_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert [device_for(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    for name in ("cuda:2", "mps"):
        with pytest.raises(ValueError, match=f"--device {name}: not on this machine.*; there is cpu, cuda:0, cuda:1"):
            device_for(name)


# ---- folders


@pytest.mark.parametrize(
    "verb", [["viz", "-i", PICTURE, "-p", "x", "-b", "64", "-o"], ["demo", "-o"], ["eval", "-o"], ["bench", "--plots"]]
)
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    verb: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("duet_vlm.api.loading.load", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "file").touch()
    result = call(*verb, tmp_path / "file" / "deep", code=2)
    option = "--plots" if verb[-1] == "--plots" else "--out"
    assert result.stderr.startswith(f"error: {option} {tmp_path}/file/deep: cannot be written to (")
    assert result.stderr.count("\n") == 1


def test_a_model_with_damaged_weights_is_one_line(tmp_path: Path) -> None:
    for file in tiny.path().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 2_000_000 if file.suffix == ".safetensors" else None])
    result = call("run", "-m", tmp_path, "-i", PICTURE, "-p", "x", "-b", "64", code=2)
    assert (
        result.stderr.startswith(f"error: --model {tmp_path}: cannot be loaded from this folder: ")
        and result.stderr.count("\n") == 1
    )


def test_what_nobody_foresaw_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duet_vlm.cli.methods.chosen", lambda *_, **__: {}["gone"])
    assert call("methods", code=2).stderr == "error: unexpected KeyError: 'gone' (--debug shows where)\n"
    assert isinstance(CliRunner().invoke(app, ["methods", "--debug"]).exception, KeyError)


# ---- from a shell


def shell(code: str, **more: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | more)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


VERBS = ("run", "eval", "drop-curve", "report", "train", "budget", "bench", "viz", "demo")
QUICK = [[], ["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)]
QUICK += [[verb, *more] for verb in ("methods", "presets", "models") for more in ([], ["--help"], ["nosuch"])]
QUICK += [
    ["run", "-i", str(PICTURE), "-p", "x", *more]
    for more in (["--method", "deut"], ["--preset", "deut"], ["-b", "many"], ["-b", "2.0"])
]
QUICK += [
    ["run", "-i", "gone.png", "-p", "x"],
    ["report", "gone.json"],
    ["report", "gone.json", "--json"],
    ["report", str(PICTURE)],
]
QUICK += [[verb, "--method", "deut"] for verb in ("bench", "eval", "drop-curve", "train", "budget")]
WRONG = {"deut", "many", "2.0", "gone.png", "gone.json", str(PICTURE), "nosuch"}


def test_help_and_lists_load_no_torch() -> None:
    """Seconds of waiting for a page of text; what is wrong is said as soon as it can be known."""
    code = f"""
import sys
from typer.testing import CliRunner
from duet_vlm.api import catalogue as lists
from duet_vlm.cli.main import app
lists.entry_points = lambda group: ()  # where another package has methods, it has to be asked for them
for words in {QUICK}:
    result = CliRunner().invoke(app, words)
    print(result.exit_code, len(result.output) > 5, *(name for name in ("torch", "transformers", "gradio") if name in sys.modules))
"""
    said = shell(code).splitlines()
    assert len(said) == len(QUICK) and set(said) <= {"0 True", "2 True"}
    wrong = [words for words, line in zip(QUICK, said, strict=True) if (line[0] == "2") != bool(WRONG & set(words))]
    assert wrong == [[]]  # no verb at all is answered by the help, as an error


def test_lists_are_what_the_package_says_of_itself() -> None:
    assert lists.FILE.read_text() == lists.content(), "write them anew: make tables"
    assert lists.ENTRY_POINTS == registry.ENTRY_POINT_GROUP


def test_methods_of_other_packages_are_listed(tmp_path: Path) -> None:
    """An installed package with an entry point, and a file that somebody has added to the source, are in no list that
    was kept."""
    (tmp_path / "elsewhere.py").write_text(
        "import duet_vlm\nfrom dataclasses import dataclass\n"
        "@dataclass(frozen=True)\nclass Mine(duet_vlm.Reducer):\n    paper, summary = 'nowhere', 'keeps what it likes'\n"
        "    def plan(self, tokens, depth, budget): ...\n"
    )
    (tmp_path / "elsewhere-1.0.dist-info").mkdir()
    (tmp_path / "elsewhere-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n"
    )
    (tmp_path / "elsewhere-1.0.dist-info" / "entry_points.txt").write_text(
        "[duet_vlm.methods]\nmine = elsewhere:Mine\n"
    )
    code = "from duet_vlm.api import catalogue as lists; print({row['name']: row['summary'] for row in lists.chosen('methods', 'name', ['mine'])}.get('mine'))"
    path = os.pathsep.join([str(tmp_path), str(Path(duet_vlm.__file__).parents[1])])
    assert shell(code, PYTHONPATH=path) == "keeps what it likes"
    added = "lists._count_files = lambda name: 1000; lists.MADE['methods'] = lambda: [{'name': 'asked anew'}]; print(lists.rows('methods'))"
    assert shell(f"from duet_vlm.api import catalogue as lists; {added}") == "[{'name': 'asked anew'}]"


@pytest.mark.parametrize("words", [["methods"], ["models", "--json"], ["budget", "-b", "64"]])
def test_a_closed_pipe_is_no_error(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "duet_vlm.cli.main", *words], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_ctrl_c_ends_all_processes_quietly(tmp_path: Path) -> None:
    """As a terminal sends it: to the command and to its workers, which are still starting or at work."""
    command = [
        sys.executable,
        "-m",
        "duet_vlm.cli.main",
        "eval",
        "--methods",
        "uniform",
        "-b",
        "0.11",
        "--limit",
        "4000",
        "--batch",
        "4",
    ]
    command += ["--timing-rounds", "0", "--workers", "2", "--device", "cpu", "--out", str(tmp_path)]
    journal, pipes = (
        tmp_path / "tiny/results/eval.parts/0.jsonl",
        {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )
    with subprocess.Popen(command, **pipes, start_new_session=True, preexec_fn=hears_interrupts) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not journal.exists():
            time.sleep(0.05)
        time.sleep(0.5)  # the workers import
        os.killpg(process.pid, signal.SIGINT)
        try:
            out, said = process.communicate(timeout=180)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and "Traceback" not in out + said
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and group(process.pid):
        time.sleep(0.1)
    assert not group(process.pid)


def hears_interrupts() -> None:
    """Also where these tests run in the background of a shell, which has all of them ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def group(leader: int) -> list[str]:
    """The processes of a group, but for those that merely wait to be collected by somebody."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group, *_ = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found += [file.parent.name] if state != "Z" and int(its_group) == leader else []
    return found


def test_values_of_options() -> None:
    assert [budget_of(text) for text in (None, "64", "0.22", "22%", "1.0")] == [None, 64, 0.22, 0.22, 1.0]
    assert [type(budget_of(text)) for text in ("1", "1.0")] == [int, float]
    assert settings_of(["a=1", "b = ((2, .5),)", "c=last", "d=None"]) == {
        "a": 1,
        "b": ((2, 0.5),),
        "c": "last",
        "d": None,
    }
