"""The wheel: built from a copy of the tree, installed without dependencies into a fresh environment, used from another
folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDED = [
    "duet_vlm/py.typed",
    "duet_vlm/evaluation/tiny/assets.npz",
    "duet_vlm/evaluation/tiny/weights/model.safetensors",
    "duet_vlm/evaluation/tiny/weights/config.json",
    "duet_vlm/evaluation/tiny/weights/tokenizer.json",
    "duet_vlm/evaluation/tiny/weights/processor_config.json",
    "duet_vlm/evaluation/tiny/weights/chat_template.jinja",
    "duet_vlm/train/recipes/tiny.yaml",
    "duet_vlm/evaluation/tiny/demo/questions.json",
    "duet_vlm/evaluation/tiny/demo/scene_1.png",
    "duet_vlm/api/catalogue.json",
    "duet_vlm/cli/skeletons/entry.txt",
    "duet_vlm/cli/skeletons/decoder.txt",
    "duet_vlm/evaluation/report/page.html.j2",
    "duet_vlm/evaluation/report/page.css",
    "duet_vlm/evaluation/report/page.js",
    "duet_vlm/evaluation/lmms/tasks/tiny/duet_tiny.yaml",
]


def sh(*command: object, cwd: Path) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def built(source: Path, files: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a distribution, from a copy of its files."""
    tree, out = tmp_path_factory.mktemp("tree") / "source", tmp_path_factory.mktemp("wheel")
    tree.mkdir()
    for name in files:
        shutil.copy(source / name, tree)
    shutil.copytree(source / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    sh(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        out,
        tree,
        cwd=out,
    )
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(ROOT, ("pyproject.toml", "README.md", "LICENSE"), tmp_path_factory)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the scripts of an environment that holds the wheel and borrows the libraries of this one."""
    home = tmp_path_factory.mktemp("venv")
    sh(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    sh(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=home)
    site = Path(sh(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=home).strip())
    # a .pth line adds a folder, not that folder's own .pth files
    folders = [sysconfig.get_paths()["purelib"], str(ROOT / "lab/src")]
    (site / "borrowed.pth").write_text("\n".join(folders) + "\n")
    return home / "bin"


def test_wheel_holds_the_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert set(NEEDED) <= set(names)
    assert all(re.match(r"duet_vlm(/|-[\d.]+\.dist-info/)", name) for name in names)
    sources = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src/duet_vlm").rglob("*.py")}
    assert sources <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < 10e6


def test_wheel_of_the_lab(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its sources and the weights of its four models, nothing of the comparison."""
    with zipfile.ZipFile(built(ROOT / "lab", ("pyproject.toml", "README.md"), tmp_path_factory)) as archive:
        names = archive.namelist()
    assert {f"duet_vlm_lab/weights/{name}/model.safetensors" for name in ("chain", "page", "video", "long")} <= set(
        names
    )
    assert {str(path.relative_to(ROOT / "lab/src")) for path in (ROOT / "lab/src").rglob("*.py")} <= set(names)
    assert all(re.match(r"duet_vlm_lab(/|-[\d.]+\.dist-info/)", name) for name in names)


def test_installed_package_works_from_anywhere(installed: Path, tmp_path: Path) -> None:
    code = "import duet_vlm, duet_vlm.evaluation.tiny as t; m, p = t.load(); print(duet_vlm.__file__, len(t.demo_images()), m.num_parameters() > 0)"
    out = sh(installed / "python", "-c", code, cwd=tmp_path)
    assert str(installed.parent) in out and out.split()[1:] == ["4", "True"]


def test_installed_command_works(installed: Path, tmp_path: Path) -> None:
    assert "visionzip" in sh(installed / "duet-vlm", "methods", cwd=tmp_path)
    assert "63.75" in sh(installed / "duet-vlm", "budget", "--budget", "64", cwd=tmp_path)


def test_import_does_nothing_but_import(installed: Path, tmp_path: Path) -> None:
    """No optional package, no command-line package, no logging set-up, no change of the environment."""
    code = (
        "import os, sys, logging; before = dict(os.environ); import duet_vlm; "
        "loud = [m for m in ('typer', 'rich', 'matplotlib', 'peft', 'spacy', 'scipy') if m in sys.modules and 'duet_vlm.cli' in sys.modules]; "
        "added = [k for k in os.environ if k not in before and 'DUET' in k.upper()]; "
        "print(loud, added, len(logging.getLogger().handlers), 'duet_vlm.cli' in sys.modules)"
    )
    assert sh(installed / "python", "-c", code, cwd=tmp_path).strip() == "[] [] 0 False"


def test_one_version_number() -> None:
    """Only pyproject.toml says it."""
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version
    for path in (ROOT / "src").rglob("*.py"):
        assert version[1] not in path.read_text(), path


def test_methods_stays_a_function() -> None:
    """Loading the method files must not replace ``duet_vlm.methods`` by the folder of that name."""
    code = "import duet_vlm; a = duet_vlm.list_methods(); from duet_vlm.methods.decoder.fastv import FastV; print(a == duet_vlm.list_methods())"
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    assert (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.strip()
        == "True"
    )
