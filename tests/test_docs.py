"""The snippets of README and docs run as they stand; tables agree with the result files."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import typer
from PIL import Image

import duet_vlm
from duet_vlm import tiny
from duet_vlm.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
DEMO = sorted((ROOT / "src/duet_vlm/tiny/demo").glob("*.png"))


@pytest.fixture
def tiny_for_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub names in the snippets load the embedded model, at a budget it can meet."""
    model, processor = tiny.load()
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", lambda *a, **k: model)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *a, **k: processor)


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in (ROOT / p).read_text()])
def test_snippets_run(page: str, tiny_for_every_name: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    known = duet_vlm.methods()
    model, processor = tiny.load()
    image, prompt = Image.open(DEMO[0]), tiny.prompt("what color is the star ?")
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    names = {"model": model, "processor": processor, "image": image, "prompt": prompt, "inputs": inputs, "duet_vlm": duet_vlm}
    names["__name__"] = "snippet"
    monkeypatch.setitem(sys.modules, "snippet", type(sys)("snippet"))
    torch.manual_seed(0)
    try:
        for snippet in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S):
            exec(compile(snippet, page, "exec"), names)
    finally:
        duet_vlm.registry._methods.clear()
        duet_vlm.registry._methods.update(known)
    if page == "README.md":
        assert "FLOPs-bound speed-up" in capsys.readouterr().out


COMMANDS = [*PAGES, "benchmarks/README.md", "comparison/checkpoints/README.md", "comparison/training/README.md"]


@pytest.mark.parametrize("page", COMMANDS)
def test_commands_have_the_options_that_pages_show(page: str) -> None:
    """Every ``duet-vlm VERB ...`` of a page is read as the command line reads it; nothing is run."""
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = (ROOT / page).read_text().replace("\\\n", " ")
    blocks = [line for block in re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.S) for line in block.splitlines()]
    prose = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    for line in (*blocks, *prose):
        found = re.match(r"(?:\S*/)?duet-vlm ([a-z]+) (.*)", line.strip())
        if found and found[1] in verbs:
            words = shlex.split(found[2], comments=True)
            known = {name for option in verbs[found[1]].params for name in (*option.opts, *option.secondary_opts)}
            assert {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)} <= {*known, "--help"}, line


def test_tables_agree_with_result_files() -> None:
    done = subprocess.run([sys.executable, ROOT / "benchmarks/tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target
