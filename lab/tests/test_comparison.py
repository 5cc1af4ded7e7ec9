"""The committed comparisons are what this code gives: questions asked again, every budget solved again, and who
measured them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from duet_vlm import BudgetError
from duet_vlm.api.loading import LoadedModel
from duet_vlm.api.loading import load as load_model
from duet_vlm.evaluation.experiment import BASELINE, ExperimentCell, from_json
from duet_vlm.evaluation.results import cpu_name, load, unpack
from duet_vlm.evaluation.run_sample import answer, attached
from duet_vlm.evaluation.source import unclean
from duet_vlm.evaluation.tasks import TaskQuestion, task
from duet_vlm_lab.generators.long_clips import LENGTHS, ROWS

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("lab/comparison/*/results/*.json"))
COUNT = 40
ASKED = (  # two of these per comparison, in this order: one of each kind where there is one, and cheap
    "scope+duet_plus@0.05",
    "pyramiddrop@0.11",
    "duet_plus@0.05",
    "frames+duet_plus@0.07",
    "divprune+duet_plus@0.07",
    "fastv[options.text_query=all]@0.47",
    "frames+duet@0.07",
    "visionzip@0.07",
    "random@0.07",
    "duet@0.05",
    "visionzip@0.05",
    "duet[cluster_width=1]@0.05",
    "random[seed=1]@0.05",
    "duet[schedule=((2, 0.0),)]",
    "duet[schedule=((3, 0.0),)]",
)

every = pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")


@functools.cache
def model_of(name: str) -> LoadedModel:
    return load_model(str(ROOT / name) if (ROOT / name).is_dir() else name, "cpu")


@functools.cache
def first_questions(name: str, seed: int) -> list[TaskQuestion]:
    return [task(name).ask(seed, index) for index in range(COUNT)]


def runs_of(result: dict[str, Any]) -> dict[str, ExperimentCell]:
    return {run.id: run for run in from_json(result["experiment"], result["name"]).runs()}


def asked_again(result: dict[str, Any]) -> dict[str, int]:
    """Per run how many of the first questions are answered differently from the record."""
    experiment, recorded = from_json(result["experiment"], result["name"]), unpack(result)
    # padded with the neighbours that they had
    assert (experiment.batch, task(experiment.task).count(experiment.limit)) >= (COUNT, COUNT)
    questions = first_questions(experiment.task, experiment.seeds[0])
    assert [q.id for q in questions] == recorded["questions"][:COUNT]
    assert [list(q.answers) for q in questions] == recorded["gold"][:COUNT]
    runs = runs_of(result)
    chosen = [
        run for key in dict.fromkeys((*ASKED, *reversed(runs))) if (run := runs.get(key)) and key in recorded["answers"]
    ][:2]
    assert len(chosen) == 2
    found = answer(model_of(experiment.model), chosen, questions, task(experiment.task).max_new_tokens)
    return {
        key: sum(a != b for a, b in zip(one.answers, recorded["answers"][key], strict=False))
        for key, one in found.items()
    }


def allowed(result: dict[str, Any]) -> int:
    """None on the same processor and libraries; elsewhere sums are rounded differently, and an answer in forty may tip
    over."""
    made = result["environment"]
    here = {
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    return 0 if made["device"] == "cpu" and all(made[key] == value for key, value in here.items()) else 1


@every
def test_questions_asked_again_get_the_recorded_answers(file: Path) -> None:
    result = load(file)
    differ = asked_again(result)
    assert all(count <= allowed(result) for count in differ.values()), differ


def test_another_method_would_be_noticed() -> None:
    """The test above can fail: the answers of a neighbouring budget are others."""
    result = load(ROOT / "lab/comparison/tiny-crowded/results/methods.json")
    recorded = unpack(result)["answers"]
    assert (
        sum(a != b for a, b in zip(recorded["duet_plus@0.05"][:COUNT], recorded["duet@0.05"][:COUNT], strict=True)) > 3
    )


def measured(row: dict[str, Any]) -> float:
    """Share of the visual tokens; a question may show several pictures."""
    return row["tokens"]["measured"] / row["tokens"]["unreduced"]


@every
def test_budgets_are_solved_as_they_were(file: Path) -> None:
    """Counts of every layer, for every run of which the file tells them; floors of the others."""
    result = load(file)
    loaded, runs = model_of(result["experiment"]["model"]), runs_of(result)
    assert [row["id"] for row in result["runs"]] == list(runs)
    # None where clips have several lengths: no single solution to tell, but one for each
    one = result["runs"][0]["solved"]
    sizes = [one["tokens"]] if one else [length * ROWS for length in LENGTHS]
    for row in result["runs"]:
        run = runs[row["id"]]
        try:
            with attached(loaded, run, [TaskQuestion("", (), "", (), "")] if run.method == "oracle" else []) as handle:
                plans = [handle.plan(tokens) for tokens in sizes]
        except BudgetError as error:
            assert row["status"] == "infeasible" and row["floor"] == pytest.approx(error.floor), row["id"]
            continue
        if one:
            (plan,), solved = plans, row["solved"]
            assert (plan.counts, plan.dominant, plan.contextual) == (
                tuple(solved["counts"]),
                solved["dominant"],
                solved["contextual"],
            ), row["id"]
        left = sum(plan.mean for plan in plans) / sum(sizes)  # the stream shows as many clips of each length
        assert row["method"] == BASELINE or measured(row) == pytest.approx(left), row["id"]


@every
def test_results_are_those_of_their_experiment_and_of_committed_code(file: Path) -> None:
    result = load(file)
    assert (
        result["experiment"]
        == from_json(json.loads((file.parents[1] / "experiments" / file.name).read_text()), file.name).to_json()
    )
    assert result["environment"]["commit"] and not unclean(result["environment"]["commit"])


@every
def test_rows_say_what_the_recorded_answers_say(file: Path) -> None:
    """Shares of right answers, of all and by kind, and wins and losses, counted anew from the answers in the file."""
    result = load(file)
    recorded, rows = unpack(result), {row["id"]: row for row in result["runs"] if row["status"] == "ok"}
    gold = [{text.strip().lower().removesuffix(".") for text in texts} for texts in recorded["gold"]]
    right = {key: [text.strip().lower().removesuffix(".") in texts for text, texts in zip(said, gold, strict=True)]
             for key, said in recorded["answers"].items()}  # fmt: skip
    assert set(right) == set(rows) and len(gold) == result["questions"]["count"]
    full = sum(right[BASELINE])
    for key, row in rows.items():
        assert row["accuracy"] == pytest.approx(sum(right[key]) / len(gold)) and row["kept"] == pytest.approx(
            sum(right[key]) / full
        ), key
        for kind, told in row["kinds"].items():
            own = [hit for hit, name in zip(right[key], recorded["kinds"], strict=True) if name == kind]
            assert (len(own), pytest.approx(sum(own) / len(own))) == (told["n"], told["accuracy"]), (key, kind)
        if row["against"]:
            pairs = list(zip(right[key], right[row["against"]["run"]], strict=True))
            assert (pairs.count((True, False)), pairs.count((False, True))) == (
                row["against"]["wins"],
                row["against"]["losses"],
            ), key
