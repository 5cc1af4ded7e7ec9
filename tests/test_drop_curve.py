"""The drop curve: hand-worked curves, the runs behind it against plain attach, questions nobody has labelled, and the
verb."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import as_json, call

import duet_vlm
from duet_vlm.evaluation import tiny
from duet_vlm.evaluation.drop_curve import (
    FULL,
    LABEL,
    CurvePoint,
    DropCurve,
    contest,
    curve_of,
    drops,
    layers_of,
    proposals,
    sleeps,
    slept,
    winners,
)
from duet_vlm.evaluation.experiment import Experiment
from duet_vlm.evaluation.results import unpack
from duet_vlm.evaluation.run import run_experiment

DEPTH = 12


def curve(losses: dict[int, float], full: float = 0.9, depth: int = DEPTH) -> DropCurve:
    points = (
        CurvePoint(layer, full - lost, -lost, (-lost, -lost), {"all": full - lost}) for layer, lost in losses.items()
    )
    return DropCurve(depth, full, {"all": full}, tuple(points))


def test_where_tokens_stop_mattering() -> None:
    assert curve({1: 0.5, 3: 0.2, 5: 0.005, 8: -0.02}).needed_until() == 5
    assert curve({1: 0.5, 3: 0.005, 5: 0.2, 8: 0.0}).needed_until() == 8  # a dip at 5 is no end
    assert curve({1: 0.5, 3: 0.2, 11: 0.1}).needed_until() == DEPTH
    assert curve({1: 0.5, 3: 0.2, 11: 0.1}).needed_until(0.1 + 1e-9) == 11
    assert curve({1: 0.0, 5: 0.0}).needed_until() == 1


def test_what_is_still_to_be_read() -> None:
    needs = curve({1: 0.4, 3: 0.2, 5: 0.0}).needs()
    assert needs == pytest.approx([1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0, 0, 0])
    # noise: the nearest sequence that never rises has .2 at both
    rising = curve({1: 0.4, 3: 0.1, 5: 0.3, 7: 0.0}).needs()
    assert rising[3] == rising[5] == pytest.approx(0.5) and all(
        a >= b for a, b in zip(rising, rising[1:], strict=False)
    )
    assert curve({1: -0.01, 5: 0.0}).needs() == [1.0, *([0.0] * 11)]  # nothing is lost at all


def test_schedules_follow_the_curve() -> None:
    found = proposals(curve({1: 0.4, 3: 0.2, 5: 0.0}))
    assert found == {"cut": ((5, 0.0),), "as needed": ((3, 0.6), (4, 0.3), (5, 0.0)), "slower": ((4, 0.6), (5, 0.0))}
    late = proposals(curve(dict.fromkeys(range(1, 12), 0.3)))  # needed to the very end
    assert late == {"cut": (), "as needed": (), "slower": ()}
    assert proposals(curve({1: 0.0, 5: 0.0}))["cut"] == ((1, 0.0),)


@pytest.mark.parametrize(
    "losses", [{1: 0.4, 3: 0.2, 5: 0.0}, dict.fromkeys(range(1, 12), 0.3), {1: 0.0, 5: 0.0}, {1: 0.4, 11: 0.01}]
)
def test_the_contest_runs_and_names_no_schedule_twice(losses: dict[int, float]) -> None:
    cells = contest(curve(losses), "duet_plus", [0.11, 28])
    schedules = [json.dumps(cell["settings"]["schedule"]) for cell in cells]
    assert len(set(schedules)) == len(schedules) and [cell["label"] for cell in cells][:2] == ["paper", "deep"]
    for cell in cells:
        for budget in cell["budgets"]:
            schedule = tuple(map(tuple, cell["settings"]["schedule"]))
            plan = duet_vlm.get_method("duet_plus")(schedule=schedule).plan(256, DEPTH, budget)
            assert 0.8 * 28 < plan.mean <= 28.16


def test_layers_of_a_deep_decoder_are_spread() -> None:
    assert layers_of(12) == tuple(range(1, 12)) and layers_of(2) == (1,)
    spread = layers_of(80)
    assert (spread[0], spread[-1], len(spread)) == (1, 79, 12) and set(np.diff(spread)) <= {7, 8}
    assert layers_of(80, [40, 3, 40]) == (3, 40)
    for wrong in (0, 80):
        with pytest.raises(ValueError, match=f"--layers {wrong}: the decoder has 80 layers: give numbers from 1 to 79"):
            layers_of(80, [3, wrong])


def test_ties_go_to_the_fixed_schedule() -> None:
    def row(label: str, accuracy: float, budget: float = 0.1) -> dict[str, Any]:
        return {"label": label, "accuracy": accuracy, "budget": budget, "status": "ok"}

    runs = [
        row("full model", 1.0),
        row("paper", 0.8),
        row("deep", 0.8),
        row("cut", 0.8),
        row("slower", 0.7),
        row("cut", 0.9, 0.2),
    ]
    assert {budget: best["label"] for budget, best in winners({"runs": runs}).items()} == {0.1: "paper", 0.2: "cut"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    job = Experiment("tiny", drops((2, 6)), limit=30, batch=15, against=FULL)
    return run_experiment(job, "curve", tmp_path_factory.mktemp("curve") / "j", device="cpu", timing_rounds=0)


def test_points_are_what_attach_gives(measured: dict[str, Any]) -> None:
    model, processor = tiny.load()
    found = curve_of(measured)
    assert found is not None and found.depth == DEPTH and [point.layer for point in found.points] == [2, 6]
    items = tiny.samples("test", 30)

    def accuracy() -> float:
        hits = 0
        for item in items:
            inputs = processor(images=item.image, text=tiny.prompt(item.question), return_tensors="pt")
            with torch.no_grad():
                out = model.generate(**inputs, max_new_tokens=4)
            hits += (
                processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
                == item.answer
            )
        return hits / len(items)

    assert found.full == accuracy()
    for point in found.points:
        with duet_vlm.attach(model, "duet", schedule=((point.layer, 0.0),)):
            assert point.accuracy == accuracy()
        assert (
            point.difference == pytest.approx(point.accuracy - found.full)
            and point.interval[0] <= point.difference <= point.interval[1]
        )
    # at layer 2 little has been read: a curve that cannot fall shows nothing
    assert found.points[0].accuracy < found.full - 0.2


def test_results_without_a_curve_have_none(measured: dict[str, Any]) -> None:
    others = [row for row in measured["runs"] if not row["label"].startswith(LABEL)]
    assert curve_of(measured | {"runs": others}) is None
    # labels that somebody else chose
    named = [row | {"settings": row["settings"] | {"schedule": None}} for row in measured["runs"]]
    assert curve_of(measured | {"runs": named}) is None
    assert curve_of(measured | {"model": {"name": "an older file"}}) is None


def test_the_band_ends_at_all_answers_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interval of differences, put on the full model's accuracy, may reach beyond 100 %."""
    from duet_vlm.evaluation.report import plots

    found = curve({3: 0.0}, full=0.98)
    found = dataclasses.replace(
        found, points=tuple(dataclasses.replace(point, interval=(-0.1, 0.1)) for point in found.points)
    )
    monkeypatch.setattr(plots, "curve_of", lambda result: found)
    figure = plots.without_tokens({})
    assert figure is not None
    (band,) = figure.axes[0].collections
    assert band.get_paths()[0].vertices[:, 1].max() == 100


def unlabelled(folder: Path, labels: dict[int, str]) -> Path:
    """Six questions, of which ``labels`` have an answer."""
    lines = []
    for i in range(6):
        item = tiny.sample("test", i)
        item.image.save(folder / f"{i}.png")
        lines.append({"image": f"{i}.png", "question": item.question} | ({"answer": labels[i]} if i in labels else {}))
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "mine.jsonl"


def test_questions_nobody_labelled_are_judged_by_the_full_model(tmp_path: Path) -> None:
    """Agreement, counted by hand; a label stands where there is one."""
    file = unlabelled(tmp_path, {0: "never said"})
    experiment = Experiment(str(file), ({"method": "duet", "settings": {"schedule": [[1, 0.0]]}},))
    found = run_experiment(experiment, "own", tmp_path / "j", device="cpu", timing_rounds=0)
    said = list(unpack(found)["answers"].values())
    agree = sum(a == b for a, b in list(zip(*said, strict=True))[1:])
    assert found["questions"]["unlabelled"] == 5
    assert found["runs"][0]["accuracy"] == pytest.approx(5 / 6) and found["runs"][1]["accuracy"] == pytest.approx(
        agree / 6
    )
    assert agree < 5


def test_tokens_that_sleep_answer_as_a_loop_over_the_layers_says(tmp_path: Path) -> None:
    """The runs of a gap against the model's own layers, the visual rows put aside by hand in those of the gap."""
    (cell,) = sleeps([2], DEPTH, 2)
    assert [one["label"] for one in sleeps([1, 9, 10], DEPTH, 2)] == [
        "asleep in layers 1 to 2",
        "asleep in layers 9 to 10",
    ]
    found = run_experiment(
        Experiment("tiny", (cell,), limit=12, against=FULL), "own", tmp_path / "j", device="cpu", timing_rounds=0
    )
    (point,) = slept(found)
    assert (point.layer, point.accuracy) == (2, found["runs"][1]["accuracy"])
    said = next(answers for label, answers in unpack(found)["answers"].items() if label != "none")
    model, processor = tiny.load()
    decoder, image = model.model.language_model, model.config.image_token_id
    for index, answer in enumerate(said):
        item = tiny.sample("test", index)
        inputs = processor(images=item.image, text=tiny.prompt(item.question), return_tensors="pt")
        words: list[int] = []
        while not words or (words[-1] != processor.tokenizer.eos_token_id and len(words) < 6):
            ids = torch.cat([inputs["input_ids"], torch.tensor([words], dtype=torch.long)], 1)
            with torch.no_grad():
                hidden = decoder.embed_tokens(ids)
                features = model.get_image_features(inputs["pixel_values"]).pooler_output
                hidden[ids == image] = torch.cat(list(features))
                rotary = decoder.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
                text = (ids[0] != image).nonzero().flatten()
                for number, layer in enumerate(decoder.layers):
                    rows = text if number in (2, 3) else torch.arange(ids.shape[1])
                    seen = torch.full((len(rows), len(rows)), -torch.inf).triu(1)[None, None]
                    tables = tuple(table[:, rows] for table in rotary)
                    hidden[:, rows] = layer(hidden[:, rows], attention_mask=seen, position_embeddings=tables)
                words.append(int(model.lm_head(decoder.norm(hidden)[:, -1]).argmax()))
        assert processor.decode(words, skip_special_tokens=True).strip() == answer.strip()


@pytest.mark.slow
def test_the_verb(tmp_path: Path) -> None:
    """Both parts, a picture, and a second call that measures nothing again."""
    options = [
        "drop-curve",
        "--task",
        unlabelled(tmp_path, {}),
        "--model",
        "tiny",
        "--layers",
        "1,6",
        "--asleep",
        "6",
        "-b",
        "0.2",
        "--out",
        tmp_path,
        "--workers",
        1,
    ]
    found = as_json(*options)
    assert (
        Path(found["picture"]).read_bytes().startswith(b"\x89PNG")
        and found["curve"]["full"] == 1
        and found["curve"]["depth"] == DEPTH
    )
    assert [point["layer"] for point in found["curve"]["points"]] == [1, 6]
    assert [(point["layer"], point["layers"]) for point in found["asleep"]] == [(1, 6)]  # from 6 on none comes back
    best = found["best"]["0.2"]
    assert best["accuracy"] == max(run["accuracy"] for run in found["contest"]["runs"][1:])
    shown = call(*options).stdout
    assert (
        shown.count("is finished already") == 2
        and "Visual tokens" in shown
        and "asleep in layers 1 to 6: " in shown
        and "attach(model, 'duet_plus', budget=0.2, schedule=" in shown
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--layers", "12"], "--layers 12: the decoder has 12 layers: give numbers from 1 to 11"),
        (["--layers", "x"], "--layers x: give whole numbers"),
        (["--asleep", "11"], "--asleep 11: of 12 layers, give 1 to 10 from layer 1 on"),
        (["--asleep", "6", "--layers", "6"], "--asleep 6: of 12 layers, give 1 to 5 from layer 6 on"),
        (["--asleep", "0"], "--asleep 0: "),
        (["--method", "deut"], "duet"),
        (["--name", "a/b"], "--name a/b: give a plain word"),
        (["--task", "tiny-clip"], "unknown task 'tiny-clip'"),
        (["--budget", "2.5"], "budget"),
        (["--budget", "0.1", "--method", "visionzip"], "--method visionzip: takes no schedule beside a budget"),
        (["--budget", "0.1", "--method", "fastv"], "--method fastv: takes no schedule beside a budget"),
    ],
)
def test_the_verb_refuses(options: list[str], says: str, tmp_path: Path) -> None:
    assert says in call("drop-curve", "--limit", 5, "--out", tmp_path, *options, code=2).output
