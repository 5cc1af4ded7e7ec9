"""The site's pages say what code and results say; its navigation, links, tables and notebooks work. `make docs` builds
it."""

from __future__ import annotations

import dataclasses
import functools
import json
import pkgutil
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
from duet_vlm.api.catalogue import rows
from duet_vlm.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs/site"))

import catalogue  # noqa: E402
import docstrings  # noqa: E402
import home  # noqa: E402
import lessons  # noqa: E402
import links  # noqa: E402
import measured  # noqa: E402
import reference  # noqa: E402


class ConfigLoader(yaml.SafeLoader):
    """Reads mkdocs.yml, in which a function is given by its name."""


ConfigLoader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, name, node: name)
CONFIG = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=ConfigLoader)  # safe: it makes nothing but plain values
SHIPPED = [row for row in rows("methods") if duet_vlm.get_method(row["name"]).__module__.startswith("duet_vlm.")]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.py"))


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return catalogue.pages(drawn={"duet"})


@pytest.fixture
def known_methods() -> Iterator[None]:
    duet_vlm.list_methods()  # all are registered
    known = dict(duet_vlm.reducers.registry._methods)
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
    made = {home.PAGE, measured.PAGE, reference.CLI, reference.API, catalogue.FOLDER}
    made |= {*lessons.pages(), *links.BROUGHT.values()}
    assert set(listed) == own | made and len(listed) == len(set(listed))
    assert all((ROOT / path).is_file() for path in links.BROUGHT)


def test_the_site_loads_nothing_from_elsewhere() -> None:
    assert CONFIG["theme"]["font"] is False
    assert not any(re.search(r"https?://", path.read_text()) for path in (ROOT / "docs/assets").iterdir())
    shims = [path for path in CONFIG["extra"]["polyfills"] if "iframe-worker" in path]  # the plug-in then fetches none
    assert shims and all((ROOT / "docs" / path).is_file() for path in shims)


def test_the_home_page_is_its_own_and_leads_to_what_people_want() -> None:
    """Headline and cards; README is a page beside it; each card leads to pages of the navigation."""
    page, listed = home.page(), leaves(CONFIG["nav"])
    assert page.count("\n# ") == 1 and "## I want to ..." in page and len(home.CARDS) >= 6
    readme = (ROOT / "README.md").read_text()
    headline = readme.split("<!-- table:headline -->\n")[1].split("\n<!-- /table:headline -->")[0]
    assert headline in page and links.BROUGHT["README.md"] != "index.md"
    for wish, (words, pages) in home.CARDS.items():
        card = page.split(f"**... {wish}**")[1].split("\n-   ")[0].split("</div>")[0]
        assert words in card and pages
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", links.rewrite(card, "index.md")[0]):
            assert target in listed or target == f"{catalogue.FOLDER}/index.md", target


def test_the_home_page_without_a_headline_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# nothing")
    monkeypatch.setattr(home, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="README.md has no block <!-- table:headline -->"):
        home.page()


@pytest.mark.parametrize("row", SHIPPED, ids=lambda row: row["name"])
def test_a_method_has_a_page_with_all_that_is_known_of_it(row: dict[str, Any], pages: dict[str, str]) -> None:
    page, cls = pages[f"catalogue/{row['name']}.md"], duet_vlm.get_method(row["name"])
    assert row["summary"][1:] in page and "## Idea" in page
    assert all(f"(https://arxiv.org/abs/{number})" in page for number in re.findall(r"\d{4}\.\d{5}", row["paper"]))
    settings = dict(
        re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", page.split("## Settings")[1].split("\n## ")[0], flags=re.M)
    )
    assert set(settings) == {field.name for field in dataclasses.fields(cls)}
    assert all(settings.values()), f"settings without words: {[name for name, words in settings.items() if not words]}"
    assert all(f"`{need}`" in page for need in row["needs"])
    assert all(
        f"`{family}`" in page and case["why"] in page for case in row["families_without"] for family in case["families"]
    )
    mine = [run for _, run in result_runs() if row["name"] in run["method"].split("+")]
    numbers = page.split("## Numbers")[1].split("\n## ")[0]
    assert len(re.findall(r"^\| `tiny[\w-]*` \|", numbers, flags=re.M)) == len(mine)
    assert ("duet-vlm eval" in numbers) == (not mine)
    heads = re.findall(r"^## (.+)$", page, flags=re.M)
    assert heads[:2] == ["Try it", "Settings"]
    assert f"[`{row['name']}`]({row['name']}.md)" in pages["catalogue/index.md"]


def test_the_catalogue_is_grouped() -> None:
    """By what the base classes say, which is the other way round than the site works it out."""
    found = {head: {row["name"] for row in group} for head, group in catalogue.grouped().items()}
    assert list(found) == [
        "Before the decoder", "Inside the decoder", "In the vision tower", "For clips", "Trained", "Baselines"
    ] and sum(map(len, found.values())) == len(rows("methods"))  # fmt: skip
    assert found["Trained"] == {"quecc", "resampler", "vqtoken"}
    assert found["Baselines"] == {"none", "random", "uniform", "pool", "random_patches", "checkerboard"}
    assert {"holitom", "frames", "metok"} <= found["For clips"]
    staged = {row["name"]: row["stage"] for row in rows("methods")}
    for head, words in (("Inside the decoder", "inside the decoder"), ("In the vision tower", "inside the tower")):
        assert {staged[name] for name in found[head]} == {words}
    assert all(staged[name].startswith("before the decoder") for name in found["Before the decoder"])
    listed = leaves(catalogue.navigation())
    assert len(listed) == len(set(listed)) == len(rows("methods")) + 1


def test_the_catalogue_has_the_accuracy_that_was_measured(pages: dict[str, str]) -> None:
    """Read from the result files without the site's code; no column without a number."""
    page = pages["catalogue/index.md"]
    found = [(path, run) for path, run in result_runs() if path.stem == "methods" and "training" not in path.parts]
    runs = {(path.parts[-3], run["id"]): run for path, run in found}
    chain, inside, clips = ("tiny-chain", (0.33, 0.11)), ("tiny-chain", (0.33, 0.22)), ("tiny-video", (0.47, 0.07))
    for name, task, budgets in (("duet_plus", *chain), ("fastv", *inside), ("frames", *clips)):
        (line,) = [line for line in page.splitlines() if line.startswith(f"| [`{name}`]")]
        for budget in budgets:
            run = runs[task, f"{name}@{budget}"]
            assert f"| {100 * run['kept']:.1f} |" in line if run["status"] == "ok" else f"| {run['status']} |" in line
    for part in page.split("\n## ")[1:]:
        rows_ = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
        heads = [column for column, head in enumerate(rows_[0]) if head.startswith("kept at")]
        assert heads or part.startswith(("Trained", "In the vision tower"))  # other files hold those
        assert all(any(re.fullmatch(r"[\d.]+", row[column]) for row in rows_[2:]) for column in heads), part[:30]


def test_the_results_open_on_the_leading_bench() -> None:
    page = measured.page()
    assert 'data-choose-0="task=tiny-chain" data-choose-1="budget=11%"' in page
    assert measured.LEADING in (ROOT / "docs/comparison.md").read_text().split("leads**")[0]
    shown = [line for line in page.splitlines() if line.startswith("| tiny-chain |") and "| 11% |" in line]
    assert 20 < len(shown) < 100
    kept = [
        float(line.split(" | ")[4].split()[0]) for line in shown if "/methods.json" in line and " | - | " not in line
    ]
    assert len(kept) > 20 and kept == sorted(kept, reverse=True) and "/methods.json" in shown[0]


def test_the_comparison_opens_with_who_keeps_what() -> None:
    text = (ROOT / "docs/comparison.md").read_text()
    head, table = re.search(r"^## (.+)$", text, flags=re.M), text.index("<!-- table:kept_chain -->")
    assert head is not None and head[1] == "Who keeps what"
    assert len(text[:table].split()) < 120  # little stands in front of it
    assert text.index("![") > table


def test_pictures_stand_on_the_pages_that_have_one(pages: dict[str, str]) -> None:
    page = pages["catalogue/duet.md"]
    assert page.index("(duet.webp)") < page.index("## Try it")  # the picture comes first
    assert "(duet.webp)" in page and ".webp" not in pages["catalogue/scope.md"]


def test_deviations_are_those_of_papers_md(pages: dict[str, str]) -> None:
    """Also where several methods share a section; links lead out of the catalogue's folder."""
    assert "size-weighted mean of anchor and members" in pages["catalogue/duet.md"]
    assert catalogue.deviations("prumerge") == catalogue.deviations("prumerge_plus") != ""
    assert catalogue.deviations("prume") == ""


def test_who_wins_is_worked_out_among_equals() -> None:
    def cell(method: str, budget: float, kept: float | None, alone: bool = True) -> measured.Cell:
        return measured.Cell(
            "f.json", "tiny", method, method, budget, "ok", alone, kept, None, kept, None, 1.0, 1.0, 1.0
        )

    found = [
        cell("a", 0.1, 0.9),
        cell("b", 0.1, 0.8),
        cell("a", 0.2, 0.7),
        cell("b", 0.2, 0.7),
        cell("b", 0.3, 0.9),
        cell("a", 0.3, None),
    ]
    found += [cell("b", 0.1, 0.99, alone=False), cell("b", 0.4, 0.9)]
    # a tie counts for both, a composition and an unmeasured rival for none
    assert "`tiny` at 20%, 10% of the tokens" in catalogue.wins("a", found)
    assert "`tiny` at 20% of the tokens" in catalogue.wins("b", found)
    assert catalogue.wins("c", found) == ""


def test_the_table_of_results_has_every_run() -> None:
    table = [line for line in measured.page().splitlines() if line.startswith("| tiny")]
    runs = result_runs()
    assert len(table) == len(runs) > 500
    found = [(path, run) for path, run in runs if "/tiny-chain/" in str(path) and path.stem == "methods"]
    path, run = next((path, run) for path, run in found if run["id"] == "visionzip+duet@0.11")
    kept, low, high = (f"{100 * value:.1f}" for value in (run["kept"], *run["kept_interval"]))
    (line,) = [
        line
        for line in table
        if f"[{run['method']}]" in line and "| 11% |" in line and f"../{path.relative_to(ROOT)}" in line
    ]
    assert (
        f"| {run['accuracy']:.3f} (" in line
        and f"| {kept} ({low}-{high}) |" in line
        and f"| {run['tokens']['measured']:.1f} |" in line
    )


def test_every_verb_and_option_is_on_the_page_of_the_command_line() -> None:
    page = reference.command_line()
    for verb, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        part = page.split(f"## `{verb}`\n")[1].split("\n## ")[0]
        assert all(
            name in part
            for option in command.params
            if not option.hidden
            for name in option.opts
            if name.startswith("-")
        ), verb
    assert max(map(len, page.splitlines())) <= 100


def test_public_names_are_documented_and_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reference.undocumented() == []
    page = reference.python()
    assert all(f"::: duet_vlm.{name}\n" in page for names in reference.GROUPS.values() for name in names)
    heads = dict(re.findall(r"^::: (\S+)\n    options:\n      heading: (\S+)$", page, flags=re.M))
    assert {head.removeprefix("duet_vlm.") for head in heads.values() if head.count(".") == 1} == set(duet_vlm.__all__)
    for defined, head in heads.items():  # the name in the heading is that very object
        one, other = (pkgutil.resolve_name(":".join(name.rsplit(".", 1))) for name in (head, defined))
        assert one is other, head
    monkeypatch.setattr(duet_vlm.Handle.report, "__doc__", None)
    monkeypatch.setattr(duet_vlm, "__all__", [*duet_vlm.__all__, "forgotten"])
    assert reference.undocumented() == ["api.handle.Handle.report", "forgotten (not on the page)"]


LINKS = {  # on the page, link of the repository -> link of the site
    ("how-it-works.md", "glossary.md"): "glossary.md",
    ("how-it-works.md", "../PAPERS.md"): "papers.md",
    ("how-it-works.md", "../PAPERS.md#duet"): "papers.md#duet",
    ("overview.md", "docs/serve.md#limits"): "serve.md#limits",
    ("overview.md", "docs/images/kept.png"): "images/kept.png",
    ("index.md", "../CONTRIBUTING.md#release"): "contributing.md#release",
    ("index.md", "catalogue/index.md"): "catalogue/index.md",
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
    assert told[:2] == [
        ("first", "int or None", "None", "Both the same."),
        ("second", "int or None", "2", "Both the same."),
    ]
    assert told[2:] == [("shared", "int", "1", "Of all.")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known_methods: None, capsys: pytest.CaptureFixture[str]
) -> None:
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
    (tmp_path / "page.html").write_text(
        f"<div class='filtered'><div class='sortable'>{table}</div></div><script>{script}</script>"
    )
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


GROUPED = """<div class="filtered" data-choose-0="budget=11%">
<h2>One</h2><p>words of one</p>
<div class="sortable"><table><thead><tr><th>name</th><th>budget</th><th>kept</th></tr></thead><tbody>
<tr><td>a</td><td>11%</td><td>33%</td></tr><tr><td>b</td><td>33%</td><td>11%</td></tr></tbody></table></div>
<h2>Two</h2><p>words of two</p>
<div class="sortable"><table><thead><tr><th>name</th><th>budget</th></tr></thead><tbody>
<tr><td>c</td><td>7%</td></tr><tr><td>d</td><td>11%</td></tr></tbody></table></div>
</div>"""


@pytest.fixture
def window() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium (or set CHROMIUM to its path)")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser installs it")
    with api.sync_playwright() as play:
        page = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page()
        page.set_default_timeout(20_000)
        yield page


def test_in_a_browser_a_page_opens_on_a_value_and_groups_without_rows_go(window: Any, tmp_path: Path) -> None:
    """The list of a column's values stands at the one that the page names, and asks this column alone."""
    (tmp_path / "page.html").write_text(f"{GROUPED}<script>{(ROOT / 'docs/assets/tables.js').read_text()}</script>")
    window.goto((tmp_path / "page.html").as_uri())

    def shown() -> str:
        return "".join(window.locator("tbody tr:visible td:first-child").all_inner_texts())

    box, budgets = window.get_by_role("searchbox"), window.get_by_label("budget")
    assert shown() == "ad" and budgets.input_value() == "11%"
    assert window.locator(".table-filter span").inner_text() == "2 rows"
    assert budgets.locator("option").all_inner_texts() == ["every budget", "7%", "11%", "33%"]
    budgets.select_option("")
    assert shown() == "abcd"
    box.fill("7%")
    assert shown() == "c"
    for words, there in {"One": False, "words of one": False, "Two": True, "words of two": True}.items():
        assert window.get_by_text(words, exact=True).is_visible() == there
    box.fill("")
    assert shown() == "abcd" and window.get_by_text("words of one").is_visible()
    window.get_by_text("kept", exact=True).click()  # each table sorts by itself
    assert shown() == "bacd"


def test_in_a_browser_a_worker_runs_on_a_page_from_a_folder(window: Any, tmp_path: Path) -> None:
    """As the search's does: it listens for messages and posts answers; some are sent before it is loaded."""
    (tmp_path / "worker.js").write_text("addEventListener('message', async (e) => { postMessage(e.data.n * 2); });")
    shim = (ROOT / "docs/assets/iframe-worker.js").read_text()
    start = """const w = new Worker("worker.js"); window.found = []; w.addEventListener("message", (e) => found.push(e.data));
    w.postMessage({ n: 1 }); w.postMessage({ n: 5 });"""
    (tmp_path / "page.html").write_text(f"<head><script>{shim}</script></head><body><script>{start}</script>")
    window.goto((tmp_path / "page.html").as_uri())
    window.wait_for_function("found.length === 2")
    assert window.evaluate("found") == [2, 10]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site, built as `make docs` does."""
    pytest.importorskip("mkdocs", reason="needs the 'docs' extra: make docs")
    folder = tmp_path_factory.mktemp("built") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_strictly(site: Path) -> None:
    pages = [page for page in leaves(CONFIG["nav"]) if page.endswith(".md") and "README" not in page]
    assert all((site / page).with_suffix(".html").is_file() for page in pages)
    heads = re.findall(r'<h3 id="([^"]+)"[^>]*>(.*?)</h3>', (site / "reference/python.html").read_text(), flags=re.S)
    found = {anchor: re.sub(r"<[^>]+>|\s|&para;|¶", "", words) for anchor, words in heads}
    assert (
        found["duet_vlm.api.attach.attach"] == "duet_vlm.attach"
        and found["duet_vlm.api.handle.Handle"] == "duet_vlm.Handle"
    )


@pytest.mark.slow
@pytest.mark.parametrize("start", ["index.html", "catalogue/duet.html"])
def test_in_a_browser_the_search_works_from_the_folder(site: Path, window: Any, start: str) -> None:
    """Words are typed, the right page is found, a click leads there; nothing is asked of another machine."""
    asked: list[str] = []
    window.on("request", lambda request: asked.append(request.url))
    window.set_viewport_size({"width": 1360, "height": 768})
    window.goto((site / start).as_uri())
    window.locator("input.md-search__input").click()
    window.keyboard.type("drop curve", delay=20)
    first = window.locator(".md-search-result__link").first
    first.wait_for()
    assert "drop" in first.inner_text().lower()
    first.click()
    window.wait_for_url("**/*.html?h=*")
    assert window.url.startswith(site.as_uri())
    assert not [url for url in asked if not url.startswith(("file:", "data:", "about:"))]


@pytest.mark.slow
def test_in_a_browser_pages_open_on_what_people_want(site: Path, window: Any) -> None:
    """In a laptop's window: the cards of the home page, the leading bench at 11 %, a method's picture and command."""
    window.set_viewport_size({"width": 1360, "height": 768})
    window.goto((site / "index.html").as_uri())
    cards = window.locator(".grid.cards > ul > li")
    assert cards.count() == len(home.CARDS)
    sides = {round(cards.nth(number).bounding_box()["x"]) for number in range(cards.count())}
    assert len(sides) == 3  # beside each other
    assert cards.nth(5).bounding_box()["y"] < 768 - 100  # two rows begin above the fold
    window.goto((site / "results.html").as_uri())
    lines = window.locator("tbody tr:visible")
    assert 20 < lines.count() < 100
    assert set(lines.locator("td:first-child").all_inner_texts()) == {"tiny-chain"}
    window.goto((site / "catalogue/index.html").as_uri())
    window.get_by_role("searchbox", name="Filter the table").fill("cdpruner, neurips")
    assert window.locator("tbody tr:visible").count() == 1 and window.locator("article h2:visible").count() == 1
    window.goto((site / "catalogue/duet.html").as_uri())
    picture, command = (window.locator(f"article {part}").first.bounding_box() for part in ("img", "pre"))
    assert picture["y"] < command["y"] < 1200
