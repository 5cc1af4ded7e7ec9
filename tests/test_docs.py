"""The snippets and commands of README and docs run as they stand; tables agree with the result files; pages are short
and link somewhere."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import typer
from families import PAD, llava, qwen2_5_vl, randomise
from packaging.requirements import Requirement
from PIL import Image
from processors import STOCK, made, square
from typer.main import get_command

import duet_vlm
from duet_vlm.cli.main import app
from duet_vlm.evaluation import tiny

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
# with the model that a reader has by then
GOING_ON = {f"docs/{page}.md" for page in ("measure", "trained-compressors", "families")}
READ = [*PAGES, "PAPERS.md", "benchmarks/README.md", "benchmarks/gpu/README.md", "docs/configs/README.md"]
DEMO = sorted((ROOT / "src/duet_vlm/evaluation/tiny/demo").glob("*.png"))


@pytest.fixture
def tiny_for_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub names in the snippets load the embedded model, at a budget it can meet; folders load what they hold."""
    for auto, embedded in zip(
        (transformers.AutoModelForImageTextToText, transformers.AutoProcessor), tiny.load(), strict=True
    ):
        stock = auto.from_pretrained
        monkeypatch.setattr(
            auto,
            "from_pretrained",
            lambda name, *a, _tiny=embedded, _stock=stock, **k: _stock(name, *a, **k) if Path(name).is_dir() else _tiny,
        )


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in (ROOT / p).read_text()])
def test_snippets_run(
    page: str, tiny_for_every_name: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    duet_vlm.list_methods()  # all are registered
    known = dict(duet_vlm.reducers.registry._methods)
    model, processor = tiny.load()
    image, prompt = Image.open(DEMO[0]), tiny.prompt("what color is the star ?")
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    names: dict[str, object] = {"__name__": "snippet"}
    if page in GOING_ON:
        names |= {
            "model": model,
            "processor": processor,
            "image": image,
            "prompt": prompt,
            "inputs": inputs,
            "duet_vlm": duet_vlm,
        }
    monkeypatch.setitem(sys.modules, "snippet", type(sys)("snippet"))
    torch.manual_seed(0)
    try:
        for snippet in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S):
            exec(compile(snippet, page, "exec"), names)
        model, _ = tiny.load()
        for method in sorted({*duet_vlm.list_methods()} - {*known}):  # a method that the page writes does reduce
            # its method takes settings of its own, and all of a docs page take a budget
            with duet_vlm.attach(model, method, budget=0.5, processor=processor) as handle:
                model.generate(**processor(images=image, text=prompt, return_tensors="pt"), max_new_tokens=1)
                assert handle.report().observed.decoder_flops < handle.report().full.decoder_flops, method
    finally:
        duet_vlm.reducers.registry._methods.clear()
        duet_vlm.reducers.registry._methods.update(known)
    if page == "README.md":
        assert "FLOPs-bound speed-up" in capsys.readouterr().out


COMMANDS = [*PAGES, "benchmarks/README.md", "lab/comparison/checkpoints/README.md", "lab/comparison/training/README.md"]


@pytest.mark.parametrize("page", COMMANDS)
def test_commands_have_the_options_that_pages_show(page: str) -> None:
    """Every ``duet-vlm VERB ...`` of a page is read as the command line reads it; nothing is run."""
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = (ROOT / page).read_text().replace("\\\n", " ")
    blocks = [line for block in re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.S) for line in block.splitlines()]
    prose = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    for line in (*blocks, *prose):
        found = re.match(r"(?:\S*/)?duet-vlm ([a-z-]+) (.*)", line.strip())
        if found and found[1] in verbs:
            words = shlex.split(found[2].rstrip(")"), comments=True)
            words = words[: words.index("--")] if "--" in words else words  # what is handed on to another program
            known = {name for option in verbs[found[1]].params for name in (*option.opts, *option.secondary_opts)}
            assert {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)} <= {*known, "--help"}, line


def test_tables_agree_with_result_files() -> None:
    done = subprocess.run([sys.executable, ROOT / "lab/tables/tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_headline_is_what_was_measured() -> None:
    """Worked out from the medians in the result files, not from the ratios that the table takes. The first token was
    measured three times: the headline has the least and the largest."""
    readme = (ROOT / "README.md").read_text()
    readme = " ".join(readme.split())
    said = re.search(
        r"`duet` at 11 % of the visual tokens the first token comes (\S+) to (\S+) times as fast, an answer of (\d+) tokens (\S+) times as fast, "
        r"and the KV cache is (\d+) times smaller.* toy task .* it keeps (\S+) % .* for LLaVA-1.5-7B .* authors publish (\S+) %\.",
        readme,
    )
    assert said and float(said[1]) <= float(said[2]) < 1.1 * float(said[1])
    rows = json.loads((ROOT / "benchmarks/results/bench.json").read_text())["rows"]
    full, small = (
        next(row for row in rows if row["side"] == side and row["text"] == 65) for side in ("full", "duet at 11%")
    )
    ratio = full["ms"]["to first token"]["median"] / small["ms"]["to first token"]["median"]
    assert float(said[1]) - 0.1 < ratio < float(said[2]) + 0.1
    assert full["ms"]["end to end"]["median"] / small["ms"]["end to end"]["median"] == pytest.approx(
        float(said[4]), abs=0.1
    )
    assert (full["new"], round(full["kv_bytes"] / small["kv_bytes"])) == (int(said[3]), int(said[5]))
    runs = json.loads((ROOT / "lab/comparison/tiny-chain/results/methods.json").read_text())["runs"]
    right = {run["label"]: run["accuracy"] for run in runs if run["budget"] in (None, 0.11) and run["status"] == "ok"}
    assert 100 * right["duet"] / right["full model"] == pytest.approx(float(said[6]), abs=0.05)
    assert f"| `duet-64` | {said[7]} |" in (ROOT / "docs/reproduce-duet.md").read_text()


def test_readme_speaks_of_one_method_and_has_one_install_line() -> None:
    """The headline, the snippet and the speed table are of one method; what else is installed is named where it is
    needed."""
    readme = (ROOT / "README.md").read_text()
    head = readme.split("<!-- table:headline -->")[1].split("<!-- /table:headline -->")[0]
    assert (
        set(re.findall(r"`(\w+)`", head)) == {"duet"}
        and 'attach(model, "duet"' in readme
        and "`duet` at 33 %" in readme
    )
    assert re.findall(r"^pip install .*?(?= +#|$)", readme, flags=re.M) == ['pip install -e ".[eval]"']
    assert "transformers >= 5.21" in readme and "5.16" in readme
    wanted = readme.split("## I want to ...")[1].split("\n\n")[1]
    assert len(re.findall(r"^- \*\*", wanted, flags=re.M)) == 8
    block = re.search(r"```bash\n([^`]*duet-vlm demo.*?)```", readme, flags=re.S)
    assert block and all(re.search(r"# .*\d+ (s|min)\b|# \d+ s", line) for line in block[1].splitlines())


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target


# ---- pages that people read


def prose(page: str) -> list[tuple[int, str]]:
    """(number, text) of the lines that are no code, no table (nor what is made with it), no picture, and no link that
    cannot be broken."""
    # markers of numbers are not seen
    text, found, inside = re.sub(r"<!-- /?n\b[^\n]*?-->", "", (ROOT / page).read_text()), [], False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```") or line.startswith(("<!-- table:", "<!-- /table:")):
            inside = not inside
        elif (
            not inside
            and not line.lstrip().startswith(("|", "!["))
            and " " in re.sub(r"\[[^\]]*\]\([^)]*\)", "", line.strip())
        ):
            found.append((number, line))
    return found


@pytest.mark.parametrize("page", READ)
def test_lines_fit_a_screen(page: str) -> None:
    assert not [f"{page}:{number}" for number, line in prose(page) if len(line) > 120]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


PRIVATE = r"\bdoors?\b|\btold (are|is)\b|\bhands? (on|out|over)\b|\bhanded (on|out|over)\b|\brooms?\b|\bwhom\b|\bknows nothing\b"


@pytest.mark.parametrize("page", READ)
def test_pages_speak_of_tokens_as_the_field_does(page: str) -> None:
    """Words of this code's own making that a reader cannot look up."""
    assert not [
        f"{page}:{number}: {found[0]}"
        for number, line in prose(page)
        if (found := re.search(PRIVATE, line, flags=re.I))
    ]


def test_glossary_is_one_line_per_word_and_linked() -> None:
    text = (ROOT / "docs/glossary.md").read_text()
    words = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert len(words) > 50 and not [word for word in words if words.count(word) > 1 and word not in ("word", "---")]
    linking = (
        "README.md",
        "CONTRIBUTING.md",
        "PAPERS.md",
        "docs/how-it-works.md",
        "docs/methods.md",
        "benchmarks/README.md",
    )
    assert all("glossary.md" in (ROOT / page).read_text() for page in linking)


# ---- what a fresh machine sees: README with nothing installed but what ``pip install .`` brings

# the checkpoints of README's first two snippets
LLAVA, QWEN = "llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2.5-VL-7B-Instruct"
PARTS = "{% for part in messages[0]['content'] %}{{ part['text'] if part['type'] == 'text' else '@' }}{% endfor %}"
HIDE = """
from importlib.machinery import PathFinder as Finder

found = Finder.find_spec
Finder.find_spec = lambda name, *place: None if name.partition(".")[0] in {hidden} else found(name, *place)

import importlib.metadata as installed

offers = installed.entry_points  # what is hidden offers nothing either
installed.entry_points = lambda **which: [point for point in offers(**which) if point.module.partition(".")[0] not in {hidden}]
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def brought(*names: str) -> set[str]:
    """These distributions (with extras in brackets) and all that they require."""
    found: set[str] = set()
    waiting = list(map(Requirement, names))
    while waiting:
        one = waiting.pop()
        if (name := canonical(one.name)) not in found or one.extras:
            found.add(name)
            wanted = map(Requirement, importlib.metadata.requires(name) or [])
            waiting += [
                each
                for each in wanted
                if each.marker is None or any(each.marker.evaluate({"extra": e}) for e in ("", *one.extras))
            ]
    return found


def hidden(*names: str) -> set[str]:
    """Installed modules that installing these would not bring."""
    kept = brought(*names)
    return {
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if not kept & set(map(canonical, owners))
    }


def alone(code: str, hide: Iterable[str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The code in a process of its own that cannot import these modules; it stands in the root of the clone unless said
    otherwise."""
    place = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HIDE.replace("{hidden}", repr(set(hide))) + code]
    return subprocess.run(command, cwd=cwd, env=os.environ | place, capture_output=True, text=True)


def snippet(checkpoint: str) -> str:
    """The first snippet, or with the lines in place that the second one says are others."""
    first, other = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    if checkpoint in first:
        return first
    assert checkpoint in other
    begins = ("name, device = ", "with duet_vlm.attach(", "    out = model.generate(")
    lines = {begin: line for line in other.splitlines() for begin in begins if line.startswith(begin)}
    assert len(lines) == len(other.splitlines()) == 3
    return "\n".join(
        next((lines[begin] for begin in begins if line.startswith(begin)), line) for line in first.splitlines()
    )


def saved(model: torch.nn.Module, processor: object, mark: str, folder: Path) -> Path:
    """A checkpoint as a hub has it: weights, config, processor files and a chat template."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    randomise(model.eval()).save_pretrained(folder)
    processor.chat_template = PARTS.replace("@", mark)
    processor.save_pretrained(folder)
    return folder


def test_first_snippet_needs_no_more_than_the_package(tmp_path: Path) -> None:
    """README's, unchanged but for the checkpoint's name: 144 tokens, of which 64 are asked for."""
    stock = replace(STOCK["llava"], images={"size": {"shortest_edge": 168}, "crop_size": square(168)})
    folder = saved(llava(12, 4), made("llava", stock), stock.image, tmp_path)
    missing = hidden("duet-vlm")
    assert "pytest" in missing and not {"torch", "transformers", "PIL"} & missing
    done = alone(snippet(LLAVA).replace(LLAVA, str(folder)), missing | {"accelerate", "torchvision"})
    assert done.returncode == 0, done.stderr
    answer, report = done.stdout.split("\n", 1)
    full, _, measured = re.search(r"mean visual tokens +(\S+) +(\S+) +(\S+)", report).groups()  # type: ignore[union-attr]
    assert answer.strip() and float(full) == 144 and 63 < float(measured) <= 64


@pytest.mark.slow
def test_second_snippet_needs_torchvision_and_says_so(tmp_path: Path) -> None:
    """With it the snippet runs; without it both the stock loader and ours name what is missing, and README says it in
    front of the snippet."""
    processor = made("qwen2_5_vl", STOCK["qwen2_5_vl"])
    # to be saved; its real class cannot be made without torchvision
    processor.video_processor = processor.image_processor
    folder = saved(qwen2_5_vl(), processor, STOCK["qwen2_5_vl"].mark, tmp_path)
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["video_processor"] = settings["image_processor"] | {"video_processor_type": "Qwen2VLVideoProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    code = snippet(QWEN).replace(QWEN, str(folder))
    if importlib.util.find_spec("torchvision") is not None:
        done = alone(code, hidden("duet-vlm", "torchvision"))
        assert done.returncode == 0, done.stderr
        answer, report = done.stdout.split("\n", 1)
        full, _, measured = re.search(r"mean visual tokens +(\S+) +(\S+) +(\S+)", report).groups()  # type: ignore[union-attr]
        # of 8 x 8 enter 22: (4 * 22 + 2 * 11) / 8 <= 0.22 * 64 < (4 * 23 + 2 * 11) / 8
        assert answer.strip() and float(full) == 64 and float(measured) == pytest.approx((4 * 22 + 2 * 11) / 8, abs=0.1)
    done = alone(code, hidden("duet-vlm") | {"torchvision"})
    assert done.returncode == 1 and "requires the Torchvision library" in done.stderr
    verb = f"from duet_vlm.cli.main import app; app(['run', '-m', {str(folder)!r}, '-i', {str(DEMO[0])!r}, '-p', 'x', '-b', '0.5'])"
    done = alone(verb, hidden("duet-vlm") | {"torchvision"})
    assert done.returncode == 2 and 'needs torchvision: pip install ".[video]"' in done.stderr
    before = (ROOT / "README.md").read_text().split(QWEN)[0]
    assert "torchvision" in before and 'pip install -e ".[video]"' in before


SHORTER = {  # later options win
    "eval": ["--limit", "2", "--timing-rounds", "0"], "bench": ["--rounds", "1"], "tune": ["--limit", "60", "--dry-run"],
    "drop-curve": ["--limit", "2", "--layers", "6"],
}  # fmt: skip


def commands(page: str) -> list[list[str]]:
    """The words of every ``duet-vlm`` command of a page, in order; those that are only hinted at (``...``) or are made
    by the shell left out."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(), flags=re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [
        shlex.split(line.split(" > ")[0], comments=True)
        for line in lines
        if "duet-vlm " in line and not re.search(r"\.\.\.|\$\(", line)
    ]
    return [words[1:] for words in found if words[0] == "duet-vlm"]


@pytest.mark.slow
def test_what_readme_offers_to_try_works_after_its_own_first_line(tmp_path: Path) -> None:
    """In a folder that has nothing but the clone's files, with nothing installed but what that line installs."""
    (block,) = re.findall(r"```bash\n([^`]*duet-vlm demo.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    extra = re.search(r'^pip install -e "\.\[(\w+)\]"', (ROOT / "README.md").read_text(), flags=re.M)
    assert extra
    tried = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert {words[0] for words in tried} >= {
        "demo",
        "run",
        "viz",
        "budget",
        "bench",
        "eval",
        "drop-curve",
        "tune",
        "report",
    }
    (tmp_path / "src").symlink_to(ROOT / "src")
    shutil.copytree(ROOT / "lab/comparison/tiny-chain/results", tmp_path / "lab/comparison/tiny-chain/results")
    lines = [f"app({words + SHORTER.get(words[0], [])!r}, standalone_mode=False)" for words in tried]
    done = alone("from duet_vlm.cli.main import app\n" + "\n".join(lines), hidden(f"duet-vlm[{extra[1]}]"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/report/report.html").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_ones_that_there_are(page: str) -> None:
    """Verbs and options are those of today; pictures that are named lie in the clone."""
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    for words in commands(page):
        verbs[words[0]].make_context(words[0], words[1:], resilient_parsing=False)
        for option, value in zip(words, words[1:], strict=False):
            assert option not in ("-i", "--image") or (ROOT / value).is_file(), f"{page}: {value}"


def test_installing_an_extra_is_said_as_it_works_from_a_clone() -> None:
    """The package is on no index: ``pip install ".[extra]"``, and the extra is one of pyproject.toml's."""
    known = set(
        re.findall(
            r"^(\w+) = \[",
            (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1],
            flags=re.M,
        )
    )
    texts = [
        *(ROOT / "src").rglob("*.py"),
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
    ]
    texts += (ROOT / "plugins").rglob("*.md")
    asked = {path: path.read_text() for path in texts}
    assert not [str(path) for path, text in asked.items() if re.search(r"duet-vlm\[|pip install duet-vlm", text)]
    named = [found for text in asked.values() for found in re.findall(r'pip install (?:-e )?"\.\[([\w,]+)\]"', text)]
    extras = {extra for names in named for extra in names.split(",")}
    assert {"video", "train", "eval", "lmms", "viz"} <= extras <= known
