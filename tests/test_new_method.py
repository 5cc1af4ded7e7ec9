"""``duet-vlm new-method`` in a copy of the clone: what it writes works, is tested by the matrix, and passes the linter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from duet_vlm.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "src/duet_vlm/evaluation/tiny/demo/scene_1.png"


def copy(folder: Path) -> Path:
    """What the command changes and the tests read as copies, the rest of the package as links."""
    package = folder / "src/duet_vlm"
    package.mkdir(parents=True)
    for child in (ROOT / "src/duet_vlm").iterdir():
        if child.name == "methods":
            shutil.copytree(child, package / child.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif child.name != "__pycache__":
            (package / child.name).symlink_to(child)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__", "golden", "lmms"))
    for name in ("PAPERS.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def call(*words: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["new-method", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def inside(clone: Path, *words: Any) -> subprocess.CompletedProcess[str]:
    """A command of Python with the copy's package and tests."""
    place = {"PYTHONPATH": str(clone / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=clone, env=os.environ | place, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two new methods, one of each kind."""
    folder = copy(tmp_path_factory.mktemp("new") / "clone")
    said = call("by_entry", "--clone", folder, "--paper", "Some Paper, arXiv 2600.00000").stdout
    assert f"wrote {folder / 'src/duet_vlm/methods/encoder/by_entry.py'}" in said and "make tables" in said
    assert f"which does not have by_entry: run 'pip install -e .' in {folder}" in said  # the tests run another copy
    assert f"--method {folder / 'src/duet_vlm/methods/encoder/by_entry.py'} in place of --method by_entry" in said
    call("by_drop", "--where", "decoder", "--clone", folder)
    return folder


def test_a_new_method_has_its_rows_and_answers(clone: Path) -> None:
    papers = (clone / "PAPERS.md").read_text().splitlines()
    row = papers.index("| `by_entry` | Some Paper, arXiv 2600.00000 | - | - |")
    assert papers[row + 1] == "| `by_drop` | ours | - | - |" and papers[row + 2].startswith("| `contrast` |")
    for name, added in (("PAPERS.md", 2), ("tests/method_matrix.py", 2)):  # and nothing else has changed
        before, after = ((folder / name).read_text().splitlines() for folder in (ROOT, clone))
        assert (
            len(after) == len(before) + added
            and [line for line in after if "by_entry" not in line and "by_drop" not in line] == before
        )
    made = [clone / "src/duet_vlm/methods" / name for name in ("encoder/by_entry.py", "decoder/by_drop.py")]
    lint = subprocess.run(
        [sys.executable, "-m", "ruff", "check", *made, clone / "tests/method_matrix.py"],
        cwd=clone,
        capture_output=True,
        text=True,
    )
    assert lint.returncode == 0, lint.stdout + lint.stderr
    ask = ("run", "-i", PICTURE, "-p", "What shape is the yellow object?", "-b", "0.3", "--method", "by_entry")
    told = inside(clone, "-m", "duet_vlm.cli.main", "new-method", "by_own").stdout  # the copy's own command
    assert "wrote" in told and "another copy" not in told
    answered = inside(clone, "-m", "duet_vlm.cli.main", *ask)
    assert answered.returncode == 0 and "by_entry (budget 0.3)" in answered.stdout, answered.stderr


@pytest.mark.slow
def test_a_new_method_passes_the_invariants(clone: Path) -> None:
    files = ("tests/test_invariants.py", "tests/test_cost.py", "tests/test_detach.py")
    tested = inside(clone, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "by_entry or by_drop")
    passed = [line for line in tested.stdout.splitlines() if " passed" in line]
    assert tested.returncode == 0 and passed and int(passed[-1].split()[0]) > 80, tested.stdout[-3000:]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["My-Method"], "My-Method: use lower-case letters, digits and underscores"),
        (["fastv"], "fastv: there is a method or a file of this name already"),
        (["lambda"], "lambda: is a word of Python"),
        (["mine", "--where", "tower"], "--where tower: give 'entry' (before the decoder) or 'decoder'"),
        (["mine", "--paper", "a | b"], "--paper a | b: at most 60 letters in one line, without quotes and bars"),
        (
            ["mine", "--clone", "nowhere"],
            "--clone nowhere: is no clone of duet-vlm (nowhere/src/duet_vlm/methods/encoder, ",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "src/duet_vlm/methods/encoder").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    for name in ("PAPERS.md", "tests/method_matrix.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    found = call(*words, code=2).stderr
    assert found.startswith(f"error: {said}") and found.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_clone_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "src/duet_vlm/methods/encoder").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/method_matrix.py").write_text("REDUCING = {}\n")
    shutil.copy(ROOT / "PAPERS.md", tmp_path)
    assert (
        "tests/method_matrix.py is of another version than this command"
        in call("mine", "--clone", tmp_path, code=2).stderr
    )
