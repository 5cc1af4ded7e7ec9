"""The site's pages say what code and results say; its navigation, links, tables and notebooks work. `make docs` builds it."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_pictures import CHROMIUM
from typer.main import get_command

import duet_vlm
from duet_vlm.cli.lists import rows
from duet_vlm.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs/site"))

import catalogue  # noqa: E402
import docstrings  # noqa: E402
import lessons  # noqa: E402
import links  # noqa: E402
import measured  # noqa: E402
import reference  # noqa: E402

CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
SHIPPED = [row for row in rows("methods") if duet_vlm.get_method(row["name"]).__module__.startswith("duet_vlm.")]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.py"))


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return catalogue.pages(drawn={"duet"})


@pytest.fixture
def known_methods() -> Iterator[None]:
    known = duet_vlm.list_methods()
    yield
    duet_vlm.reducers.registry._methods.clear()
    duet_vlm.reducers.registry._methods.update(known)


def leaves(entry: Any) -> list[str]:
    """The pages of a navigation."""
    if isinstance(entry, str):
        return [entry]
    return [page for each in (entry.values() if isinstance(entry, dict) else entry) for page in leaves(each)]


@functools.cache
def result_runs() -> list[tuple[Path, dict[str, Any]]]:
    """Every run of every result file, read without the site's code."""
    files = [path for path in sorted((ROOT / "lab/comparison").rglob("*.json")) if path.parent.name == "results"]
    return [(path, run) for path in files for run in json.loads(path.read_text())["runs"]]


def test_every_page_is_in_the_navigation_once() -> None:
    listed = leaves(CONFIG["nav"])
    own = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    made = {measured.PAGE, reference.CLI, reference.API, catalogue.FOLDER, *lessons.pages(), *links.BROUGHT.values()}
    assert set(listed) == own | made and len(listed) == len(set(listed))
    assert all((ROOT / path).is_file() for path in links.BROUGHT)


def test_the_site_loads_nothing_from_elsewhere() -> None:
    assert CONFIG["theme"]["font"] is False
    assert not re.search(r"https?://", (ROOT / "docs/assets/tables.js").read_text() + (ROOT / "docs/assets/site.css").read_text())


@pytest.mark.parametrize("row", SHIPPED, ids=lambda row: row["name"])
def test_a_method_has_a_page_with_all_that_is_known_of_it(row: dict[str, Any], pages: dict[str, str]) -> None:
    page, cls = pages[f"catalogue/{row['name']}.md"], duet_vlm.get_method(row["name"])
    assert row["summary"][1:] in page and "## Idea" in page
    assert all(f"(https://arxiv.org/abs/{number})" in page for number in re.findall(r"\d{4}\.\d{5}", row["paper"]))
    settings = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", page.split("## Settings")[1].split("\n## ")[0], flags=re.M))
    assert set(settings) == {field.name for field in dataclasses.fields(cls)}
    assert all(settings.values()), f"settings without words: {[name for name, words in settings.items() if not words]}"
    assert all(f"`{need}`" in page for need in row["needs"])
    assert all(f"`{family}`" in page and case["why"] in page for case in row["families_without"] for family in case["families"])
    mine = [run for _, run in result_runs() if row["name"] in run["method"].split("+")]
    assert len(re.findall(r"^\| `tiny[\w-]*` \|", page.split("## Numbers")[1], flags=re.M)) == len(mine)
    assert ("duet-vlm eval" in page.split("## Numbers")[1].split("## Try it")[0]) == (not mine)
    assert f"[`{row['name']}`]({row['name']}.md)" in pages["catalogue/index.md"]


def test_pictures_stand_on_the_pages_that_have_one(pages: dict[str, str]) -> None:
    assert "(duet.webp)" in pages["catalogue/duet.md"] and ".webp" not in pages["catalogue/scope.md"]


def test_deviations_are_those_of_papers_md(pages: dict[str, str]) -> None:
    """Also where several methods share a section; links lead out of the catalogue's folder."""
    assert "size-weighted mean of anchor and members" in pages["catalogue/duet.md"]
    assert catalogue.deviations("prumerge") == catalogue.deviations("prumerge_plus") != ""
    assert catalogue.deviations("prume") == ""


def test_who_wins_is_worked_out_among_equals() -> None:
    def cell(method: str, budget: float, kept: float | None, alone: bool = True) -> measured.Cell:
        return measured.Cell("f.json", "tiny", method, method, budget, "ok", alone, kept, None, kept, None, 1.0, 1.0, 1.0)

    found = [cell("a", 0.1, 0.9), cell("b", 0.1, 0.8), cell("a", 0.2, 0.7), cell("b", 0.2, 0.7), cell("b", 0.3, 0.9), cell("a", 0.3, None)]
    found += [cell("b", 0.1, 0.99, alone=False), cell("b", 0.4, 0.9)]
    assert "`tiny` at 20%, 10% of the tokens" in catalogue.wins("a", found)  # a tie counts for both, a composition and an unmeasured rival for none
    assert "`tiny` at 20% of the tokens" in catalogue.wins("b", found)
    assert catalogue.wins("c", found) == ""


def test_the_table_of_results_has_every_run() -> None:
    table = [line for line in measured.page().splitlines() if line.startswith("| tiny")]
    runs = result_runs()
    assert len(table) == len(runs) > 500
    found = [(path, run) for path, run in runs if "/tiny-chain/" in str(path) and path.stem == "methods"]
    path, run = next((path, run) for path, run in found if run["id"] == "visionzip+duet@0.11")
    kept, low, high = (f"{100 * value:.1f}" for value in (run["kept"], *run["kept_interval"]))
    (line,) = [line for line in table if f"[{run['method']}]" in line and "| 11% |" in line and f"../{path.relative_to(ROOT)}" in line]
    assert f"| {run['accuracy']:.3f} (" in line and f"| {kept} ({low}-{high}) |" in line and f"| {run['tokens']['measured']:.1f} |" in line


def test_every_verb_and_option_is_on_the_page_of_the_command_line() -> None:
    page = reference.command_line()
    for verb, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        part = page.split(f"## `{verb}`\n")[1].split("\n## ")[0]
        assert all(name in part for option in command.params if not option.hidden for name in option.opts if name.startswith("-")), verb
    assert max(map(len, page.splitlines())) <= 100


def test_public_names_are_documented_and_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reference.undocumented() == []
    assert all(f"::: duet_vlm.{name}\n" in reference.python() for names in reference.GROUPS.values() for name in names)
    monkeypatch.setattr(duet_vlm.Handle.report, "__doc__", None)
    monkeypatch.setattr(duet_vlm, "__all__", [*duet_vlm.__all__, "forgotten"])
    assert reference.undocumented() == ["forgotten (not on the page)", "handle.Handle.report"]


LINKS = {  # on the page, link of the repository -> link of the site
    ("how-it-works.md", "glossary.md"): "glossary.md",
    ("how-it-works.md", "../PAPERS.md"): "papers.md",
    ("how-it-works.md", "../PAPERS.md#duet"): "papers.md#duet",
    ("index.md", "docs/serve.md#limits"): "serve.md#limits",
    ("index.md", "docs/images/kept.png"): "images/kept.png",
    ("papers.md", "docs/glossary.md"): "glossary.md",
    ("catalogue/duet.md", "../../PAPERS.md"): "../papers.md",
    ("comparison.md", "../lab/studies/results/knobs.json"): "files/lab/studies/results/knobs.json",
    ("catalogue/duet.md", "../comparison.md"): "../comparison.md",
    ("faq.md", "https://arxiv.org/abs/1"): "https://arxiv.org/abs/1",
    ("faq.md", "#errors"): "#errors",
    ("faq.md", "nowhere.md"): "nowhere.md",
}


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_links_of_the_repository_lead_to_pages_of_the_site(page: str, link: str) -> None:
    text, carried = links.rewrite(f"see [this]({link}) and ![that]({link})\n```\n[code]({link})\n```\n", page)
    wanted = LINKS[page, link]
    assert text == f"see [this]({wanted}) and ![that]({wanted})\n```\n[code]({link})\n```\n"
    assert carried == ({wanted.removeprefix("files/")} if wanted.startswith("files/") else set())


def test_docstrings_are_taken_apart() -> None:
    class Base:
        """Base.

        Attributes
        ----------
        shared : int
            Of all.
        """

    @dataclasses.dataclass
    class Method(Base):
        """Idea in ``two`` lines,
        of one paragraph.

        Parameters
        ----------
        first, second : int or None
            Both the
            same.

        Cost: next to nothing.
        More of that is no setting : really.
        """

        shared: int = 1
        first: int | None = None
        second: int | None = 2

    assert docstrings.idea(Method) == ["Idea in `two` lines, of one paragraph."]
    assert docstrings.paragraphs(Method, ("Cost",)) == ["Cost: next to nothing. More of that is no setting : really."]
    told = [(one.name, one.type, one.default, one.text) for one in docstrings.settings(Method)]
    assert told[:2] == [("first", "int or None", "None", "Both the same."), ("second", "int or None", "2", "Both the same.")]
    assert told[2:] == [("shared", "int", "1", "Of all.")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known_methods: None, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    module = type(sys)("notebook")
    monkeypatch.setitem(sys.modules, "notebook", module)
    runpy.run_path(str(path), run_name="notebook")
    assert capsys.readouterr().out.strip()
    assert not list(tmp_path.iterdir())


def test_notebooks_become_pages() -> None:
    found = lessons.page("# %% [markdown]\n# # Title\n#\n# Words.\n\n# %%\nx = 1\n\n# a remark\n")
    assert found == "# Title\n\nWords.\n\n```python\nx = 1\n\n# a remark\n```\n"
    assert {f"notebooks/{path.stem.replace('_', '-')}.md" for path in NOTEBOOKS} == set(lessons.pages())


ROWS = [["b", "10.5 (9-11)", "x"], ["a", "9.2", "y"], ["c", "-", "x y"], ["d", "100.0", "z"]]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium (or set CHROMIUM to its path)")
def test_tables_sort_and_filter_in_a_browser(tmp_path: Path) -> None:
    """Numbers by value and in front of words, down at the second click; the box keeps rows that have all of its words."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser installs it")
    cells = "".join("<tr>" + "".join(f"<td>{text}</td>" for text in row) + "</tr>" for row in ROWS)
    table = f"<table><thead><tr><th>name</th><th>value</th><th>words</th></tr></thead><tbody>{cells}</tbody></table>"
    script = (ROOT / "docs/assets/tables.js").read_text()
    (tmp_path / "page.html").write_text(f"<div class='sortable filtered'>{table}</div><script>{script}</script>")
    with api.sync_playwright() as play:
        page = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page()
        page.goto((tmp_path / "page.html").as_uri())

        def shown() -> str:
            return "".join(page.locator("tbody tr:visible td:first-child").all_inner_texts())

        orders = {}
        for head in ("name", "value"):
            page.get_by_text(head, exact=True).click()
            once = shown()
            page.get_by_text(head, exact=True).click()
            orders[head] = (once, shown())
        assert orders == {"name": ("abcd", "dcba"), "value": ("abdc", "cdba")}
        page.get_by_role("searchbox").fill("X Y")
        assert shown() == "c" and page.locator(".table-filter span").inner_text() == "1 rows"


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the 'docs' extra: make docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = [page for page in leaves(CONFIG["nav"]) if page.endswith(".md") and "README" not in page]
    assert all((tmp_path / "site" / page).with_suffix(".html").is_file() for page in pages)
