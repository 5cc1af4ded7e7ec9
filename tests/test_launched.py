"""``duet-vlm eval`` among processes of a launcher, and with worker processes: one result, that of one process, whoever
is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import finished, kill_rank, launched
from typer.testing import CliRunner

from duet_vlm.api.loading import LoadedModel
from duet_vlm.cli.main import app
from duet_vlm.evaluation import run, tiny
from duet_vlm.evaluation.experiment import Experiment
from duet_vlm.evaluation.journal import Journal, alone
from duet_vlm.evaluation.results import load, unpack
from duet_vlm.evaluation.run import run_experiment

LIMIT, BATCH, BATCHES = 14, 4, 4


def words_of(out: Path, limit: int = LIMIT) -> list[str]:
    words = ["eval", "--methods", "duet", "-b", "0.11", "--seeds", "3", "--limit", str(limit), "--batch", str(BATCH)]
    return [*words, "--timing-rounds", "0", "--device", "cpu", "--out", str(out)]


def call(out: Path, *more: str, limit: int = LIMIT) -> Any:
    return CliRunner().invoke(app, [*words_of(out, limit), *more])


def result_of(out: Path) -> Path:
    return out / "tiny/results/eval.json"


def journals(out: Path) -> list[Path]:
    return sorted((out / "tiny/results/eval.parts").glob("*.jsonl"))


def batches(out: Path) -> list[str]:
    """Those that stand whole in all journals, as often as they do."""
    found = []
    for journal in journals(out):
        text = journal.read_text()
        found += [json.loads(line)["batch"] for line in text[: text.rfind("\n") + 1].splitlines()[1:]]
    return sorted(found)


def told(path: Path) -> dict[str, Any]:
    """A result without what depends on the machine and the day."""
    found = load(path)
    return {key: value for key, value in found.items() if key not in ("environment", "predictions")} | {
        "answers": unpack(found)
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("whole")
    assert call(out, "--workers", "1").exit_code == 0
    return told(result_of(out))


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Batches that are recorded, by whichever process."""
    real, found = Journal.add, []

    def add(self: Any, batch: str, page: dict[str, Any]) -> None:
        real(self, batch, page)
        found.append(batch)

    monkeypatch.setattr(Journal, "add", add)
    return found


@pytest.mark.parametrize("world", [2, 5])
def test_any_number_of_processes_measures_alike(
    tmp_path: Path, whole: dict[str, Any], added: list[str], as_rank: Callable[[int, int], None], world: int
) -> None:
    for rank in reversed(range(world)):
        assert not result_of(tmp_path).exists()
        as_rank(rank, world)
        done = call(tmp_path)
        assert (
            done.exit_code == 0
            and (f"written: {result_of(tmp_path)}" if rank == 0 else f"rank {rank} of {world} is done") in done.output
        )
    assert told(result_of(tmp_path)) == whole and load(result_of(tmp_path))["environment"]["workers"] == world
    assert len(added) == len(set(added)) == BATCHES
    assert [file.name for file in result_of(tmp_path).parent.iterdir()] == ["eval.json"]
    again = call(tmp_path, "--json")
    assert (
        again.exit_code == 0
        and json.loads(again.stdout)["results"][0]["file"] == str(result_of(tmp_path))
        and len(added) == BATCHES
    )


@pytest.mark.parametrize("again", [1, 3])
def test_a_killed_rank_is_made_up_for_by_the_next_start(
    tmp_path: Path,
    whole: dict[str, Any],
    added: list[str],
    killed: list[int],
    as_rank: Callable[[int, int], None],
    again: int,
) -> None:
    """Three ranks, of which the first dies; then as many as there are. No batch is asked twice."""
    as_rank(0, 3)
    assert call(tmp_path).exit_code == 130
    killed.clear()
    for rank in (1, 2):
        as_rank(rank, 3)
        assert call(tmp_path).exit_code == 0 and not result_of(tmp_path).exists()
    assert len(batches(tmp_path)) == BATCHES - 1
    for rank in range(again):
        as_rank(rank, again)
        assert call(tmp_path, "--workers", "1").exit_code == 0
    assert told(result_of(tmp_path)) == whole and len(added) == len(set(added)) == BATCHES


def test_json_of_a_process_that_is_not_the_last(tmp_path: Path, as_rank: Callable[[int, int], None]) -> None:
    as_rank(1, 2)
    done = call(tmp_path, "--json", limit=6)
    assert done.exit_code == 0 and json.loads(done.stdout) == {"results": []}


def test_processes_that_measure_something_else_are_refused(tmp_path: Path, as_rank: Callable[[int, int], None]) -> None:
    as_rank(0, 2)
    assert call(tmp_path, limit=6).exit_code == 0
    as_rank(1, 2)
    other = call(tmp_path, limit=7)
    assert (
        other.exit_code == 2
        and "0.jsonl: holds the beginning of another measurement (different questions)" in other.stderr
    )
    assert not result_of(tmp_path).exists()


def test_one_process_writes_the_result(tmp_path: Path, as_rank: Callable[[int, int], None], added: list[str]) -> None:
    """Two find everything answered at once: the second leaves the timing and the file to the first."""
    place = result_of(tmp_path).parent / "eval.parts" / "result"
    as_rank(1, 2)
    assert call(tmp_path, limit=6).exit_code == 0
    as_rank(0, 2)
    with alone(place):
        done = call(tmp_path, limit=6)
        assert done.exit_code == 0 and "rank 0 of 2 is done" in done.stderr and not result_of(tmp_path).exists()
    as_rank(1, 2)  # as after the first was killed in the middle of it
    assert call(tmp_path, limit=6).exit_code == 0 and result_of(tmp_path).exists() and len(added) == 2


def test_a_process_that_comes_late_asks_nothing(
    tmp_path: Path, as_rank: Callable[[int, int], None], added: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others write the result and remove the journals while it loads its model."""
    as_rank(0, 2)
    assert call(tmp_path / "other", limit=6).exit_code == 0
    as_rank(1, 2)
    assert call(tmp_path / "other", limit=6).exit_code == 0
    real = run.load

    def slow(*given: Any) -> LoadedModel:
        result_of(tmp_path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(result_of(tmp_path / "other"), result_of(tmp_path))
        shutil.rmtree(result_of(tmp_path).parent / "eval.parts")
        return real(*given)

    monkeypatch.setattr(run, "load", slow)
    done = call(tmp_path, limit=6)
    assert done.exit_code == 0 and "finished already" in done.output and len(added) == 2
    assert [file.name for file in result_of(tmp_path).parent.iterdir()] == ["eval.json"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["eval", "--workers", "2"], "--workers 2: a launcher has started 3 processes"),
        (["eval", "--restart"], "--restart: 3 processes would delete each other's answers; remove"),
        (["tune", "tiny"], "WORLD_SIZE=3: the steps of duet-vlm tune depend on each other"),
        (["drop-curve"], "WORLD_SIZE=3: the steps of duet-vlm drop-curve depend on each other"),
    ],
)
def test_what_a_launcher_cannot_share_is_refused(
    words: list[str], says: str, tmp_path: Path, as_rank: Callable[[int, int], None]
) -> None:
    as_rank(1, 3)
    found = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert (
        found.exit_code == 2
        and says in found.stderr
        and found.stderr.count("\n") == 1
        and not (tmp_path / "out").exists()
    )


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is refused there, and nothing fails."""

    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("duet_vlm.evaluation.journal.fcntl.flock", no_locks)
    with alone(tmp_path / "new" / "0.jsonl"), alone(tmp_path / "new" / "0.jsonl"):
        pass
    assert not list((tmp_path / "new").iterdir())


# ---- under accelerate


# the default tier kills a rank of duet-vlm generate, which shares its work in the same way (test_generate.py)
@pytest.mark.slow
@pytest.mark.parametrize(("world", "again"), [(2, 2), (3, 2), (2, 3)])
def test_a_rank_that_is_killed_under_accelerate(tmp_path: Path, world: int, again: int) -> None:
    """SIGKILL to the last rank in mid-run: the launcher gives up, and the next start asks only what nobody had
    recorded."""
    pytest.importorskip("accelerate")
    limit, out = 80, tmp_path / "shared"
    parts = result_of(out).parent / "eval.parts"
    code, said = kill_rank(launched(world, *words_of(out, limit)), parts / f"{world - 1}.jsonl", 3)
    assert code != 0 and "SIGKILL" in said, said[-3000:]
    before = {journal.name: journal.read_text() for journal in journals(out)}
    known = batches(out)
    assert (
        len(before) == world
        and len(set(known)) == len(known)
        and 2 <= len(known) < limit // BATCH
        and not result_of(out).exists()
    )
    kept = tmp_path / "kept"
    shutil.copytree(parts, kept)
    code, said = finished(launched(again, *words_of(out, limit)))
    assert code == 0, said[-3000:]
    whole = tmp_path / "whole"
    assert call(whole, "--workers", "1", limit=limit).exit_code == 0 and told(result_of(out)) == told(result_of(whole))
    assert [file.name for file in result_of(out).parent.iterdir()] == ["eval.json"]
    asked = sum(int(total) - int(done) for done, total in first_lines(said))
    assert asked == limit // BATCH - len(known)  # nothing was asked again


def first_lines(said: str) -> list[list[str]]:
    """Done and all batches, as each rank says them when it begins."""
    found: dict[str, list[str]] = {}
    for line in said.splitlines():
        if line.startswith("rank ") and " batches of tiny" in line:
            who, _, what = line.partition(": ")
            found.setdefault(who, [what.split()[0], what.split()[2]])
    return list(found.values())


# ---- worker processes


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_a_killed_worker_ends_the_command_and_the_next_goes_on(tmp_path: Path) -> None:
    """It says what died, that answers are kept and how to go on; so it does where the other worker has work for hours."""
    limit, out = 40, tmp_path / "killed"
    command = [sys.executable, "-m", "duet_vlm.cli.main", *words_of(out, limit), "--workers", "2"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        deadline = time.monotonic() + 120
        while not (len(batches(out)) >= 2 and len(workers_of(process.pid)) == 2):
            assert process.poll() is None and time.monotonic() < deadline, "the workers never began"
            time.sleep(0.01)
        victim, other = workers_of(process.pid)
        os.kill(victim, signal.SIGKILL)
        said = process.communicate(timeout=120)[1]
    error = said.splitlines()[-1]
    assert (
        process.returncode == 2
        and f"of 2 on cpu (process {victim}) was killed by SIGKILL" in error
        and "Traceback" not in said
    ), said
    assert (
        f"finished answers are kept in {journals(out)[0].parent}: give the same command again" in error
        and "fewer --workers" in error
    )
    assert not Path(f"/proc/{other}").exists() and not result_of(out).exists()
    known = batches(out)
    assert 2 <= len(known) < limit // BATCH and len(set(known)) == len(known)
    again = call(out, "--workers", "1", limit=limit)
    assert again.exit_code == 0
    assert call(tmp_path / "whole", "--workers", "1", limit=limit).exit_code == 0
    assert told(result_of(out)) == told(result_of(tmp_path / "whole"))


def workers_of(process: int) -> list[int]:
    """Its children that work."""
    found = []
    for thread in Path(f"/proc/{process}/task").glob("*/children"):
        for child in thread.read_text().split():
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return sorted(found)


def test_workers_have_the_gpus_of_the_machine_to_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    """Three GPUs that are not there: each worker is told one, and this process's model is on none of them meanwhile."""
    loaded, seen = LoadedModel("tiny", *tiny.load()), []

    def start(work: Any, places: Any, kept: str, watch: Any) -> None:
        seen.append(places)

    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr(run, "load", lambda name, device: loaded)
    monkeypatch.setattr(run, "start", start)
    job = Experiment("tiny", ({"method": "uniform", "budgets": [0.11]},), limit=10, batch=2, against="uniform")
    for device, workers, places in (
        ("cuda", 3, ["cuda:0", "cuda:1", "cuda:2"]),
        (None, 4, ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]),
    ):
        # what none of them has recorded is left to this process
        found = run_experiment(job, "eval", tmp_path / str(workers), device=device, workers=workers, timing_rounds=0)
        assert seen.pop() == places and found["questions"]["count"] == 10
    moved: list[str] = []
    model: Any = SimpleNamespace(
        parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda:0"))]),
        to=lambda where: moved.append(str(where)),
    )
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: moved.append("emptied"))
    with run._aside(LoadedModel("large", model, None)):
        assert moved == ["cpu", "emptied"]
    assert moved == ["cpu", "emptied", "cuda:0"]
