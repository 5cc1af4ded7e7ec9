"""``duet-vlm generate``: the same answers however many processes there are and wherever they are killed; nothing lost,
nothing repeated."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import finished, kill_rank, launched
from typer.testing import CliRunner

from duet_vlm.cli.eval_jobs import JobOptions
from duet_vlm.cli.main import app
from duet_vlm.evaluation import tiny
from duet_vlm.evaluation.ranks import WorkerRank
from duet_vlm.evaluation.run import devices_of

COUNT, BATCH, MANY = 11, 2, 220


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about drawn pictures; the eighth file is no picture."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for number in range(COUNT):
        item = tiny.sample("test", number, 0)
        file = folder / f"{number}.png"
        item.image.save(file)
        lines.append(json.dumps({"id": f"q{number}", "image": file.name, "question": item.question}))
    (folder / "7.png").write_bytes(b"no picture")
    (folder / "asked.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "asked.jsonl"


def words_of(data: Path, out: Path) -> list[str]:
    return [
        "generate",
        "--data",
        str(data),
        "--out",
        str(out),
        "-b",
        "16",
        "--batch",
        str(BATCH),
        "--max-new-tokens",
        "4",
    ]


def call(data: Path, out: Path, *more: str) -> Any:
    return CliRunner().invoke(app, [*words_of(data, out), *more])


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def recorded(out: Path) -> list[int]:
    """The batches in all journals, as often as they stand there."""
    journals = Path(f"{out}.parts").glob("*.jsonl")
    return sorted(
        int(json.loads(line)["batch"]) for journal in journals for line in journal.read_text().splitlines()[1:]
    )


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("alone") / "answers.jsonl"
    done = call(data, out)
    assert done.exit_code == 0 and f"written: {out} ({COUNT} answers)" in done.output
    return rows(out)


def test_answers_stand_in_the_order_of_the_prompts_and_an_unreadable_picture_costs_its_own_line(
    alone: list[dict[str, Any]],
) -> None:
    assert [row["id"] for row in alone] == [f"q{number}" for number in range(COUNT)]
    assert "7.png" in alone[7]["error"] and "answer" not in alone[7]
    right = [row.get("answer") == tiny.sample("test", number, 0).answer for number, row in enumerate(alone)]
    assert sum(right) >= COUNT // 2 and all("answer" in row for number, row in enumerate(alone) if number != 7)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_any_number_of_processes_answers_alike(
    data: Path, tmp_path: Path, alone: list[dict[str, Any]], as_rank: Callable[[int, int], None], world: int
) -> None:
    out = tmp_path / "answers.jsonl"
    for rank in reversed(range(world)):
        assert not out.exists()
        as_rank(rank, world)
        assert call(data, out).exit_code == 0
    assert rows(out) == alone and recorded(out) == list(range(6))


@pytest.mark.parametrize("again", [1, 2, 3])
def test_a_killed_rank_is_made_up_for_by_the_next_start(
    data: Path,
    tmp_path: Path,
    alone: list[dict[str, Any]],
    as_rank: Callable[[int, int], None],
    killed: list[int],
    again: int,
) -> None:
    """Three ranks, of which the first dies; then as many as there are. No batch is answered twice."""
    out = tmp_path / "answers.jsonl"
    as_rank(0, 3)
    assert call(data, out).exit_code == 130
    killed.clear()
    for rank in (1, 2):
        as_rank(rank, 3)
        assert call(data, out).exit_code == 0 and not out.exists()
    assert len(recorded_whole(out)) == 5
    for rank in range(again):
        as_rank(rank, again)
        assert call(data, out).exit_code == 0
    assert rows(out) == alone and sorted(recorded_whole(out)) == list(range(6))


def recorded_whole(out: Path) -> list[int]:
    """As ``recorded``, but half lines are none."""
    found = []
    for journal in Path(f"{out}.parts").glob("*.jsonl"):
        text = journal.read_text()
        found += [int(json.loads(line)["batch"]) for line in text[: text.rfind("\n") + 1].splitlines()[1:]]
    return found


def test_a_finished_file_is_not_asked_again_and_other_settings_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "answers.jsonl"
    assert call(data, out).exit_code == 0
    before = recorded(out)
    out.unlink()
    assert call(data, out).exit_code == 0 and out.exists() and recorded(out) == before
    other = call(data, out, "--set", "cluster_width=5")
    assert other.exit_code == 2 and "different reduction" in other.stderr
    assert call(data, out, "--set", "cluster_width=5", "--restart").exit_code == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "remove" in call(data, out, "--restart").stderr


@pytest.mark.slow  # the default tier has the test below, whose second start is one that nobody kills
@pytest.mark.parametrize("world", [2, 3])
def test_under_accelerate(data: Path, tmp_path: Path, alone: list[dict[str, Any]], world: int) -> None:
    pytest.importorskip("accelerate")
    out = tmp_path / "answers.jsonl"
    code, said = finished(launched(world, *words_of(data, out)))
    assert code == 0, said[-3000:]
    assert (
        rows(out) == alone
        and recorded(out) == list(range(6))
        and len(list(Path(f"{out}.parts").glob("*.jsonl"))) == world
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "again"), [(2, 2), pytest.param(3, 2, marks=pytest.mark.slow), pytest.param(2, 3, marks=pytest.mark.slow)]
)
def test_a_rank_that_is_killed_under_accelerate(data: Path, tmp_path: Path, world: int, again: int) -> None:
    """SIGKILL to the last rank in mid-run: the launcher gives up, and the next start asks only what nobody had
    recorded."""
    pytest.importorskip("accelerate")
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    many = [
        line | {"id": f"{line['id']} {turn}", "image": str(data.parent / line["image"])}
        for turn in range(MANY // COUNT)
        for line in lines
    ]
    asked, out, whole = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl", tmp_path / "whole.jsonl"
    asked.write_text("".join(json.dumps(line) + "\n" for line in many))
    process = launched(world, *words_of(asked, out))
    code, said = kill_rank(process, Path(f"{out}.parts/{world - 1}.jsonl"), 3)
    assert code != 0 and "SIGKILL" in said, said[-3000:]
    before = recorded_whole(out)
    assert not out.exists() and 2 <= len(before) < MANY // BATCH
    code, said = finished(launched(again, *words_of(asked, out)))
    assert code == 0, said[-3000:]
    after = recorded_whole(out)
    assert sorted(after) == list(range(MANY // BATCH)) and not Counter(before) - Counter(after)
    assert (
        call(asked, whole).exit_code == 0
        and rows(out) == rows(whole)
        and [row["id"] for row in rows(out)] == [line["id"] for line in many]
    )


def test_a_folder_of_pictures_and_one_question(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    assert call(data.parent, out, "--prompt", "how many circles are there ?").exit_code == 0
    found = {row["id"]: row for row in rows(out)}
    assert list(found) == sorted(f"{number}.png" for number in range(COUNT)) and "error" in found["7.png"]


@pytest.mark.parametrize(
    ("make", "more", "says"),
    [
        (lambda folder: folder / "none.jsonl", [], "give a folder of pictures or a .jsonl file"),
        (lambda folder: folder, [], "needs --prompt"),
        (lambda folder: folder, ["--prompt", "what ?"], "no pictures in this folder"),
        (lambda folder: _written(folder, "{}\n"), [], "line 1: needs image and question"),
        (lambda folder: _written(folder, ""), [], "no questions in it"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    tmp_path: Path, make: Callable[[Path], Path], more: list[str], says: str
) -> None:
    done = call(make(tmp_path), tmp_path / "out" / "answers.jsonl", *more)
    assert done.exit_code == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


def _written(folder: Path, text: str) -> Path:
    (folder / "asked.jsonl").write_text(text)
    return folder / "asked.jsonl"


def test_an_evaluation_takes_all_gpus_of_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices_of(None, 3, 2) == devices_of("cuda", 3, 2) == ["cuda:0", "cuda:1", "cuda:0"]
    assert (
        devices_of("cuda:1", 2, 2) == ["cuda:1"] * 2
        and devices_of("cpu", 2, 2) == ["cpu"] * 2
        and devices_of(None, 2, 0) == [None] * 2
    )
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for asked, where, workers in ((None, "cuda", 4), ("cuda:2", "cuda:2", 1), ("cpu", "cpu", os.cpu_count())):
        monkeypatch.setattr("duet_vlm.api.loading.device_for", lambda device, where=where: where)
        assert JobOptions.checked(tmp_path, False, None, 0, asked, True).workers == workers
    assert JobOptions.checked(tmp_path, False, 3, 0, None, True).workers == 3


def test_each_process_of_a_machine_has_a_gpu_of_its_own() -> None:
    found = [WorkerRank(rank, 6, rank % 3).device(None, 2) for rank in range(6)]
    assert found == ["cuda:0", "cuda:1", "cuda:0", "cuda:0", "cuda:1", "cuda:0"]
    assert WorkerRank(1, 2, 1).device("cuda", 2) == "cuda:1" and WorkerRank(1, 2, 1).device("cuda:0", 2) == "cuda:0"
    assert (
        WorkerRank(1, 2, 1).device("cpu", 2) == "cpu"
        and WorkerRank(1, 2, 1).device(None, 0) is None
        and WorkerRank().device(None, 4) is None
    )
    assert (
        WorkerRank.here({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == WorkerRank(3, 4, 1)
        and WorkerRank.here({}) == WorkerRank()
    )
    for wrong in ({"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "-1", "WORLD_SIZE": "4"}, {"WORLD_SIZE": "many"}):
        with pytest.raises(ValueError, match="RANK=.*WORLD_SIZE=.*from 0 to WORLD_SIZE - 1"):
            WorkerRank.here(wrong)


# ---- prompts and pictures that change meanwhile


def bitmaps(folder: Path, first: int = 0) -> Path:
    """Six pictures, which are of one size in bytes whatever they show."""
    folder.mkdir(exist_ok=True)
    for number in range(6):
        tiny.sample("test", first + number, 5).image.save(folder / f"{number}.bmp")
    return folder


@pytest.mark.parametrize("kind", ["folder", "lines"])
def test_answers_do_not_mix_pictures_of_two_times(kind: str, tmp_path: Path, killed: list[int]) -> None:
    folder, out = bitmaps(tmp_path / "data"), tmp_path / "answers.jsonl"
    lines = [{"image": f"data/{number}.bmp", "question": "what is this ?"} for number in range(6)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data, more = (folder, ["--prompt", "what is this ?"]) if kind == "folder" else (tmp_path / "asked.jsonl", [])
    assert call(data, out, *more).exit_code == 130
    killed.clear()
    bitmaps(folder, first=50)
    for _ in range(2):
        refused = call(data, out, *more)
        assert (
            refused.exit_code == 2
            and "different contents of questions and pictures" in refused.stderr
            and not out.exists()
        )
    bitmaps(folder)
    assert call(data, out, *more).exit_code == 0 and len(rows(out)) == 6
    bitmaps(folder, first=50)
    assert "different contents" in call(data, out, *more).stderr  # it is finished, with what was there
    assert call(data, out, *more, "--restart").exit_code == 0
