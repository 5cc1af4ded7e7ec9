"""duet-vlm tune: exact bounds against sums by hand, a race that cannot be won by luck, a search that resumes, a file
that everything takes."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import duet_vlm
from duet_vlm.cli import tune as tune_verb
from duet_vlm.cli.main import app
from duet_vlm.cli.tune import size_of
from duet_vlm.evaluation import tiny
from duet_vlm.evaluation.experiment import ExperimentCell
from duet_vlm.evaluation.tune.answers import divergence
from duet_vlm.evaluation.tune.binomial import FEWEST, allowed, chance, lower_bound, needed, split
from duet_vlm.evaluation.tune.candidates import candidates
from duet_vlm.evaluation.tune.folder import folder_task
from duet_vlm.evaluation.tune.halving import RUNGS, AnswerScore, Candidate, choose, confirm
from duet_vlm.evaluation.tune.pareto_plot import front, pareto
from duet_vlm.evaluation.tune.search import Goal
from duet_vlm.evaluation.tune.summary import python_line, shell_line, verdict
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.persistence import load_from_file

RESULTS = Path(__file__).resolve().parents[1] / "lab/studies/results"


def below(losses: int, asked: int, rate: float) -> float:
    """Chance of at most so many losses, summed by hand."""
    return sum(math.comb(asked, i) * rate**i * (1 - rate) ** (asked - i) for i in range(losses + 1))


@pytest.mark.parametrize("keep", [0.8, 0.95, 0.98])
def test_allowed_losses_are_the_most_that_exclude_a_worse_setting(keep: float) -> None:
    for asked in (1, 10, 58, 59, 60, 148, 149, 150, 236, 500):
        losses = allowed(asked, keep)
        assert losses == -1 or below(losses, asked, 1 - keep) <= 0.05
        assert below(losses + 1, asked, 1 - keep) > 0.05


def test_the_bound_is_where_the_test_turns() -> None:
    for asked, lost in ((30, 0), (149, 0), (236, 1), (400, 7), (50, 50)):
        bound = lower_bound(asked - lost, asked)
        if lost < asked:
            assert below(lost, asked, 1 - bound) == pytest.approx(0.05, abs=1e-9)
        assert bound == 0.0 or (allowed(asked, bound - 1e-6) >= lost > allowed(asked, bound + 1e-6))
    assert lower_bound(0, 0) == 0.0


def test_needed_questions() -> None:
    assert [needed(0.98), needed(0.95), needed(0.8)] == [149, 59, 14]  # ceil(log 0.05 / log keep)
    for losses in range(4):
        count = needed(0.95, losses)
        assert allowed(count, 0.95) >= losses > allowed(count - 1, 0.95)
    assert chance(2, 12, 0.98) == pytest.approx(1 - below(1, 12, 0.02))


def test_questions_are_split_and_too_few_are_named() -> None:
    assert (split(200, 0.98).choosing, split(200, 0.98).testing, split(200, 0.98).losses) == (50, 149, 0)
    for count in (250, 400, 1000):
        found = split(count, 0.98)
        assert found.choosing + found.testing <= count and found.choosing >= FEWEST
        # no question more than its losses need
        assert found.losses == allowed(found.testing, 0.98) > allowed(found.testing - 1, 0.98)
    with pytest.raises(ValueError, match=r"100 questions .* 149 .* give 73 more, or --keep 0.961"):
        split(100, 0.98)
    assert split(100, 0.961).testing + FEWEST <= 100
    with pytest.raises(ValueError, match="1 question .* give 172 more"):
        split(1, 0.98)
    assert split(40, None).losses is None
    assert (split(2, None).choosing, split(2, None).testing) == (1, 1)
    with pytest.raises(ValueError, match="1 question .* at least two"):
        split(1, None)


class Made:
    """Candidates with known shares of losses: the dearer, the fewer."""

    def __init__(self, losses: dict[str, float], seed: int = 0, hard: bool = False) -> None:
        self.rates, self.rng, self.hard = losses, random.Random(seed), hard
        self.luck: dict[tuple[str, int], float] = {}
        self.asked: list[tuple[str, int]] = []

    def __call__(self, runs: Sequence[ExperimentCell], numbers: Sequence[int]) -> dict[str, list[AnswerScore] | str]:
        out: dict[str, list[AnswerScore] | str] = {}
        for run in runs:
            self.asked += [(run.id, number) for number in numbers]
            luck = [
                self.luck.setdefault(("" if self.hard else run.id, number), self.rng.random()) for number in numbers
            ]
            rate = self.rates[run.id]
            out[run.id] = (
                "too small a budget"
                if rate > 1
                else [AnswerScore(chance < rate, rate + chance / 100) for chance in luck]
            )
        return out

    def field(self) -> list[Candidate]:
        return [Candidate(ExperimentCell(name), ms=100.0 - place) for place, name in enumerate(self.rates)]


def raced(made: Made, keep: float | None, count: int) -> tuple[Candidate | None, list[Candidate], list[Candidate]]:
    field, spent = made.field(), split(count, keep)
    ladder = choose(field, range(spent.choosing), keep, made)
    testing = range(spent.choosing, spent.choosing + spent.testing)
    return (confirm(ladder, testing, spent.losses, made, 16) if ladder else None), ladder, field


def test_the_cheapest_that_holds_wins_and_every_other_has_a_reason() -> None:
    made = Made({"a": 0.0, "b": 0.0, "c": 0.3, "d": 0.5, "e": 2.0})
    chosen, ladder, field = raced(made, 0.98, 200)
    assert chosen is not None and chosen.name == "b" and chosen.bound is not None and chosen.bound >= 0.98
    assert len(ladder) <= RUNGS and all(c.reason for c in field if c is not chosen) and not chosen.reason
    assert "so many have a chance of" in field[3].reason and field[4].reason == "too small a budget"
    chose, tested = ({n for name, n in made.asked if (n < 50) == early} for early in (True, False))
    assert chose and tested and max(tested) < 50 + 149
    assert sum(name == "d" for name, _ in made.asked) < 20  # what loses half of its answers is not asked for long


def test_a_rung_behind_one_that_failed_is_not_taken() -> None:
    """The order is fixed before the test: what comes after a failure counts no more, however well it does."""
    safe, unlucky, cheap = (
        Candidate(ExperimentCell(name), ms=ms) for name, ms in (("safe", 3.0), ("unlucky", 2.0), ("cheap", 1.0))
    )
    found = confirm([safe, unlucky, cheap], range(149), 0, Made({"safe": 0.0, "unlucky": 0.5, "cheap": 0.0}), 16)
    assert found is safe and "failed before it" in cheap.reason and "which allows 0 of 149" in unlucky.reason
    assert cheap.tested < 149


@pytest.mark.slow
@pytest.mark.parametrize("hard", [False, True], ids=["own questions", "the same hard questions"])
def test_many_bad_candidates_do_not_make_a_good_one(hard: bool) -> None:
    """30 settings that all lose 2.1 %: in 400 searches one is taken in no more than 5 % of them (and 3 standard
    errors)."""
    names = {f"c{i}": 0.021 for i in range(30)}
    wrong = sum(raced(Made(names, seed, hard), 0.98, 200)[0] is not None for seed in range(400))
    assert wrong / 400 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


LOST = (7, 13, 20, 3)  # numbers of questions: one settled loss, two, three, four


class Said:
    """Candidates of which it is settled which question each loses while choosing, and that lose nothing in the test;
    ``moved`` by candidate."""

    def __init__(self, choosing: int, rows: dict[str, tuple[float, int, float]]) -> None:
        self.choosing, self.rows = choosing, rows

    def __call__(self, runs: Sequence[ExperimentCell], numbers: Sequence[int]) -> dict[str, list[AnswerScore] | str]:
        return {
            run.id: [AnswerScore(number in LOST[: self.rows[run.id][1]], self.rows[run.id][2]) for number in numbers]
            for run in runs
        }

    def field(self) -> list[Candidate]:
        return [Candidate(ExperimentCell(name), ms=ms) for name, (ms, *_) in self.rows.items()]


def test_what_is_within_the_goal_is_kept_first() -> None:
    """As on 90 questions of photographs, 90 % to be kept: the cheapest that lost nothing is tested, none that lost more
    than the goal allows is."""
    # a long front: ever cheaper, ever further from the full model
    steps = {f"step{i}@0.5": (60.0 - i, 0, 0.01 * 1.2**i) for i in range(24)}
    cheap = {
        "duet@0.11": (35.1, 0, 1.0),
        "scope@0.06": (33.0, 2, 1.1),
        "duet@0.06": (31.8, 3, 1.2),
        "worse@0.06": (36.5, 0, 1.5),
    }
    made = Said(24, steps | cheap)
    field = made.field()
    ladder = choose(field, range(24), 0.9, made)
    names = [c.name for c in ladder]
    assert "duet@0.11" in names and len(names) == RUNGS and names == sorted(names, key=lambda name: -made.rows[name][0])
    assert all(c.lost <= 2 for c in ladder) and "duet@0.06" not in names
    few = Said(24, {name: row for name, row in (steps | cheap).items() if name in (*cheap, "step0@0.5")})
    field = few.field()
    choose(field, range(24), 0.9, few)
    reasons = {c.name: c.reason for c in field}
    assert reasons["duet@0.06"] == "31.8 ms, 3 of 24 lost: more than 90 % kept allows; others are within it"
    assert reasons["worse@0.06"].startswith(
        "36.5 ms, 0 of 24 lost: duet@0.11 is as good or better in both (35.1 ms, 0 lost)"
    )
    assert [name for name, reason in reasons.items() if not reason] == ["step0@0.5", "duet@0.11", "scope@0.06"]


@pytest.mark.parametrize("seed", range(30))
def test_the_cheapest_that_lost_least_is_always_tested(seed: int) -> None:
    """Whatever the field: nobody who lost as little is cheaper than the cheapest rung of those."""
    draw = random.Random(seed)
    rows = {f"c{i}@0.5": (draw.uniform(20, 60), draw.choice((0, 0, 0, 1, 2, 4)), draw.random()) for i in range(40)}
    made = Said(24, rows)
    ladder = choose(made.field(), range(24), 0.9, made)
    cheapest = min((ms, name) for name, (ms, lost, _) in rows.items() if lost == 0)[1]
    assert cheapest in {c.name for c in ladder}


@pytest.mark.parametrize("keep, count", [(0.9, 90), (0.95, 200)])
def test_a_wrong_choice_is_rare_among_settings_of_every_kind(keep: float, count: int) -> None:
    """200 searches among 36 settings whose losses grow as budgets shrink: a choice that loses more than it may in no
    more than 5 % of them (and 3 standard errors), and in most a choice at all."""
    wrong, none = 0, 0
    for seed in range(200):
        draw = random.Random(seed)
        rates = {}
        for method in range(6):
            worst, power = math.exp(draw.uniform(math.log(0.005), math.log(0.2))), draw.uniform(0.5, 1.5)
            rates |= {
                f"m{method}@{budget}": min(0.9, worst * (1 / budget - 1) ** power)
                for budget in (0.75, 0.5, 0.33, 0.22, 0.11, 0.06)
            }
        # the cheaper the further down
        ordered = dict(sorted(rates.items(), key=lambda item: -float(item[0].split("@")[1])))
        chosen, *_ = raced(Made(ordered, seed), keep, count)
        wrong += chosen is not None and rates[chosen.name] > 1 - keep
        none += chosen is None
    assert wrong / 200 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200) and none < 40


def test_without_a_share_to_keep_the_best_is_measured() -> None:
    chosen, ladder, _ = raced(Made({"a": 0.2, "b": 0.0, "c": 0.4}), None, 80)
    assert chosen is not None and chosen.name == "b" and len(ladder) == 1 and chosen.tested == 56


def test_divergence() -> None:
    from scipy.stats import entropy

    rng = np.random.default_rng(0)
    one, other = rng.dirichlet(np.ones(9), 4), rng.dirichlet(np.ones(9), 4)
    found = divergence(torch.tensor(one).log(), torch.tensor(other).log())
    assert found.numpy() == pytest.approx([entropy(a, b) for a, b in zip(one, other, strict=True)])
    assert divergence(torch.tensor(one).log(), torch.tensor(one).log()).max() == 0


@pytest.mark.parametrize(
    "values, said",
    [
        ({"keep": 1.0}, "from 0.5 to below 1"),
        ({"keep": 0.2}, "0.2"),
        ({"speedup": 0.5}, "above 1"),
        ({"memory": 0.0}, "24GB"),
    ],
)
def test_goals_that_cannot_be(values: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Goal(**values)


def test_sizes() -> None:
    assert [size_of(text) for text in ("24GB", "800 mb", "1.5g", "7")] == [24e9, 800e6, 1.5e9, 7]
    with pytest.raises(ValueError, match="--memory lots: write a size"):
        size_of("lots")


def test_candidates_are_methods_by_budgets_by_schedules() -> None:
    model, _ = tiny.load()
    runs = candidates([("duet_plus", {}), ("visionzip", {})], (0.5, 0.22), ("own", "paper"), model)
    assert len(runs) == 2 * (2 + 1)  # visionzip drops nothing inside the decoder
    assert {run.id for run in runs if not run.settings} == {
        "duet_plus@0.5",
        "duet_plus@0.22",
        "visionzip@0.5",
        "visionzip@0.22",
    }
    with pytest.raises(ValueError, match="none of visionzip takes a schedule"):
        candidates([("visionzip", {})], (0.5,), ("deep",), model)
    with pytest.raises(ValueError, match="--schedules steep: choose among own, paper, deep"):
        candidates([("duet", {})], (0.5,), ("steep",), model)


def test_a_folder_is_a_task(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name, "png")
    (tmp_path / "a.txt").write_text("first ?\n\nsecond ?\n")
    (tmp_path / "notes.md").write_text("no picture")
    task = folder_task(tmp_path, ["what ?"])
    assert task.size == 3 and [task.ask(0, i).text for i in range(3)] == ["first ?", "second ?", "what ?"]
    assert task.ask(0, 2).answers == () and task.ask(0, 2).images[0].size == (8, 8)
    with pytest.raises(ValueError, match="b.png: nothing to ask about it; give --prompt, or write prompts into b.txt"):
        folder_task(tmp_path, [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures or clips in it"):
        folder_task(tmp_path / "empty", ["what ?"])


def test_a_file_is_attached_like_its_contents(tmp_path: Path) -> None:
    file = tmp_path / "duet.json"
    file.write_text(
        json.dumps(
            {
                "method": "duet_plus",
                "budget": 0.22,
                "settings": {"schedule": [[6, 0.5], [9, 0.0]]},
                "found": {"kept": 1.0},
            }
        )
    )
    model, _ = tiny.load()
    schedule = ((6, 0.5), (9, 0.0))
    for method in (str(file), file):
        with duet_vlm.attach(model, method) as handle:
            assert (handle.reducer.name, handle.budget, handle.reducer.settings()["schedule"]) == (
                "duet_plus",
                0.22,
                schedule,
            )
    with duet_vlm.attach(model, file, budget=0.5, options=TokenOptions(text_query="last")) as handle:
        assert (handle.budget, handle.reducer.settings()["options"]["text_query"]) == (0.5, "last")
    for text, said in (
        ("{", "is not JSON"),
        ("[]", "holds no reduction"),
        ('{"method": "duet"}', "holds no reduction"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            load_from_file(file)
    with pytest.raises(ValueError, match="nowhere.json: cannot be read"):
        duet_vlm.attach(model, "nowhere.json")


def call(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


SMALL = ("--limit", "44", "--keep", "0.8", "--timing-rounds", "3", "--batch", "22")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tune")
    found = call("tune", "tiny", *SMALL, "--methods", "duet,random", "--budgets", ".33,.06", "--out", folder, "--json")
    assert found.exit_code == 0, found.output
    return folder / "tiny", json.loads(found.stdout)


def test_a_search_writes_what_to_use(tuned: tuple[Path, dict[str, Any]]) -> None:
    folder, result = tuned
    assert {file.name for file in folder.iterdir()} == {"duet.json", "result.json", "pareto.png", "journal.jsonl"}
    chosen = next(row for row in result["candidates"] if row["id"] == result["chosen"])
    setting = json.loads((folder / "duet.json").read_text())
    assert {key: setting[key] for key in ("method", "budget", "settings")} == {
        key: chosen[key] for key in ("method", "budget", "settings")
    }
    assert chosen["bound"] == pytest.approx(
        lower_bound(chosen["testing"]["asked"] - chosen["testing"]["lost"], chosen["testing"]["asked"])
    )
    assert chosen["bound"] >= 0.8 and all(row["reason"] for row in result["candidates"] if row is not chosen)
    assert Image.open(folder / "pareto.png").size[0] > 800
    assert f"{chosen['bound']:.2%}" in result["verdict"] and result["use"]["python"] == python_line(chosen)


@pytest.mark.slow
def test_a_second_call_asks_nothing_again(tuned: tuple[Path, dict[str, Any]]) -> None:
    folder, result = tuned
    before = (folder / "journal.jsonl").read_text()
    again = call(
        "tune", "tiny", *SMALL, "--methods", "duet,random", "--budgets", ".33,.06", "--out", folder.parent, "--json"
    )
    assert (
        json.loads(again.stdout)["candidates"] == result["candidates"]
        and (folder / "journal.jsonl").read_text() == before
    )


def test_a_killed_search_goes_on(tuned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, result = tuned
    lines = (folder / "journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/journal.jsonl").write_text("".join(lines[: len(lines) - 2]) + '{"batch": "hal')
    again = call(
        "tune", "tiny", *SMALL, "--methods", "duet,random", "--budgets", ".33,.06", "--out", tmp_path, "--json"
    )
    assert json.loads(again.stdout)["candidates"] == result["candidates"]


@pytest.mark.slow
def test_other_methods_of_the_same_name_are_timed_together(tuned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, result = tuned
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/journal.jsonl").write_text((folder / "journal.jsonl").read_text())
    found = json.loads(
        call("tune", "tiny", *SMALL, "--methods", "duet,visionzip", "-b", ".33,.06", "--out", tmp_path, "--json").stdout
    )
    assert {row["method"] for row in found["candidates"]} == {"duet", "visionzip"}
    old, new = ({row["id"]: row["ms"] for row in each["candidates"]} for each in (result, found))
    assert new["duet@0.33"] != old["duet@0.33"] and new["visionzip@0.33"]


def test_every_verb_takes_the_file(tuned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    setting = tuned[0] / "duet.json"
    known = json.loads(setting.read_text())
    picture = Path(tiny.__file__).parent / "demo/1-shapes.png"
    picture = picture if picture.is_file() else sorted(picture.parent.glob("*.png"))[0]
    said = call("run", "--method", setting, "-i", picture, "-p", "what color is the star ?", "--json")
    assert json.loads(said.stdout)["report"]["budget"] == known["budget"]
    said = call(
        "eval",
        "--methods",
        setting,
        "--limit",
        "2",
        "--timing-rounds",
        "0",
        "--workers",
        "1",
        "--out",
        tmp_path,
        "--json",
    )
    assert [row["budget"] for row in json.loads(said.stdout)["results"][0]["runs"]] == [None, known["budget"]]
    said = call("bench", "--method", setting, "--rounds", "1", "--new", "2", "--json")
    assert [row["budget"] for row in json.loads(said.stdout)["rows"]] == [None, known["budget"]]
    said = call("vllm-args", "-m", "tiny", "--method", setting)
    assert said.exit_code == 2 and "on vLLM a budget counts what enters" in said.stderr
    said = call("train", "--data", "tiny", "--limit", "4", "--method", setting, "--print-config", "--json")
    assert {key: json.loads(said.stdout)[key] for key in ("method", "budget")} == {
        key: known[key] for key in ("method", "budget")
    }


@pytest.mark.slow
def test_a_file_with_settings_is_timed_with_them(tmp_path: Path) -> None:
    file = tmp_path / "duet.json"
    file.write_text('{"method": "duet_plus", "budget": 0.22, "settings": {"schedule": [[6, 0.5], [9, 0.0]]}}')
    words = ("bench", "--method", file, "--rounds", "1", "--new", "2", "--json")
    _, row = json.loads(call(*words).stdout)["rows"]
    assert row["side"] == "duet_plus[schedule=((6, 0.5), (9, 0.0))] at 22%" and row["settings"] == {
        "schedule": [[6, 0.5], [9, 0.0]]
    }
    assert len(row["t2v"]) == 2  # it drops where the file says
    assert [row["budget"] for row in json.loads(call(*words, "-b", ".33,.5").stdout)["rows"]] == [None, 0.33, 0.5]


def test_help_says_what_is_searched() -> None:
    said = "".join(call("tune", "--help").stdout.split())
    assert (
        "Default:duet,duet_plus,duet_plus[options.reentry=layer],scope,visionzip,pyramiddrop,fastv." in said
        and "Default:0.75,0.5,0.33,0.22,0.11,0.06." in said
    )


@pytest.mark.parametrize("verb", ["tune", "drop-curve", "eval"])
def test_a_file_that_is_missing_is_named_without_an_option_of_another_verb(verb: str, tmp_path: Path) -> None:
    words = {"tune": [], "drop-curve": ["--task"], "eval": ["--tasks"]}[verb]
    said = call(verb, *words, tmp_path / "none.jsonl")
    assert said.exit_code == 2 and said.stderr == f"error: {tmp_path / 'none.jsonl'}: no such file\n"


@pytest.mark.slow
def test_nothing_qualifies_is_said(tmp_path: Path) -> None:
    words = ("--limit", "44", "--keep", "0.8", "--timing-rounds", "3", "--methods", "random", "-b", ".06")
    found = call("tune", "tiny-chain", *words, "--out", tmp_path)
    assert found.exit_code == 0 and "Nothing qualifies for at least 80 % of the right answers kept." in found.output
    assert not (tmp_path / "tiny-chain/duet.json").exists() and (tmp_path / "tiny-chain/pareto.png").exists()


def test_a_dry_run_says_what_it_would_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same call says the same again, though by then the first answers cost nothing any more."""
    spans: list[float] = []
    monkeypatch.setattr(tune_verb, "_span", lambda seconds: spans.append(seconds) or "a while")
    for _ in range(2):
        found = call("tune", "tiny", *SMALL, "--methods", "duet", "-b", ".33", "--out", tmp_path, "--dry-run")
        assert found.exit_code == 0 and "at most" in found.output and not (tmp_path / "tiny/result.json").exists()
        assert "at least 80 % of the right answers kept" in found.output
    assert spans[0] == spans[1] > 0.5


def jsonl(folder: Path, *rows: dict[str, Any]) -> Path:
    Image.new("RGB", (64, 64), "white").save(folder / "white.png")
    file = folder / "mine.jsonl"
    file.write_text("".join(json.dumps({"image": "white.png"} | row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    "row, words, said",
    [
        ({"question": "what color is the star ?", "answer": "an aardvark"}, (), "never one of the labels"),
        ({"question": "what color is the star ?"}, ("--limit", "1"), "1 question .* too few"),
        ({"question": "what color is the star ?"}, ("--limit", "1", "--speedup", "1.01"), "give at least two"),
        ({"question": "what color is the star ?"}, ("--prompt", "why ?"), "brings its questions"),
        ({"question": "what color is the star ?"}, ("--methods", "duett"), "did you mean 'duet'"),
    ],
)
def test_bad_questions_get_one_sentence(row: dict[str, Any], words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    file = jsonl(tmp_path, *([row] * 40))
    goal = () if "--speedup" in words else ("--keep", "0.8")
    found = call("tune", file, *goal, "--out", tmp_path / "out", "--timing-rounds", "3", "--json", *words)
    (line,) = found.stderr.splitlines()[-1:]
    assert found.exit_code == 2 and line.startswith("error:") and __import__("re").search(said, line), found.output


def test_a_model_that_answers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlavaForConditionalGeneration as Model

    real = Model.generate
    monkeypatch.setattr(
        Model,
        "generate",
        lambda self, *a, **k: real(self, *a, **k | {"max_new_tokens": 1, "suppress_tokens": list(range(3, 400))}),
    )
    file = jsonl(tmp_path, *([{"question": "what color is the star ?"}] * 40))
    found = call("tune", file, "--keep", "0.8", "--out", tmp_path / "out", "--json")
    assert found.exit_code == 2 and "answers nothing to any of" in found.stderr


@pytest.mark.slow
def test_other_goals(tmp_path: Path) -> None:
    """Speed and memory rule out by their own numbers; what is left is measured without a share to keep."""
    words = (
        "--limit",
        "40",
        "--timing-rounds",
        "3",
        "--batch",
        "20",
        "--methods",
        "duet",
        "-b",
        ".5,.11",
        "--out",
        tmp_path,
        "--json",
    )
    found = json.loads(call("tune", "tiny", *words, "--speedup", "1.01", "--memory", "1GB").stdout)
    chosen = next(row for row in found["candidates"] if row["id"] == found["chosen"])
    assert chosen["speedup_interval"][0] >= 1.01 and chosen["testing"]["asked"] > 0 and found["goal"]["keep"] is None
    # from the journal: nothing is asked anew
    found = json.loads(call("tune", "tiny", *words, "--speedup", "1.01", "--memory", "1MB").stdout)
    assert found["chosen"] is None and all(
        "predicted for one prompt, 0.001 asked" in row["reason"] for row in found["candidates"]
    )
    found = json.loads(call("tune", "tiny", *words, "--speedup", "50").stdout)
    assert found["chosen"] is None and all("50 asked" in row["reason"] for row in found["candidates"])
    assert found["verdict"].startswith("Nothing qualifies: every candidate was refused or too dear")


@pytest.mark.slow
def test_losses_are_shown_with_both_answers(tmp_path: Path) -> None:
    """Also of questions that times were measured with, which stand in the journal once more without answers."""
    words = (
        "--limit",
        "24",
        "--timing-rounds",
        "3",
        "--batch",
        "12",
        "--methods",
        "random",
        "-b",
        ".06",
        "--out",
        tmp_path,
        "--json",
    )
    found = call("tune", "tiny", *words, "--speedup", "1.01")
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["chosen"] == "random@0.06" and result["lost"]
    assert all(row["question"] and row["full"] and row["reduced"] != row["full"] for row in result["lost"])
    journal = [json.loads(line) for line in (tmp_path / "tiny/journal.jsonl").read_text().splitlines()]
    (timed,) = [line["page"]["questions"] for line in journal if line.get("batch") == "times"]
    assert {int(row["id"].split("/")[1]) for row in result["lost"]} & set(timed)


@pytest.mark.parametrize("file", sorted(RESULTS.glob("tune-*.json")), ids=lambda file: file.stem)
def test_choices_hold_in_the_committed_measurements(file: Path) -> None:
    result = json.loads(file.read_text())
    rows = [row for row in result["repetitions"] if row["chosen"] is not None]
    assert len(result["repetitions"]) == 20 and result["questions"] == 200 and result["fresh"] == 2000
    assert not str(result["environment"]["commit"]).endswith("+changes")
    assert rows and all(row["bound"] >= result["keep"] for row in rows)
    assert sum(row["fresh"]["kept"] < result["keep"] for row in rows) <= 1 and result["hold"] == sum(
        row["holds"] for row in rows
    )


def test_words_for_what_is_near() -> None:
    row: dict[str, Any] = {
        "id": "duet@0.5",
        "method": "duet",
        "budget": 0.5,
        "settings": {"schedule": [[6, 0.5]]},
        "ms": 2.0,
        "kept": 0.995,
    }
    row |= {"testing": {"asked": 149, "lost": 1}, "bound": 0.97, "reason": "lost"}
    asked = {"losses": 0, "testing": 149}
    result: dict[str, Any] = {
        "candidates": [row],
        "chosen": None,
        "goal": {"keep": 0.98, "words": "the goal"},
        "questions": asked,
    }
    assert verdict(result) == (
        "Nothing qualifies for the goal. Nearest is duet@0.5: it kept 99.5% of the answers so far. "
        f"More questions may show that it does: a test of {needed(0.98, 2)} allows 2 losses, this one of 149 allowed 0."
    )
    assert python_line(row) == "handle = duet_vlm.attach(model, 'duet', budget=0.5, schedule=((6, 0.5),))"
    assert (
        shell_line(row, "tiny")
        == "duet-vlm run --model tiny --method duet --budget 0.5 --set 'schedule=((6, 0.5),)' --image FILE --prompt TEXT"
    )
    assert "--video FILE" in shell_line(row, "tiny-video", clips=True)


def candidate(name: str, ms: float, kept: float, choosing: int, testing: int, **more: Any) -> dict[str, Any]:
    method, _, budget = name.partition("@")
    row: dict[str, Any] = {
        "id": name,
        "label": method,
        "method": method,
        "budget": float(budget),
        "settings": {},
        "ms": ms,
        "kept": kept,
    }
    row |= {
        "choosing": {"asked": choosing, "lost": 0},
        "testing": {"asked": testing, "lost": 0},
        "bound": 0.93,
        "reason": "left",
        "speedup": 1.39,
    }
    return row | more


RESULT: dict[str, Any] = {
    "task": "photos", "model": {"name": "tiny"}, "environment": {"device": "cpu", "cpu": "one"}, "full_ms": 66.3, "chosen": "duet@0.22",
    "goal": {"keep": 0.9, "words": "at least 90 % of the right answers kept"}, "questions": {"choosing": 24, "testing": 61, "losses": 1}, "lost": [],
    "candidates": [
        candidate("scope@0.33", 50.0, 1.0, 24, 61), candidate("duet@0.22", 44.0, 0.97, 24, 61, reason=""), candidate("duet@0.06", 31.0, 1.0, 6, 0),
        candidate("scope@0.06", 33.0, 0.99, 24, 16), candidate("visionzip@0.22", 43.5, 0.965, 12, 0), candidate("visionzip@0.33", 43.0, 0.975, 12, 0),
        candidate("duet@0.33", 45.0, 0.96, 24, 61),
    ],
}  # fmt: skip


def test_the_front_of_the_picture_is_of_settings_that_were_asked_as_much() -> None:
    """A setting that answered six questions beats nobody; the chosen one is on the line, which ends at the full model."""
    assert front(RESULT) == [(44.0, 97.0), (50.0, 100.0), (66.3, 100.0)]
    assert front(RESULT | {"candidates": RESULT["candidates"][2:3]}) == []


def test_the_name_of_the_chosen_setting_covers_no_marker(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    pareto(RESULT)
    (figure,), words = figures, []
    figure.draw_without_rendering()
    (axes,) = figure.axes
    (label,) = [text for text in axes.texts if text.get_text() == "duet@0.22"]
    box = label.get_window_extent()
    spots = [axes.transData.transform((row["ms"], 100 * row["kept"])) for row in RESULT["candidates"]]
    assert not any(box.contains(*spot) for spot in spots)
    (legend,) = figure.legends
    words = [text.get_text() for text in legend.get_texts()]
    assert "goal: 90 % kept" in words and not any("0.9" in text for text in words)
    assert legend.get_window_extent().x0 > axes.get_window_extent().x1  # beside the points, not on them


def test_the_verdict_gives_the_ratio_of_the_times_that_it_names() -> None:
    assert verdict(RESULT).startswith("duet@0.22: 1.51 times faster to the first token (44 ms, the full model 66.3 ms)")


def test_settings_in_brackets_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are markup to the library that prints."""
    name = "duet[options.reentry=stage]@0.22"
    found = RESULT | {"chosen": name, "environment": RESULT["environment"] | {"commit": "abc"}}
    found["candidates"] = [
        row | ({"id": name} if row["id"] == RESULT["chosen"] else {}) for row in RESULT["candidates"]
    ]
    tune_verb._write(found, tmp_path, False, "tiny", False)
    shown = capsys.readouterr().out
    assert "".join(shown.split()).count(name) == 2 and f"{name}: 1.51 times faster" in shown


def test_the_table_fits_where_it_is_piped_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    many = [
        candidate(f"duet@0.{place}", 30.0 + place, 0.5, 6, 0, reason="a reason that is long enough " * 4)
        for place in range(10, 40)
    ]
    full = RESULT | {
        "candidates": [*many, *RESULT["candidates"]],
        "environment": RESULT["environment"] | {"commit": "abc"},
    }
    for columns, width in (("72", 72), (None, 100)):
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns:
            monkeypatch.setenv("COLUMNS", columns)
        tune_verb._write(dict(full), tmp_path, False, "tiny", False)
        table, _, _ = capsys.readouterr().out.partition("more left earlier")
        lines = table.splitlines()[:-1]
        assert max(map(len, lines)) <= width and sum("@" in line for line in lines) == 16
        assert all(any(row["id"] in line for line in lines) for row in RESULT["candidates"])
