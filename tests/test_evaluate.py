"""``duet-vlm eval``: the same questions for every run, nothing lost or asked twice, statistics that are right, errors
that help."""

from __future__ import annotations

import json
import math
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
from typer.testing import CliRunner

import duet_vlm
from duet_vlm.api import loading
from duet_vlm.api.loading import LoadedModel
from duet_vlm.cli.main import app
from duet_vlm.evaluation import statistics, tiny
from duet_vlm.evaluation.console import show
from duet_vlm.evaluation.experiment import Experiment, ExperimentCell, cells_of, from_json, read
from duet_vlm.evaluation.journal import Journal, alone
from duet_vlm.evaluation.report.markdown import matrix
from duet_vlm.evaluation.results import load, pack, save, unpack
from duet_vlm.evaluation.run import batches, run_experiment
from duet_vlm.evaluation.run_sample import alive, answer, attached, inputs_of, reads_elsewhere
from duet_vlm.evaluation.shared_vision import SharedVision
from duet_vlm.evaluation.source import Source, source
from duet_vlm.evaluation.summary import restated
from duet_vlm.evaluation.tasks import TaskQuestion, right, task
from duet_vlm.reducers.options import TokenOptions
from duet_vlm_lab.methods.oracle import Oracle

CELLS = (
    {"method": "duet", "budgets": [0.22, 0.05]},
    {"method": "fastv", "budgets": [0.22, 0.05]},
    {"method": "random", "budgets": [0.22], "settings": {"follow": "duet"}, "label": "random, DUET's schedule"},
    {"method": "oracle", "budgets": [0.22, 0.05]},
)
SMALL = Experiment("tiny", CELLS, seeds=(0, 3), limit=7, batch=4)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel("tiny", *tiny.load())


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_experiment(SMALL, "small", tmp_path_factory.mktemp("eval") / "j", device="cpu", timing_rounds=2)


def rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in result["runs"]}


# ---- experiments


def test_runs_are_the_baseline_and_every_cell_at_every_budget() -> None:
    ids = [run.id for run in SMALL.runs()]
    assert ids == [
        "none",
        "duet@0.22",
        "fastv@0.22",
        "random[follow=duet]@0.22",
        "oracle@0.22",
        "duet@0.05",
        "fastv@0.05",
        "oracle@0.05",
    ]


def test_an_experiment_survives_its_file(tmp_path: Path) -> None:
    cell = {
        "method": "duet",
        "settings": {"schedule": [[6, 0.5], [9, 0]], "dominant": 20, "contextual": 4},
        "label": "own",
    }
    made = Experiment("tiny", (cell,), limit=3)
    (tmp_path / "e.json").write_text(json.dumps(made.to_json()))
    again = read(tmp_path / "e.json")
    assert again == made
    assert again.runs()[1].settings["schedule"] == ((6, 0.5), (9, 0))


def test_methods_on_the_command_line() -> None:
    assert cells_of("duet, random[follow=duet],duet[options.text_query=last;schedule=((6, .5),)]") == [
        ("duet", []),
        ("random", ["follow=duet"]),
        ("duet", ["options.text_query=last", "schedule=((6, .5),)"]),
    ]
    with pytest.raises(ValueError, match="brackets"):
        cells_of("duet[")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "JSON object"),
        ({"task": "tiny"}, "'cells'"),
        ({"task": "tiny", "cells": {"method": "duet"}}, "list of objects"),
        ({"task": "tiny", "cells": []}, "at least one cell"),
        ({"task": "tiny", "cells": [{"budgets": [0.1]}]}, "'method' or 'preset'"),
        ({"task": "tiny", "cells": [{"method": "duet", "budget": 0.1}]}, r"unknown: \['budget'\]"),
        ({"task": "tiny", "cells": [{"method": "duet"}], "seed": 1}, "unknown entries seed"),
        ({"task": "tiny", "cells": [{"method": "duet"}], "seeds": [1, 1]}, "different integers"),
        ({"task": "tiny", "cells": [{"method": "duet"}], "limit": 0}, "limit=0"),
        ({"task": "tiny", "cells": [{"method": "duet"}], "batch": 0}, "batch=0"),
        ({"task": "tiny", "cells": [{"method": "duet", "budgets": [0.1, 0.1]}]}, "twice for duet@0.1"),
    ],
)
def test_a_wrong_experiment_is_named(data: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        from_json(data, "file.json")
    assert "file.json" in str(error.value)


# ---- answers


def test_answers_are_those_of_the_model_by_itself(loaded: LoadedModel, result: dict[str, Any]) -> None:
    """The whole machinery against four lines that a user would write."""
    model, processor = tiny.load()
    items = [tiny.sample("test", i, 3) for i in range(4)]
    inputs = processor(
        images=[i.image for i in items],
        text=[tiny.prompt(i.question) for i in items],
        return_tensors="pt",
        padding=True,
    )
    predictions = unpack(result)
    place = predictions["questions"].index("3/0")
    for key, budget in (("none", None), ("duet@0.22", 0.22), ("duet@0.05", 0.05)):
        handle = duet_vlm.attach(model, "duet", budget=budget) if budget else None
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        if handle:
            handle.detach()
        said = [
            t.strip() for t in processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        ]
        assert predictions["answers"][key][place : place + 4] == said
        hits = [q == a for q, a in zip(said, [i.answer for i in items], strict=True)]
        assert [right(TaskQuestion("", (), "", (i.answer,), ""), s) for i, s in zip(items, said, strict=True)] == hits


def test_accuracy_is_the_share_of_right_answers(result: dict[str, Any]) -> None:
    predictions = unpack(result)
    for row in result["runs"]:
        if row["status"] == "ok":
            hits = [
                said in gold for said, gold in zip(predictions["answers"][row["id"]], predictions["gold"], strict=True)
            ]
            assert row["accuracy"] == pytest.approx(sum(hits) / 14)
            assert row["seeds"] == pytest.approx({"0": sum(hits[:7]) / 7, "3": sum(hits[7:]) / 7})
            for kind, values in row["kinds"].items():
                mine = [h for h, k in zip(hits, predictions["kinds"], strict=True) if k == kind]
                assert (values["n"], values["accuracy"]) == (len(mine), pytest.approx(sum(mine) / len(mine)))


def test_shared_vision_layers_change_no_bit_and_leave_no_trace(loaded: LoadedModel) -> None:
    questions = [task("tiny").ask(5, i) for i in range(3)]
    inputs, shared = inputs_of(loaded, questions), SharedVision(loaded.model)
    assert len(shared.layers) == 4
    calls = []
    hook = shared.layers[0].register_forward_hook(lambda *_: calls.append(1))
    for run in (ExperimentCell("none"), ExperimentCell("duet", 0.11), ExperimentCell("fastv", 0.22)):
        with attached(loaded, run, questions), torch.no_grad():
            plain = loaded.model(**inputs).logits
            with shared.reused():
                assert torch.equal(loaded.model(**inputs).logits, plain)
    hook.remove()
    assert not any("forward" in layer.__dict__ for layer in shared.layers)
    assert shared.output is not None


def test_sharing_really_skips_the_layers(loaded: LoadedModel) -> None:
    questions = [task("tiny").ask(5, i) for i in range(2)]
    inputs, shared = inputs_of(loaded, questions), SharedVision(loaded.model)
    calls = []
    hook = shared.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for _ in range(3):
            with shared.reused():
                loaded.model(**inputs)
    hook.remove()
    assert calls == [1]


def test_methods_that_name_vision_layers_are_not_given_shared_ones(loaded: LoadedModel) -> None:
    """Whoever stands first in the batch: a method answers as it does alone."""
    questions = [task("tiny").ask(5, i) for i in range(4)]
    elsewhere = [
        ExperimentCell("hired", 0.11),
        ExperimentCell("vscan", 0.22),
        ExperimentCell("visionzip", 0.11, {"options": {"signal_layer": 2}}),
        ExperimentCell("evit+duet", 0.11),
    ]
    runs = [ExperimentCell("none"), ExperimentCell("duet", 0.11), *elsewhere]
    together = answer(loaded, runs, questions, 3)
    assert {run.id: answer(loaded, [run], questions, 3)[run.id] for run in runs} == together
    for run in runs:
        with attached(loaded, run, questions) as handle:
            assert reads_elsewhere(handle.reducer) is (run in elsewhere)


def test_the_oracle_keeps_what_the_answer_needs(loaded: LoadedModel) -> None:
    questions = [task("tiny").ask(1, i) for i in range(7)]
    with attached(loaded, ExperimentCell("oracle", 64), questions) as handle, torch.no_grad():
        loaded.model(**inputs_of(loaded, questions))
        for q, (span,) in zip(questions, handle.trace, strict=True):
            kept = alive(span, 0)
            needed = set(np.flatnonzero(q.needed).tolist())
            assert len(kept) == 64 and needed <= kept if len(needed) <= 64 else kept <= needed
        assert handle.report().measured_mean == 64


def test_recall_counts_needed_patches(loaded: LoadedModel) -> None:
    """Uniform keeps a pattern that anybody can write down."""
    questions = [task("tiny").ask(2, i) for i in range(7)]
    found = answer(loaded, [ExperimentCell("uniform", 64)], questions, 4)["uniform@64"].recalls
    pattern = {i for i in range(256) if (i + 1) * 64 // 256 > i * 64 // 256}
    needed = [set(np.flatnonzero(q.needed).tolist()) for q in questions]
    shares = [len(n & pattern) / len(n) for n in needed if n]
    assert found == pytest.approx((len(shares), sum(shares), sum(shares), sum(shares)))


def test_costs_are_those_of_the_report(loaded: LoadedModel, result: dict[str, Any]) -> None:
    row = rows(result)["duet@0.22"]
    with duet_vlm.attach(loaded.model, "duet", budget=0.22) as handle:
        plan = handle.plan(256)
    assert row["tokens"] == pytest.approx({"unreduced": 256, "nominal": plan.mean, "measured": plan.mean})
    assert row["solved"]["counts"] == list(plan.counts)
    assert 0 < row["flops_share"] < 0.6 and 0 < row["kv_share"] < 0.5
    assert rows(result)["none"]["flops_share"] == pytest.approx(1)
    assert row["prefill"]["rounds"] == 2 and row["prefill"]["ms"] > 0


def test_a_preset_is_a_run(tmp_path: Path) -> None:
    experiment = Experiment(
        "tiny", ({"preset": "visionzip-64"}, {"method": "visionzip", "budgets": [64]}), limit=4, against="visionzip"
    )
    row = rows(run_experiment(experiment, "presets", tmp_path / "j", device="cpu", timing_rounds=0))[
        "preset:visionzip-64"
    ]
    assert (row["label"], row["preset"], row["method"], row["budget"]) == (
        "visionzip-64",
        "visionzip-64",
        "visionzip",
        None,
    )
    assert (
        row["settings"]["dominant"] == 54
        and row["settings"]["options"]["cls_token"]
        and row["tokens"]["measured"] == 64
    )
    with pytest.raises(
        ValueError, match="preset:duet-64: schedule drops before layer 16, but this decoder has layers 0..11"
    ):
        run_experiment(
            Experiment("tiny", ({"preset": "duet-64"},), limit=4), "p", tmp_path / "k", device="cpu", timing_rounds=0
        )


def test_halves_run_in_full_precision_on_a_cpu(tmp_path: Path) -> None:
    """float16 matrix products take dozens of times longer there."""
    loading.load("tiny", "cpu").model.half().save_pretrained(tmp_path)
    tiny.load()[1].save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    assert loading.load(str(tmp_path), "cpu").model.dtype == torch.float32


def test_an_infeasible_budget_is_a_row(result: dict[str, Any]) -> None:
    row = rows(result)["fastv@0.05"]
    assert row["status"] == "infeasible"
    assert row["floor"] == pytest.approx(256 / 12)  # one layer of twelve reads all 256 tokens
    assert "fastv@0.05" not in unpack(result)["answers"]


def test_comparisons_name_their_partner(result: dict[str, Any]) -> None:
    by_id = rows(result)
    assert by_id["duet@0.22"]["against"] is None
    assert by_id["fastv@0.22"]["against"]["run"] == "duet@0.22"
    difference = by_id["oracle@0.05"]["accuracy"] - by_id["duet@0.05"]["accuracy"]
    assert by_id["oracle@0.05"]["against"]["difference"] == pytest.approx(difference)
    assert by_id["duet@0.05"]["of_oracle"] == pytest.approx(
        by_id["duet@0.05"]["accuracy"] / by_id["oracle@0.05"]["accuracy"]
    )


def test_floors_follow_a_method_count_for_count() -> None:
    for tokens, depth, budget in ((576, 32, 64), (256, 12, 0.07), (100, 28, 0.9)):
        wanted = duet_vlm.get_method("duet")().plan(tokens, depth, budget).counts
        for floor in ("random", "uniform"):
            assert duet_vlm.make_method(floor, follow="duet").plan(tokens, depth, budget).counts == wanted
    with pytest.raises(ValueError, match="leave out entry= and schedule="):
        duet_vlm.get_method("random")(follow="duet", entry=5)
    with pytest.raises(ValueError, match="other than the random baselines"):
        duet_vlm.get_method("random")(follow="uniform")
    with pytest.raises(ValueError, match="unknown method 'nobody'"):
        duet_vlm.get_method("random")(follow="nobody")


# ---- the same numbers, nothing lost


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def plain(result: dict[str, Any]) -> Any:
        return (
            [{k: v for k, v in row.items() if k != "prefill"} for row in result["runs"]],
            unpack(result),
            result["questions"],
        )

    return plain(a) == plain(b)


@pytest.mark.slow
def test_processes_change_nothing(result: dict[str, Any], tmp_path: Path) -> None:
    shared = run_experiment(SMALL, "small", tmp_path / "j", device="cpu", workers=2, timing_rounds=0)
    assert same(shared, result)


def test_an_interrupted_run_goes_on(result: dict[str, Any], tmp_path: Path) -> None:
    seen: list[int] = []

    def stop_after_two(done: int, total: int) -> None:
        seen.append(done)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(SMALL, "small", tmp_path / "j", device="cpu", timing_rounds=0, advance=stop_after_two)
    before = (tmp_path / "j/0.jsonl").read_text()
    with (tmp_path / "j/0.jsonl").open("a") as file:
        file.write('{"batch": "3/0-4", "page": {"ru')  # as a kill in the middle of writing leaves it
    again = run_experiment(SMALL, "small", tmp_path / "j", device="cpu", timing_rounds=0)
    assert same(again, result)
    after = (tmp_path / "j/0.jsonl").read_text()
    assert after.startswith(before)  # nothing was asked again
    names = [json.loads(line)["batch"] for line in after.splitlines()[1:]]
    assert sorted(names) == sorted(batch.name for batch in batches(SMALL, task("tiny")))


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    """SIGKILL in mid-run, then the same command: the result equals that of a run nobody killed."""
    words = [
        "eval",
        "--methods",
        "duet,random",
        "--budgets",
        "0.11",
        "--limit",
        "24",
        "--batch",
        "4",
        "--timing-rounds",
        "0",
        "--workers",
        "1",
    ]
    words += ["--device", "cpu", "--out"]
    command, environment = [sys.executable, "-m", "duet_vlm.cli.main", *words], os.environ | {"OMP_NUM_THREADS": "1"}
    journal = tmp_path / "killed/tiny/results/eval.parts/0.jsonl"
    with subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (not journal.exists() or journal.read_text().count("\n") < 3):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    written = journal.read_text()
    done = written.count("\n") - 1
    assert 2 <= done < 6, "the command was not killed in the middle"
    for name in ("killed", "whole"):
        assert CliRunner().invoke(app, [*words, str(tmp_path / name)]).exit_code == 0
    killed, whole = (load(tmp_path / name / "tiny/results/eval.json") for name in ("killed", "whole"))
    assert same(killed, whole)
    assert len(set(unpack(killed)["questions"])) == 24
    assert not journal.exists()


def test_a_run_that_is_added_is_asked_alone(result: dict[str, Any], tmp_path: Path) -> None:
    fewer = Experiment("tiny", CELLS[:1] + CELLS[2:], seeds=(0, 3), limit=7, batch=4)
    run_experiment(fewer, "small", tmp_path / "j", device="cpu", timing_rounds=0)
    before = (tmp_path / "j/0.jsonl").read_text()
    assert same(run_experiment(SMALL, "small", tmp_path / "j", device="cpu", timing_rounds=0), result)
    added = (tmp_path / "j/0.jsonl").read_text().removeprefix(before).splitlines()
    assert [sorted(json.loads(line)["page"]["runs"]) for line in added] == [["fastv@0.22"]] * 4


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "duet_vlm.cli.main",
        "eval",
        "--methods",
        "uniform",
        "--budgets",
        "0.11",
        "--limit",
        "4000",
        "--device",
        "cpu",
    ]
    command += ["--batch", "4", "--timing-rounds", "0", "--workers", "2", "--out", str(tmp_path)]
    journal = tmp_path / "tiny/results/eval.parts/0.jsonl"
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (not journal.exists() or journal.read_text().count("\n") < 2):
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
    assert len(children) >= 2
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(_alive(int(child)) for child in children):
        time.sleep(0.1)
    assert not [child for child in children if _alive(int(child))]


def _alive(process: int) -> bool:
    """Running, and not merely waiting to be collected by somebody."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_another_experiment_does_not_overwrite_a_journal(tmp_path: Path) -> None:
    page = {"questions": [], "runs": {"x": 1}}
    Journal(tmp_path / "j", {"experiment": 1, "versions": "a"}).add("0", page)
    text = (tmp_path / "j").read_text()
    assert Journal(tmp_path / "j", {"versions": "a", "experiment": 1}).batches == {"0": page}
    with pytest.raises(ValueError, match="another measurement .different versions"):
        Journal(tmp_path / "j", {"experiment": 1, "versions": "b"})
    assert (tmp_path / "j").read_text() == text


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    Journal(tmp_path / "j", {}).add("0", {"questions": [], "runs": {"x": 1}})
    (tmp_path / "j").write_text((tmp_path / "j").read_text().replace('"x"', "x") + "{}\n")
    with pytest.raises(ValueError, match="damaged"):
        Journal(tmp_path / "j", {})


# ---- the code that answers


def checkout(folder: Path) -> Path:
    """A package in a git repository of its own."""
    package = folder / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    for words in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "first"],
    ):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    return package


def test_source_names_the_commit_and_every_character(tmp_path: Path) -> None:
    package = checkout(tmp_path)
    first = source(package)
    assert first.clean and first.commit and first == source(package)
    (tmp_path / "page.md").write_text("beside the code")
    assert source(package) == first
    (package / "new.py").write_text("y = 1\n")  # git knows nothing of it, Python imports it
    untracked = source(package)
    assert untracked.commit == f"{first.commit}+changes" and untracked.files != first.files and not untracked.clean
    (package / "new.py").unlink()
    (package / "__init__.py").write_text("x = 2\n")
    one = source(package)
    (package / "__init__.py").write_text("x = 3\n")
    other = source(package)
    assert (
        one.commit == other.commit == f"{first.commit}+changes"
        and len({first.files, untracked.files, one.files, other.files}) == 4
    )


def test_a_package_outside_of_git_still_has_a_source(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("x = 1\n")
    found = source(tmp_path)
    assert (
        found.commit is None
        and len(found.files) == 16
        and not found.clean
        and found.until(Source(None, "other")) == found
    )


def test_code_that_changes_while_it_measures_is_marked() -> None:
    start = Source("abc1234", "f" * 16)
    assert start.until(Source("def5678", "f" * 16)) == start  # another commit with the same code
    assert start.until(Source("abc1234+changes", "0" * 16)) == Source("abc1234+changes", "f" * 16)
    dirty = Source("abc1234+changes", "f" * 16)
    assert dirty.until(Source("abc1234", "0" * 16)) == dirty


def test_a_journal_of_other_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a measurement of one version is not finished by another: not after a commit, and not after one more change
    without a commit."""
    few = Experiment("tiny", ({"method": "uniform", "budgets": [0.11]},), limit=4, batch=2, against="uniform")

    def measured(code: Source, advance: Any = lambda done, total: None) -> dict[str, Any]:
        monkeypatch.setattr("duet_vlm.evaluation.run.source", lambda: code)
        return run_experiment(few, "few", tmp_path / "j", device="cpu", timing_rounds=0, advance=advance)

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    begun = Source("abc1234+changes", "f" * 16)
    with pytest.raises(KeyboardInterrupt):
        measured(begun, stop)
    text = (tmp_path / "j/0.jsonl").read_text()
    for other in (Source("abc1234+changes", "0" * 16), Source("def5678", "0" * 16)):
        with pytest.raises(ValueError, match="another measurement .different source code"):
            measured(other)
        assert (tmp_path / "j/0.jsonl").read_text() == text
    environment = measured(begun)["environment"]
    assert (environment["commit"], environment["source"]) == ("abc1234+changes", "f" * 16)


def test_a_result_of_changed_code_says_so_wherever_it_is_shown(
    result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    dirty, clean = (
        result | {"environment": result["environment"] | {"commit": commit}}
        for commit in ("abc1234+changes", "abc1234")
    )
    for found, warned in ((dirty, True), (clean, False)):
        show(found)
        assert ("Not reproducible yet: " in (said := capsys.readouterr().out)) == warned
        assert ("Not reproducible yet: " in matrix(found)) == warned and "commit abc1234" in matrix(found)
        assert "NOT" not in said + matrix(found)  # a method in progress is no fault


def test_the_screen_shows_what_is_known(
    result: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No column in which nobody has a value, no heading that is broken into the width of a narrow table, no more
    columns than there are."""
    bare = json.loads(json.dumps(result))
    for run in bare["runs"]:
        run.update({"prefill": None, "recall": None} if run["status"] == "ok" else {})
    bare["questions"]["kinds"] = dict(list(bare["questions"]["kinds"].items())[:1])
    for run in bare["runs"]:
        if run["status"] == "ok":
            run["kinds"] = {kind: run["kinds"][kind] for kind in bare["questions"]["kinds"]}
    monkeypatch.setenv("COLUMNS", "120")
    show(bare)
    said = capsys.readouterr().out
    assert "prefill ms" not in said and "needed" not in said and "accuracy by kind of question\n" in said
    assert max(len(line) for line in said.split("visual tokens per layer")[0].splitlines()) <= 120
    some = json.loads(json.dumps(bare))
    some["runs"][1]["prefill"] = {"ms": 12.345}
    show(some)
    assert "prefill" in (said := capsys.readouterr().out) and "12.35" in said or "12.34" in said


# ---- result files


def test_a_result_file_round_trip(result: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path / "r.json", result)
    assert load(tmp_path / "r.json") == json.loads(json.dumps(result))
    assert list(tmp_path.iterdir()) == [tmp_path / "r.json"]
    json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)  # no NaN: not JSON


def test_a_broken_result_file_is_named(result: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    with pytest.raises(ValueError, match=r"r.json: cannot be read"):
        load(file)
    file.write_text(json.dumps(result)[:5000])
    with pytest.raises(ValueError, match=r"r.json: is not JSON, perhaps cut short"):
        load(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="no result file"):
        load(file)
    file.write_text(json.dumps(result | {"format": 99}))
    with pytest.raises(ValueError, match="format 99, but this version reads format 1"):
        load(file)
    file.write_text(json.dumps({k: v for k, v in result.items() if k != "runs"}))
    with pytest.raises(ValueError, match="runs missing"):
        load(file)
    packed = pack({"answers": {}})
    assert unpack({"predictions": packed}) == {"answers": {}}
    with pytest.raises(ValueError, match="damaged"):
        unpack({"name": "r", "predictions": packed | {"data": packed["data"][:-20]}})
    with pytest.raises(ValueError, match="'zip'"):
        unpack({"predictions": {"encoding": "zip", "data": ""}})


# ---- tasks


def test_a_task_of_ones_own(tmp_path: Path, loaded: LoadedModel) -> None:
    items = [tiny.sample("test", i) for i in range(3)]
    for i, item in enumerate(items):
        item.image.save(tmp_path / f"{i}.png")
    lines = [
        {"image": f"{i}.png", "question": item.question, "answer": item.answer.upper() + ".", "kind": "own"}
        for i, item in enumerate(items)
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    experiment = Experiment(str(tmp_path / "mine.jsonl"), ({"method": "duet", "budgets": [0.33]},))
    found = run_experiment(experiment, "own", tmp_path / "j", device="cpu", timing_rounds=0)
    assert (
        found["task"] == "mine"
        and found["questions"].pop("contents")
        and found["questions"] == {"count": 3, "unlabelled": 0, "per_seed": 3, "kinds": {"own": 3}}
    )
    assert found["runs"][0]["accuracy"] == 1 and found["runs"][0]["recall"] is None
    oracle = Experiment(str(tmp_path / "mine.jsonl"), ({"method": "oracle", "budgets": [0.33]},))
    with pytest.raises(ValueError, match="leave the oracle out"):
        run_experiment(oracle, "own", tmp_path / "k", device="cpu", timing_rounds=0)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not a JSON object"),
        ("[1]", "line 2: not a JSON object"),
        ('{"image": "a.png", "answer": "a"}', "'question' is missing"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"image": "a.png", "question": "?", "answer": "a"}\n' + line)
    with pytest.raises(ValueError, match=says):
        task(str(tmp_path / "t.jsonl"))


@pytest.mark.parametrize(
    "row",
    [
        {"image": 3, "question": "?", "answer": "a"},
        {"image": [], "question": "?", "answer": "a"},
        {"image": "a.png", "question": 5, "answer": "a"},
        {"image": "a.png", "question": "?", "answer": None},
        {"image": "a.png", "question": "?", "answers": []},
        {"image": "a.png", "question": "?", "answer": True},
    ],
)
def test_values_of_a_wrong_kind_are_named(row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="t.jsonl, line 1: image, question, answer and kind are texts"):
        task(str(tmp_path / "t.jsonl"))


def test_answers_as_people_write_them(tmp_path: Path) -> None:
    """A text under "answers" was taken apart into its letters."""
    tiny.sample("test", 0).image.save(tmp_path / "a.png")
    rows = [{"answers": "red"}, {"answer": 3}, {"answers": ["two", 2]}, {"answer": "a\u2028b"}]
    lines = [json.dumps({"image": "a.png", "question": "?"} | row, ensure_ascii=False) for row in rows]
    (tmp_path / "t.jsonl").write_text("\r\n".join(lines), encoding="utf-8")
    asked = task(str(tmp_path / "t.jsonl"))
    assert [asked.ask(0, i).answers for i in range(4)] == [("red",), ("3",), ("two", "2"), ("a\u2028b",)]


def test_tasks_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown task 'gqa': give tiny, .*or the path"):
        task("gqa")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no questions"):
        task(str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="without end: give --limit"):
        task("tiny").count(None)
    (tmp_path / "t.jsonl").write_text('{"image": "gone.png", "question": "?", "answer": "a"}')
    with pytest.raises(ValueError, match=r"t\.jsonl: its image .*gone\.png: no such file"):
        task(str(tmp_path / "t.jsonl"))
    (tmp_path / "gone.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"t\.jsonl: .*gone\.png: not an image"):
        task(str(tmp_path / "t.jsonl")).ask(0, 0)
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bytes\.jsonl: not a text file in UTF-8"):
        task(str(tmp_path / "bytes.jsonl"))
    for name in ("none.jsonl", "folder.jsonl"):
        (tmp_path / "folder.jsonl").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=f"{name}: (no such file|is a folder)"):
            task(str(tmp_path / name))


# ---- statistics, against arithmetic


def test_intervals_of_a_mean() -> None:
    """Against the normal approximation, which is good at 2,000 questions; and where it is not, the score test: the
    edges are the shares that differ from what was seen by 1.96 of their own standard deviations."""
    hits = np.arange(2000) % 5 != 0
    half = 1.96 * math.sqrt(0.8 * 0.2 / 2000)
    assert statistics.mean_interval(hits) == pytest.approx((0.8 - half, 0.8 + half), abs=0.001)
    for right_, count in ((50, 50), (0, 50), (1, 9), (199, 200)):
        seen, (low, high) = right_ / count, statistics.mean_interval(np.arange(count) < right_)
        assert 0 <= low < high <= 1 and high - low > 0.01
        for edge in {low, high} - {seen}:
            assert abs(seen - edge) / math.sqrt(edge * (1 - edge) / count) == pytest.approx(1.95996, abs=1e-4)


def paired(both: int, won: int, lost: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Answers of a run and of the full model, of so many questions of each sort."""
    return tuple(
        np.repeat(answers, (both, won, lost, neither))
        for answers in ([True, True, False, False], [True, False, True, False])
    )  # type: ignore[return-value]


COUNTS = [
    (90, 0, 0, 10),
    (190, 0, 2, 8),
    (60, 3, 9, 28),
    (5, 1, 0, 2),
    (0, 4, 3, 3),
    (20, 0, 20, 0),
    (0, 0, 7, 3),
    (1, 0, 0, 0),
    (300, 30, 20, 50),
]


def score(both: int, won: int, lost: int, neither: int, slope: float, offset: float) -> float:
    """How many standard deviations the seen counts are from the hypothesis accuracy = slope * full + offset, slowly:
    the likeliest shares of the four sorts of questions under it are searched on a grid that is made finer and finer."""
    count = both + won + lost + neither
    mean = (both + won) / count - slope * (both + lost) / count - offset

    def shares(b: np.ndarray, lo: np.ndarray) -> tuple[np.ndarray, ...]:
        w = slope * (b + lo) + offset - b
        return b, w, lo, 1 - b - w - lo

    (low_b, high_b), (low_l, high_l) = (0.0, 1.0), (0.0, 1.0)
    for _ in range(40):
        b, lo = np.meshgrid(np.linspace(low_b, high_b, 41), np.linspace(low_l, high_l, 41))
        found = shares(b, lo)
        with np.errstate(divide="ignore", invalid="ignore"):
            likely = sum(
                n * np.log(np.maximum(p, 0)) if n else 0 * p
                for n, p in zip((both, won, lost, neither), found, strict=True)
            )
        likely = np.where(np.min(found, axis=0) < -1e-12, -np.inf, likely)
        place = np.unravel_index(np.argmax(likely), likely.shape)
        step_b, step_l = (high_b - low_b) / 8, (high_l - low_l) / 8
        low_b, high_b = max(0, b[place] - step_b), min(1, b[place] + step_b)
        low_l, high_l = max(0, lo[place] - step_l), min(1, lo[place] + step_l)
    b, w, lo, _ = (float(share[place]) for share in found)
    # per question the run's answer less slope times the full model's: 1 - slope, 1, -slope or 0
    variance = (b * (1 - slope) ** 2 + w + lo * slope**2 - offset**2) / count
    return abs(mean) / math.sqrt(variance)


@pytest.mark.parametrize("counts", COUNTS)
def test_the_edges_of_paired_intervals_are_those_of_the_score_test(counts: tuple[int, int, int, int]) -> None:
    """An edge is 1.96 standard deviations from what was seen, or the end of what there is."""
    hits, full = paired(*counts)
    seen = hits.mean() - full.mean()
    low, high = statistics.difference_interval(hits, full)
    assert -1 <= low <= seen <= high <= 1 and low < high
    for edge in {low, high} - {-1.0, 1.0}:
        assert score(*counts, slope=1.0, offset=edge) == pytest.approx(1.95996, abs=2e-3)
    low, high = statistics.kept_interval(hits, full) or (0.0, 0.0)
    assert 0 <= low <= hits.mean() / full.mean() <= high < math.inf and low < high
    for edge in {low, high} - {0.0}:
        assert score(*counts, slope=edge, offset=0.0) == pytest.approx(1.95996, abs=2e-3)


def test_turned_round_a_difference_changes_its_sign() -> None:
    for counts in COUNTS:
        hits, full = paired(*counts)
        low, high = statistics.difference_interval(hits, full)
        assert statistics.difference_interval(full, hits) == pytest.approx((-high, -low))


@pytest.mark.parametrize(
    ("questions", "lost", "won"),
    [(600, 0.003, 0), (200, 0.01, 0), (200, 0.01, 0.005), (100, 0.02, 0.01), (33, 0.03, 0.02), (33, 0.1, 0.05), (200, 0.03, 0.01), (600, 0.03, 0.02),
     (200, 0.0008, 0), (100, 0, 0.01), (1920, 0.001, 0.0005), (100, 0.3, 0.02)],
)  # fmt: skip
@pytest.mark.parametrize("right_", [0.95, 0.6])
def test_95_percent_is_what_paired_intervals_hold(questions: int, lost: float, won: float, right_: float) -> None:
    """2,000 experiments with a known truth, few answers of which differ: a percentile bootstrap holds it in 64 to 87 %
    of the first five."""
    rng = np.random.default_rng(7)
    found = rng.multinomial(questions, [right_ - lost, won, lost, 1 - right_ - won], size=2000)
    seen, times = np.unique(found, axis=0, return_counts=True)
    kept = difference = 0
    for counts, count in zip(seen, times, strict=True):
        hits, full = paired(*counts)
        low, high = statistics.difference_interval(hits, full)
        difference += count * (low <= won - lost <= high)
        low, high = statistics.kept_interval(hits, full) or (0.0, 0.0)
        kept += count * (low <= (right_ - lost + won) / right_ <= high)
        assert low < high  # something may always be there
    assert min(kept, difference) / 2000 > 0.92, (kept / 2000, difference / 2000)


def test_pairing_is_what_makes_an_interval_narrow() -> None:
    """Answers that differ on 1 % of the questions: the paired interval has the width of those differences, not of the
    accuracies."""
    rng = np.random.default_rng(0)
    full = rng.random(4000) < 0.7
    other = full.copy()
    other[:40] = False
    lost = full[:40].sum() / 4000
    low, high = statistics.difference_interval(other, full)
    half = 1.96 * math.sqrt(lost * (1 - lost) / 4000)
    assert (low, high) == pytest.approx((-lost - half, -lost + half), abs=0.001)
    share = statistics.kept_interval(other, full)
    assert share is not None and share[1] - share[0] < 0.02
    assert statistics.kept_interval(full, np.zeros_like(full)) is None
    with pytest.raises(TypeError, match="give answers as bool"):
        statistics.kept_interval(other.astype(float), full)


def test_means_over_several_models_are_resampled() -> None:
    rng = np.random.default_rng(0)
    ours, full = rng.random((2, 400))
    low, high = statistics.resampled((ours, full), lambda a, b, axis: a.mean(axis) - b.mean(axis))
    half = 1.96 * np.std(ours - full) / 20
    assert (low, high) == pytest.approx(((ours - full).mean() - half, (ours - full).mean() + half), abs=0.006)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (3, 9), (5, 5), (0, 12), (40, 61)])
def test_the_sign_test_is_the_exact_binomial(wins: int, losses: int) -> None:
    a = np.array([True] * wins + [False] * losses + [True, False] * 10)
    b = np.array([False] * wins + [True] * losses + [True, False] * 10)
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    assert statistics.sign_test(a, b) == (wins, losses, pytest.approx(min(1, 2 * tail)))


def test_adjusted_p_values() -> None:
    """Benjamini-Hochberg by its definition: min over larger p of p * m / rank."""
    p = [0.01, 0.04, 0.03, 0.5]
    ranked = sorted(p)
    expected = [min(q * len(p) / (ranked.index(q) + 1) for q in ranked if q >= value) for value in p]
    assert statistics.adjusted(p) == pytest.approx(expected)
    assert statistics.adjusted([]) == []


def test_holm_by_its_definition() -> None:
    """Stepped down: the smallest of m times m, the next times m - 1, never less than the one before, at most 1."""
    p = [0.04, 0.001, 0.3, 0.011]
    assert statistics.holm(p) == pytest.approx([0.08, 0.004, 0.3, 0.033])
    assert statistics.holm([0.5, 0.6]) == pytest.approx([1.0, 1.0]) and statistics.holm([]) == []


@pytest.mark.parametrize(("won", "lost", "expected"), [(0, 0, True), (10, 10, True), (80, 80, False), (40, 5, False)])
def test_level_is_two_one_sided_tests(won: int, lost: int, expected: bool) -> None:
    """Of 1,000 questions; against the large-sample interval, which here decides the same."""
    hits, other = np.zeros(1000, bool), np.zeros(1000, bool)
    hits[:won], other[won : won + lost] = True, True
    difference, spread = (won - lost) / 1000, np.sqrt(won + lost - (won - lost) ** 2 / 1000) / 1000
    assert statistics.level(hits, other) == expected
    assert bool(abs(difference) + 1.645 * spread < 0.02) == expected
    assert not statistics.level(hits[:20], other[:20]) or won == lost == 0


# ---- the command


def run_cli(*words: str) -> Any:
    return CliRunner().invoke(app, ["eval", *words])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--limit", "2", "--tasks", "gqa"], "unknown task 'gqa'"),
        (["--limit", "2", "--tasks", "tyni"], "unknown task 'tyni' (did you mean 'tiny'?)"),
        (["--limit", "all"], "give --limit a number"),
        (["--limit", "0"], "--limit 0: give a whole number, at least 1, or 'all'"),
        (["--limit", "2", "--methods", "nobody"], "unknown method 'nobody'; 'duet-vlm methods' lists"),
        (["--limit", "2", "--methods", "duet,deut"], "unknown method 'deut' (did you mean 'duet'"),
        (["--limit", "2", "--presets", "duet-65"], "unknown preset 'duet-65' (did you mean 'duet-64'?)"),
        (["--limit", "2", "--methods", "duet[mrege=mean]"], "no setting 'mrege' (did you mean 'merge'?)"),
        (
            ["--limit", "2", "--against", "nobody"],
            "against 'nobody': no run is called so; there are full model, duet, visionzip",
        ),
        (["--limit", "2", "--against", "visonzip"], "(did you mean 'visionzip'?)"),
        (
            ["--limit", "2", "--methods", "fastv", "--against", "duet"],
            "against 'duet': no run is called so; there are full model, fastv",
        ),
        (["--limit", "2", "--name", "a/b"], "--name a/b: give a plain word"),
        (["--experiment", "gone.json", "--limit", "2"], "--experiment gone.json says what is asked: leave out --limit"),
        (["--limit", "2", "--methods", "duet[merge=sum]"], "merge='sum'"),
        (["--limit", "2", "--budgets", "1.5"], "--budget 1.5"),
        (["--limit", "2", "--seeds", "-1"], "--seeds -1"),
        (["--experiment", "gone.json"], "gone.json: cannot be read"),
    ],
)
def test_a_wrong_command_is_explained(words: list[str], says: str, tmp_path: Path) -> None:
    found = run_cli(*words, "--out", str(tmp_path), "--device", "cpu")
    assert found.exit_code == 2 and says in found.stderr and "Traceback" not in found.stderr
    assert not list(tmp_path.rglob("results/*.json"))


@pytest.mark.parametrize(
    "words", [["--against", "nobody"], ["--methods", "deut"], ["--tasks", "tiny,tyni"], ["--device", "tpu"]]
)
def test_what_is_wrong_is_said_before_anything_runs(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("duet_vlm.evaluation.run.load", lambda *_: pytest.fail("a model was loaded"))
    assert run_cli("--limit", "2", *words, "--out", str(tmp_path / "out")).exit_code == 2
    assert not (tmp_path / "out").exists()


def asked_for(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[Experiment]:
    """The experiments that a command line means."""
    found: list[Experiment] = []
    monkeypatch.setattr("duet_vlm.cli.eval_jobs.run_job", lambda job, *_: (found.append(job) or Path("x"), {}))
    result = run_cli(*words, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return found


def test_several_values_have_one_convention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path)]
    by_hand = "random[follow=duet]"
    joined = [
        "--tasks",
        "tiny,tiny-crowded",
        "--methods",
        f"duet,{by_hand}",
        "--budgets",
        "0.33,64",
        "--presets",
        "fastv-306,fastv-171",
    ]
    joined += ["--seeds", "1,2"]
    apart = [
        "--task",
        "tiny",
        "--task",
        "tiny-crowded",
        "--method",
        "duet",
        "--method",
        by_hand,
        "-b",
        "0.33",
        "--budget",
        "64",
    ]
    apart += ["--preset", "fastv-306", "--preset", "fastv-171", "--seed", "1", "--seed", "2"]
    expected = [
        Experiment(
            name,
            (
                {"method": "duet", "budgets": [0.33, 64], "settings": {}},
                {"method": "random", "budgets": [0.33, 64], "settings": {"follow": "duet"}},
                {"preset": "fastv-306"},
                {"preset": "fastv-171"},
            ),
            seeds=(1, 2),
            limit=200,
        )
        for name in ("tiny", "tiny-crowded")
    ]
    assert asked_for(monkeypatch, *joined, *out) == asked_for(monkeypatch, *apart, *out) == expected


def test_defaults_are_small_and_out_of_the_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (job,) = asked_for(monkeypatch)
    assert (job.task, job.model, job.seeds, job.limit, job.against) == ("tiny", "tiny", (0,), 200, "duet")
    assert len(job.runs()) * job.limit <= 4000
    assert (tmp_path / "out" / "eval").is_dir() and not (tmp_path / "comparison").exists()


def test_a_task_chooses_the_model_that_reads_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jobs = asked_for(monkeypatch, "--tasks", "tiny-video,tiny", "--out", str(tmp_path))
    assert [(job.task, job.model) for job in jobs] == [("tiny-video", "tiny-video"), ("tiny", "tiny")]
    assert asked_for(monkeypatch, "--tasks", "tiny-video", "--model", "x/y", "--out", str(tmp_path))[0].model == "x/y"


def test_a_picture_model_is_not_asked_about_clips(tmp_path: Path) -> None:
    """It was, without any picture, and answered."""
    found = run_cli(
        "--tasks", "tiny-video", "--model", "tiny", "--limit", "2", "--device", "cpu", "--out", str(tmp_path)
    )
    assert (
        found.exit_code == 2 and "task 'tiny-video' shows clips, and --model tiny takes pictures only" in found.stderr
    )
    assert not list(tmp_path.rglob("*.jsonl"))


def test_the_oracle_reads_clips(tmp_path: Path) -> None:
    """Needed tokens are those of the whole clip, which the method before the decoder may see frame by frame."""
    words = [
        "--tasks",
        "tiny-video",
        "--methods",
        "duet",
        "--budgets",
        "0.22",
        "--oracle",
        "--limit",
        "4",
        "--batch",
        "2",
        "--timing-rounds",
        "0",
    ]
    found = run_cli(*words, "--workers", "1", "--device", "cpu", "--out", str(tmp_path), "--json")
    assert found.exit_code == 0, found.output
    (result,) = json.loads(found.stdout)["results"]
    by_id = rows(result)
    # .22 of 520
    assert by_id["oracle@0.22"]["recall"]["entry"] == 1 and by_id["oracle@0.22"]["tokens"]["measured"] == 114
    assert by_id["none"]["tokens"]["measured"] == 520 and result["model"]["name"] == "tiny-video"
    with pytest.raises(ValueError, match="use crops='joint', not 'per_crop'"):
        Oracle(options=TokenOptions(crops="per_crop"))


SHORT = "--methods uniform --budgets 0.11 --limit 2 --timing-rounds 0 --device cpu".split()


def test_json_holds_everything_but_the_answers(tmp_path: Path) -> None:
    words = [*SHORT, "--out", str(tmp_path), "--json"]
    told = [json.loads(run_cli(*words).stdout)["results"] for _ in range(2)]  # the second time it is finished already
    assert told[0] == told[1] and len(told[0]) == 1
    kept = load(tmp_path / "tiny/results/eval.json")
    assert told[0][0] == {"file": str(tmp_path / "tiny/results/eval.json")} | {
        key: kept[key] for key in kept if key != "predictions"
    }
    failed = run_cli("--methods", "deut", "--json")
    assert "did you mean 'duet'" in json.loads(failed.stdout)["error"]


def test_two_at_once_are_refused_and_a_killed_one_stops_nobody(tmp_path: Path) -> None:
    journal = tmp_path / "results" / "eval.partial.jsonl"
    code = "import sys, time; from pathlib import Path; from duet_vlm.evaluation.journal import alone\n"
    code += "with alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(journal)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with (
            pytest.raises(
                ValueError, match=f"process {first.pid} is measuring this already; .* choose another --name or --out"
            ),
            alone(journal),
        ):
            pytest.fail("both hold it")
        with alone(journal.with_name("other.partial.jsonl")):  # nobody holds that one
            pass
        first.send_signal(signal.SIGKILL)
    assert [file.name for file in journal.parent.iterdir()] == [f"{journal.name}.lock"]  # what a kill leaves
    with alone(journal):
        with pytest.raises(ValueError, match=f"process {os.getpid()} "), alone(journal):
            pytest.fail("held twice")
    assert list(journal.parent.iterdir()) == []


def test_the_command_holds_its_journal(tmp_path: Path) -> None:
    words = [*SHORT, "--out", str(tmp_path)]
    journal = tmp_path / "tiny/results/eval.parts/0.jsonl"
    with alone(journal):
        for more in ([], ["--restart"]):
            found = run_cli(*words, *more)
            assert (
                found.exit_code == 2 and "is measuring this already" in found.stderr and found.stderr.count("\n") == 1
            )
        assert run_cli(*words, "--name", "other").exit_code == 0
    assert run_cli(*words).exit_code == 0
    assert sorted(file.name for file in journal.parent.parent.iterdir()) == ["eval.json", "other.json"]


def test_a_model_without_processor_is_refused_at_once(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny.path() / name).read_bytes())
    found = run_cli("--model", str(tmp_path), "--limit", "2", "--out", str(tmp_path / "out"), "--device", "cpu")
    assert found.exit_code == 2 and "cannot be loaded" in found.stderr


def test_a_finished_result_is_kept(tmp_path: Path) -> None:
    words = [*SHORT, "--out", str(tmp_path)]
    first = run_cli(*words)
    assert first.exit_code == 0 and "uniform 11%" in first.stdout and "28 x12 of 256" in first.stdout
    file = tmp_path / "tiny/results/eval.json"
    text = file.read_text()
    assert json.loads((tmp_path / "tiny/experiments/eval.json").read_text())["limit"] == 2
    again = run_cli(*words)
    assert again.exit_code == 0 and "finished already" in again.stdout and file.read_text() == text
    words[5] = "3"
    other = run_cli(*words)
    assert other.exit_code == 2 and "holds another experiment" in other.stderr and file.read_text() == text
    assert run_cli(*words, "--restart").exit_code == 0
    assert load(file)["questions"]["count"] == 3


# ---- questions and pictures that change meanwhile


def asked_anew(folder: Path, **changes: Any) -> Path:
    """Six questions about bitmaps, which are of one size in bytes whatever they show; by number of the question what is
    changed."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(6):
        item = tiny.sample("test", changes.get("pictures", 0) + number, 5)
        item.image.save(folder / f"{number}.bmp")
    lines = [
        {"image": f"{number}.bmp", "question": "what is this ?", "answer": changes.get("answer", "red")}
        for number in range(6)
    ]
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "mine.jsonl"


def ask_file(file: Path, out: Path, *more: str) -> Any:
    words = [
        "eval",
        "--tasks",
        str(file),
        "--methods",
        "uniform",
        "--budgets",
        "0.11",
        "--limit",
        "all",
        "--batch",
        "2",
        "--timing-rounds",
        "0",
    ]
    return CliRunner().invoke(app, [*words, "--workers", "1", "--device", "cpu", "--out", str(out), *more])


@pytest.mark.parametrize("changes", [{"answer": "blue"}, {"pictures": 50}])
def test_a_killed_run_does_not_go_on_with_other_questions_or_pictures(
    changes: dict[str, Any], tmp_path: Path, killed: list[int]
) -> None:
    file = asked_anew(tmp_path / "data")
    assert ask_file(file, tmp_path / "out").exit_code == 130
    killed.clear()
    asked_anew(tmp_path / "data", **changes)
    refused = ask_file(file, tmp_path / "out")
    assert (
        refused.exit_code == 2
        and "different contents of questions and pictures" in refused.stderr
        and "--restart" in refused.stderr
    )
    asked_anew(tmp_path / "data")  # as they were: it goes on
    assert ask_file(file, tmp_path / "out").exit_code == 0
    text = (tmp_path / "out/mine/results/eval.json").read_text()
    again = ask_file(file, tmp_path / "out")
    assert again.exit_code == 0 and "finished already" in again.stdout
    asked_anew(tmp_path / "data", **changes)
    refused = ask_file(file, tmp_path / "out")
    assert refused.exit_code == 2 and "answers to other questions or pictures" in refused.stderr
    assert (tmp_path / "out/mine/results/eval.json").read_text() == text
    assert ask_file(file, tmp_path / "out", "--restart").exit_code == 0


def test_a_digest_is_of_contents_alone(tmp_path: Path) -> None:
    """Not of folders, times or blanks; and of no more questions than are asked."""
    here, there = task(str(asked_anew(tmp_path / "a"))), task(str(asked_anew(tmp_path / "b")))
    assert here.digest(6) == there.digest(6) != here.digest(5)
    file = tmp_path / "b/mine.jsonl"
    file.write_text("\n" + file.read_text().replace(", ", ",  "))
    os.utime(tmp_path / "b/0.bmp", (1, 1))
    assert task(str(file)).digest(6) == here.digest(6)
    (tmp_path / "b/5.bmp").write_bytes((tmp_path / "b/4.bmp").read_bytes())
    assert task(str(file)).digest(6) != here.digest(6) and task(str(file)).digest(5) == here.digest(5)
    assert task("tiny").digest(6) is None


def test_the_statistics_of_committed_results_are_those_of_their_answers() -> None:
    """What ``lab/studies/restate.py`` would write is what is there, of the three smallest files."""
    for path in sorted(
        (Path(__file__).parent.parent / "lab/comparison").glob("*/results/*.json"), key=lambda path: path.stat().st_size
    )[:3]:
        assert json.loads(json.dumps(restated(load(path)))) == load(path), path


def test_the_full_model_keeps_all_of_itself() -> None:
    """Whatever the questions: that is no estimate."""
    path = Path(__file__).parent.parent / "lab/comparison/tiny-page/results/methods.json"
    full, *others = restated(load(path))["runs"]
    assert full["kept_interval"] == (1.0, 1.0) == full["kinds"][next(iter(full["kinds"]))]["kept_interval"]
    widths = [high - low for row in others if row["status"] == "ok" for low, high in [row["kept_interval"]]]
    assert widths and min(widths) > 0.01
