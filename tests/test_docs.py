"""The snippets of README and docs run as they stand; tables agree with the result files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

import duet_vlm
from duet_vlm import tiny

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


def test_tables_agree_with_result_files() -> None:
    done = subprocess.run([sys.executable, ROOT / "benchmarks/tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target
