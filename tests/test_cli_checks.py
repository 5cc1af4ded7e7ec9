"""What is known to be wrong without a model is said before torch is imported; what a newcomer types first is answered
in the words of the shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from string import Template
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from duet_vlm.cli import options, viz
from duet_vlm.cli.main import LINES, app
from duet_vlm.reducers import method_files, registry

SRC = Path(__file__).resolve().parent.parent / "src"
PICTURE = SRC / "duet_vlm/evaluation/tiny/demo/scene_1.png"
ASK = ["-i", str(PICTURE), "-p", "What shape is the yellow object?"]
MINE = Template((SRC / "duet_vlm/cli/skeletons/entry.txt").read_text()).substitute(
    name="first_rows", title="FirstRows", paper="nowhere"
)
BLOCKED = """
import sys
from typer.testing import CliRunner

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "gradio"):
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Blocked())
from duet_vlm.cli.main import app
import json
for words in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, words)
    print(json.dumps([result.exit_code, result.stderr, repr(result.exception)]))
"""


def call(*words: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def without_torch(lines: list[list[str]], cwd: Path, **more: str) -> list[tuple[int, str]]:
    """Exit code and stderr of each command line, in one process that cannot import torch."""
    place = {"PYTHONPATH": str(SRC), "HF_HUB_OFFLINE": "1"} | more
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, json.dumps(lines)],
        cwd=cwd,
        env=os.environ | place,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [row for row in found if "is imported" in row[1] + row[2]], found
    return [(code, said) for code, said, _ in found]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the wrong command lines below name."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "half.json").write_text('{"method": "duet", "budget": 64}')
    (tmp_path / "number.json").write_text('{"method": 3, "budget": 64, "settings": {}}')
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "nothing.py").write_text("x = 1\n")
    (tmp_path / "two.py").write_text('@register("one")\nclass A: ...\n@register("two")\nclass B: ...\n')
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos/a.png")
    (tmp_path / "file").touch()
    return tmp_path


WRONG: list[tuple[list[str], str]] = [
    (["run", *ASK[:2], "-p", " ", "-b", "64"], "--prompt is empty: write a question"),
    (["viz", *ASK[:2], "-p", "", "-b", "64"], "--prompt is empty: write a question"),
    (["generate", "--data", "photos", "-o", "o.jsonl", "-p", "", "-b", "64"], "--prompt is empty: write a question"),
    (
        ["run", *ASK, "-b", "200%"],
        "--budget 200%: a fraction of the visual tokens is above 0 % and up to 100 %, which is all of them",
    ),
    (
        ["bench", "-b", "1.5"],
        "--budget 1.5: a fraction of the visual tokens is above 0 and up to 1.0, which is all of them; for a token count",
    ),
    (["run", *ASK, "-b", "-3"], "--budget -3: keep at least 1 token, or a share of them (0.22, 22%)"),
    (["run", *ASK, "-b", "64", "-m", "wrongmodel"], "--model wrongmodel: no such folder"),
    (["run", *ASK, "-b", "64", "-m", "bert"], "--model bert (model_type='bert') is not supported"),
    (["run", *ASK, "-b", "64", "-m", "empty"], "--model empty: this folder has no config.json"),
    (["bench", "-m", "wrongmodel"], "--model wrongmodel: no such folder"),
    (["bench", "--dtype", "fp8"], "--dtype fp8: choose one of fp32, bf16, fp16"),
    (["eval", "-m", "wrongmodel"], "--model wrongmodel: no such folder"),
    (["eval", "--tasks", "empty.jsonl"], "empty.jsonl: no questions in it"),
    (["tune", "photos", "-p", "x", "--keep", "2"], "--keep 2: give a share from 0.5 to below 1"),
    (["tune", "photos", "-p", "x", "-m", "wrongmodel"], "--model wrongmodel: no such folder"),
    (["tune", "photos", "-p", "x", "-b", "300%"], "--budget 300%: a fraction"),
    (["tune", "empty", "-p", "x"], "empty: no pictures or clips in it"),
    (["generate", "--data", "empty.jsonl", "-o", "o.jsonl", "-b", "64"], "empty.jsonl: no questions in it"),
    (
        ["generate", "--data", "empty", "-o", "o.jsonl", "-p", "x", "-b", "64"],
        "--data empty: no pictures in this folder",
    ),
    (["drop-curve", "--layers", "99"], "--layers 99: the decoder has 12 layers: give numbers from 1 to 11"),
    (["drop-curve", "-m", "wrongmodel"], "--model wrongmodel: no such folder"),
    (["drop-curve", "--task", "empty.jsonl"], "empty.jsonl: no questions in it"),
    (["train"], "--data: nothing to train on: name JSON files of conversations, or 'tiny'"),
    (["train", "--data", "tiny", "--limit", "4", "-m", "wrongmodel"], "--model wrongmodel: no such folder"),
    (
        ["train", "--data", "tiny", "--limit", "4", "--tune", "all"],
        "--tune: 'all': choose one of full, lora, projector",
    ),
    (["app", "-m", "wrongmodel", "--port", "7861"], "--model wrongmodel: no such folder"),
    (
        ["run", *ASK, "--method", "half.json"],
        "half.json: holds no reduction: 'settings' missing; it is an object with method, budget and settings",
    ),
    (
        ["run", *ASK, "--method", "number.json"],
        "number.json: holds no reduction: 'method' is 3; it is an object with method, budget and settings",
    ),
    (
        ["run", *ASK, "-b", "64", "--method", "./gone.py"],
        "--method gone.py: no such file; give a .py file that registers a method",
    ),
    (["run", *ASK, "-b", "64", "--method", "./broken.py"], "--method broken.py, line 1: "),
    (
        ["run", *ASK, "-b", "64", "--method", "./nothing.py"],
        "--method nothing.py: registers no method: write @duet_vlm.register",
    ),
    (["eval", "--methods", "./two.py"], "--method ./two.py: two.py registers one, two; say which one: two.py:one"),
    (["viz", *ASK, "-b", "64", "-o", "file"], "--out file: is a file; give a folder"),
    (
        ["run", *ASK, "-b", "64", "--method", "dust"],
        "unknown method 'dust' (did you mean 'duet', 'custom' or 'dart'?); 'duet-vlm methods' lists",
    ),
    (["run", *ASK, "-b", "64", "--method", "zzz"], "unknown method 'zzz'; 'duet-vlm methods' lists those there are"),
    (["run", *ASK, "--preset", "duet-65"], "unknown preset 'duet-65' (did you mean 'duet-64'"),
]
# what only the method itself knows: it is asked before a model is loaded
OF_THE_METHOD: list[tuple[list[str], str]] = [
    (
        ["viz", *ASK],
        "--budget: duet needs a budget (64 tokens, 0.22 or 22% of them), or settings of its own with --set; 'duet-vlm methods duet'",
    ),
    (["budget", "--method", "visionzip"], "--budget: visionzip needs a budget"),
    (["generate", "--data", "photos", "-o", "o.jsonl", "-p", "x"], "--budget: duet needs a budget"),
    (
        ["run", *ASK, "--set", "dominant=lots"],
        "dominant must be an int (tokens) or a float in [0, 1] (fraction), got 'lots'",
    ),
    (["run", *ASK, "-b", "64", "--set", "colour=3"], "duet has no setting 'colour'; its settings: options, "),
    (
        ["run", *ASK, "-b", "64", "--set", "options.small_image_tokens=1.5"],
        "small_image_tokens=1.5: give a whole number (int)",
    ),
    (["eval", "--methods", "duet[colour=3]"], "duet has no setting 'colour'"),
    (["calibrate", "duet", "-o", "x"], "duet is not calibrated to a model; methods that are: d2pruner, fitprune"),
    (["run", *ASK, "--method", "frames+duet", "-b", "64", "--set", "duet_colour=3"], "frames+duet has no setting"),
    (["calibrate", "fitprune", "-o", "x", *ASK[:2], "-m", "wrongmodel"], "--model wrongmodel: no such folder"),
]


def test_bad_input_is_answered_without_torch(folder: Path) -> None:
    """Every line is refused by one sentence, in a process that cannot import torch, transformers or Gradio."""
    found = without_torch([words for words, _ in WRONG], folder)
    assert len(found) == len(WRONG)
    for (words, expected), (code, said) in zip(WRONG, found, strict=True):
        assert code == 2 and said.startswith(f"error: {expected}") and said.count("\n") == 1, (words, said)


@pytest.mark.slow
def test_bad_input_is_answered_in_a_second(tmp_path: Path) -> None:
    """The whole process; the best of three, as the machine may have other work."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        command = [sys.executable, "-m", "duet_vlm", "drop-curve", "--layers", "99"]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(SRC)}, capture_output=True)
        taken.append(time.perf_counter() - start)
        assert done.returncode == 2
    assert min(taken) < 2, taken  # a second where nothing else runs; torch alone takes several


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://none.invalid"])
def test_a_hub_that_cannot_be_reached_is_said_at_once(endpoint: str, tmp_path: Path) -> None:
    """The hub's own client asks five times and tells of each."""
    more = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)} | {
        f"{kind}_proxy": "" for kind in ("http", "https", "all")
    }
    more |= {name.upper(): "" for name in ("http_proxy", "https_proxy", "all_proxy")}
    start = time.perf_counter()
    ((code, said),) = without_torch([["run", *ASK, "-b", "64", "-m", "gpt-9/none"]], tmp_path, **more)
    assert time.perf_counter() - start < 10
    assert (
        code == 2
        and said.startswith("error: --model gpt-9/none: is not on this machine, and ")
        and "cannot be reached" in said
    )
    assert said.count("\n") == 1


@pytest.mark.parametrize(("words", "expected"), OF_THE_METHOD)
def test_methods_are_asked_before_a_model_is_loaded(
    words: list[str], expected: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for place in ("duet_vlm.api.loading.load", "duet_vlm.cli.run.load", "duet_vlm.cli.viz.load"):
        monkeypatch.setattr(place, lambda *_: pytest.fail("a model is loaded"), raising=False)
    said = call(*words, code=2).stderr
    assert said.startswith(f"error: {expected}") and said.count("\n") == 1


# ---- the first answer


def test_run_keeps_22_percent_where_nobody_says_how_many() -> None:
    result = call("run", *ASK, "--json")
    report = json.loads(result.stdout)["report"]
    assert report["budget"] == 0.22 and result.stderr == "no --budget: 22% of the visual tokens are kept\n"
    # nothing is put in place of what is said
    for own in (["--set", "dominant=64"], ["--preset", "visionzip-64"], ["--method", "fastv"]):
        result = call("run", *ASK, "--json", *own)
        assert json.loads(result.stdout)["report"]["budget"] is None and "no --budget" not in result.stderr


NEEDY = (
    "visionzip+fastv",
    "contrast+visionzip+fastv",
    "frames+fastv",
    "visionzip+pyramiddrop",
    "frames+duet",
    "{mine}",
    "{mine}+fastv",
)


@pytest.mark.parametrize("method", NEEDY)
def test_run_keeps_22_percent_in_compositions_and_files_too(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stage may run by its own settings where another one cannot."""
    import duet_vlm

    monkeypatch.setenv(method_files.VARIABLE, "")
    monkeypatch.setattr(registry, "_methods", duet_vlm.list_methods())  # the file's is gone after the test
    (tmp_path / "mine.py").write_text(MINE)
    result = call("run", *ASK, "--json", "--method", method.format(mine=tmp_path / "mine.py"))
    report = json.loads(result.stdout)["report"]
    assert report["budget"] == 0.22 and result.stderr == "no --budget: 22% of the visual tokens are kept\n"
    assert report["method"] == method.format(mine="first_rows")


@pytest.mark.parametrize(
    "own", ["contrast+fastv", "visionzip+fastv --set visionzip_dominant=40", "frames+fastv --set frames_keep=0.5"]
)
def test_settings_of_a_composition_stand_for_a_budget(own: str) -> None:
    result = call("run", *ASK, "--json", "--method", *own.split())
    assert json.loads(result.stdout)["report"]["budget"] is None and "no --budget" not in result.stderr


@pytest.mark.parametrize("verb", [["run", *ASK], ["budget"]])
def test_a_budget_above_all_tokens_is_said_to_keep_them(verb: list[str]) -> None:
    said = (
        "warning: --budget 99999: the picture or clip has 256 visual tokens, so all are kept and nothing is reduced\n"
    )
    assert call(*verb, "-b", "99999").stderr == said
    assert call(*verb, "-b", "255").stderr == ""


@pytest.mark.slow
def test_a_method_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a method is taken, in a process of its own and in its workers."""
    (tmp_path / "mine.py").write_text(MINE)
    place = {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def shell(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "duet_vlm", *words],
            cwd=tmp_path,
            env=os.environ | place,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    report = json.loads(shell("run", *ASK, "-b", "64", "--method", "./mine.py:first_rows+fastv", "--json"))["report"]
    assert report["method"] == "first_rows+fastv"
    small = ("-b", "0.25", "--limit", "4", "--timing-rounds", "0", "--workers", "2", "--device", "cpu", "--json")
    said = shell("eval", "--methods", "./mine.py,uniform", *small)
    runs = json.loads(said)["results"][0]["runs"]
    assert [run["method"] for run in runs] == ["none", "first_rows", "uniform"] and all(
        run["status"] == "ok" for run in runs
    )
    monkeypatch.setenv(method_files.VARIABLE, "")
    monkeypatch.chdir(tmp_path)
    beside = viz.beside(options.Reduction(None, "duet", 64, {}), "./mine.py@0.5")
    assert (beside.method, beside.budget) == ("first_rows", 0.5) and method_files.files() == [tmp_path / "mine.py"]


@pytest.mark.slow
def test_a_file_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        'import no_such_module\nimport duet_vlm\n\n@duet_vlm.register("bad")\nclass Bad: ...\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "duet_vlm", "run", *ASK, "-b", "64", "--method", "./bad.py"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(SRC), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert (
        done.returncode == 2
        and "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'" in done.stderr
    )


def test_texts_of_strangers_import_nothing(tmp_path: Path) -> None:
    """Only the command line names files: the package and its page take names."""
    import duet_vlm

    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'written')!r}, 'w')\n" + MINE)
    with pytest.raises(ValueError, match="unknown method"):
        duet_vlm.get_method(str(tmp_path / "evil.py"))
    assert not (tmp_path / "written").exists()


# ---- help, interruption, words


def test_the_list_of_verbs_is_grouped_and_fits() -> None:
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80", "TERM": "dumb"})
    shown = result.output
    assert max(map(len, shown.splitlines())) <= 80 and "..." not in shown.split("[ARGS]...")[1]
    assert list(LINES) == ["Use", "Choose", "Measure", "Research", "Serve"]
    places = [shown.index(f"─ {panel} ─") for panel in LINES]
    assert places == sorted(places)
    for start, verbs in zip(places, LINES.values(), strict=True):
        block = shown[start:].split("╰")[0]
        rows = [line.strip("│ ").split(None, 1) for line in block.splitlines()[1:] if line.startswith("│")]
        assert [tuple(row) for row in rows] == [(name, line) for name, (_, line) in verbs.items()]  # one line each


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        (["eval", "--limit", "2"], "interrupted: the same command goes on where it stopped"),
        (["drop-curve"], "interrupted: the same command goes on where it stopped"),
        (
            ["generate", "--data", "gone", "-o", "x", "-b", "64"],
            "interrupted: the same command goes on where it stopped",
        ),
        (["methods"], "interrupted"),
    ],
)
def test_ctrl_c_says_what_the_same_command_does(verb: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for place in ("eval.check_model", "drop_curve.check_model", "options.check_model", "methods.chosen"):
        monkeypatch.setattr(f"duet_vlm.cli.{place}", pressed)
    assert call(*verb, code=130).stderr.strip() == said


def test_ctrl_c_ends_the_page_in_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("duet_vlm.app.serve")
    from duet_vlm.app import serve

    closed: list[bool] = []

    class Gone:
        def wait(self) -> None:
            raise KeyboardInterrupt

    class Page:
        blocks: Any

        def __init__(self, *_: Any) -> None:
            self.blocks = self

        def queue(self, **_: Any) -> None: ...

        def launch(self, **_: Any) -> tuple[None, str, None]:
            return None, "http://127.0.0.1:1", None

        def close(self, verbose: bool) -> None:
            closed.append(verbose)

    fake = type(sys)("duet_vlm.app.page")
    fake.CSS, fake.WAITING, fake.AppPage, fake.theme = "", 1, Page, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "duet_vlm.app.page", fake)
    monkeypatch.setattr(serve, "threading", SimpleNamespace(Event=Gone))
    monkeypatch.setattr(serve, "warmed", lambda *_: None)
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    monkeypatch.setattr("duet_vlm.cli.app.find_spec", lambda _: True)
    result = call("app", "--port", "17863", code=130)
    assert result.stderr.strip() == "interrupted: the same command opens the page again" and closed == [False]


def test_a_point_is_a_point_and_a_floor_has_one_digit(capsys: pytest.CaptureFixture[str]) -> None:
    from duet_vlm.cli import bench, drop_curve
    from duet_vlm.evaluation.drop_curve import CurvePoint, DropCurve

    curve = DropCurve(12, 0.9, {}, (CurvePoint(11, 0.9, 0.0, (0.0, 0.0), {}),))
    drop_curve._show(curve, {}, 0.01)
    drop_curve._show(curve, {}, 0.02)
    said = capsys.readouterr().out
    assert "within 1 point of the full" in said and "within 2 points of the full" in said
    rows = [
        {"side": "fastv at 7", "status": "infeasible", "floor": 21.333333333333332},
        {"side": "x at 1", "status": "infeasible", "floor": None},
    ]
    bench._show({"model": "m", "environment": {"device": "cpu", "dtype": "float32", "threads": 1}, "rows": rows})
    assert capsys.readouterr().out.splitlines()[1:] == ["fastv at 7: infeasible (floor 21.3)", "x at 1: infeasible"]


def test_a_folder_that_cannot_be_written_is_named_by_its_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    result = SRC.parent / "lab/comparison/tiny/results/methods.json"
    monkeypatch.setattr(Path, "touch", refused)
    said = call("report", result, "--out", tmp_path / "there", code=2).stderr
    assert said == f"error: --out {tmp_path}/there: cannot be written to (Read-only file system)\n"


def test_visitors_and_options_share_no_words() -> None:
    """The page and Python speak of ``budget``; the command line of ``--budget``, with what was typed."""
    from duet_vlm.planning.budget import read_budget

    for text, said in (
        ("200%", "budget 200%: "),
        ("0", "budget 0: keep at least 1 token"),
        ("nan", "budget nan: a fraction"),
    ):
        with pytest.raises(ValueError, match=f"^{said}"):
            read_budget(text)
    with pytest.raises(ValueError, match="^--budget 200%: "):
        options.budget_of("200%")
