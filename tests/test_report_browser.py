"""The report's page in a real Chromium without a window: `make test-browser`. Skipped where there is no browser or no
playwright."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_data import KINDS, made_up
from report_pictures import CHROMIUM, take

from duet_vlm.evaluation.report import write

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser installs it")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: apt-get install chromium (or set CHROMIUM to its path)"
)

RESULT = made_up()
DONE = [run for run in RESULT["runs"] if run["status"] == "ok"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a page with two results."""
    folder = tmp_path_factory.mktemp("browser")
    for name, result in (("a", RESULT), ("b", made_up(4, (0.22, 0.11), timed=False) | {"name": "short"})):
        (folder / f"{name}.json").write_text(json.dumps(result))
    return write([folder / "a.json", folder / "b.json"], folder / "out")[-1].as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        # the sandbox wants a kernel feature that containers lack; the page is ours and has no network
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, opened; at the end: nothing was complained about and nothing was asked of a network."""
    opened = browser.new_page(viewport={"width": 1600, "height": 1000}, color_scheme="light")
    opened.set_default_timeout(10_000)
    complaints: list[str] = []
    requests: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(address)
    yield opened
    opened.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [address]


def section(page: Any) -> Any:
    return page.locator("section.result").first


def visible(page: Any) -> list[str]:
    """Names of the runs that can be seen, from the top."""
    heads = section(page).locator("tbody:visible th.run button")
    return [" ".join(text.split()) for text in heads.all_inner_texts()]


def name(run: dict[str, Any]) -> str:
    return run["label"] if run["budget"] is None else f"{run['label']} {run['budget'] * 100:g} %"


def head(page: Any, title: str) -> Any:
    return section(page).locator("thead th").filter(has=page.get_by_role("button", name=title, exact=True))


def test_every_run_is_shown_at_first(page: Any) -> None:
    assert page.title() == "Accuracy against budget"
    assert visible(page) == [name(run) for run in RESULT["runs"]]
    assert section(page).locator(".shown").inner_text() == f"{len(RESULT['runs'])} of {len(RESULT['runs'])} runs"
    assert page.locator("section.result").count() == 2 and page.locator("figure svg").count() == 5
    assert section(page).locator("tbody.details:visible, tr.details:visible").count() == 0


def test_a_click_on_a_column_sorts(page: Any) -> None:
    kept, button = head(page, "kept, %"), page.get_by_role("button", name="kept, %", exact=True).first
    down = [name(run) for run in sorted(DONE, key=lambda run: -run["kept"])]
    refused = [name(run) for run in RESULT["runs"] if run["status"] != "ok"]
    button.click()
    assert kept.get_attribute("aria-sort") == "descending"
    assert visible(page) == down + refused
    button.press("Enter")  # by the keyboard as well
    assert kept.get_attribute("aria-sort") == "ascending"
    assert visible(page) == down[::-1] + refused  # what has no number stays at the end
    head(page, "run").locator("button").click()
    assert kept.get_attribute("aria-sort") == "none"
    assert visible(page) == [name(run) for run in RESULT["runs"]]


@pytest.mark.parametrize("title, key", [("prefill, ms", "ms"), ("time ratio", "ratio")])
def test_sorting_sees_numbers_not_text(page: Any, title: str, key: str) -> None:
    page.get_by_role("button", name=title, exact=True).first.click()
    assert visible(page)[: len(DONE)] == [name(run) for run in sorted(DONE, key=lambda run: -run["prefill"][key])]


def test_filters(page: Any) -> None:
    form = section(page).locator("form")
    form.get_by_label("Method").fill(" Random")
    assert visible(page) == [name(run) for run in RESULT["runs"] if "random" in run["label"]]
    form.get_by_label("Budget").select_option("11 %")
    assert visible(page) == ["random 11 %", "random, DUET's schedule 11 %"]
    assert form.locator(".shown").inner_text() == f"2 of {len(RESULT['runs'])} runs"
    form.get_by_role("button", name="Reset").click()
    assert len(visible(page)) == len(RESULT["runs"])
    form.get_by_label("Status").select_option("infeasible")
    assert visible(page) == [name(run) for run in RESULT["runs"] if run["status"] == "infeasible"]
    assert "infeasible, floor 23.0" in section(page).locator("tbody:visible").first.inner_text()
    # the other section is left alone
    assert page.locator("section.result").nth(1).locator("tbody:visible").count() == 9


def test_filter_and_sort_together(page: Any) -> None:
    section(page).get_by_label("Budget").select_option("7 %")
    page.get_by_role("button", name="accuracy", exact=True).first.click()
    some = sorted((run for run in DONE if run["budget"] == 0.07), key=lambda run: -run["accuracy"])
    assert visible(page) == [name(run) for run in some] + ["fastv 7 %"]


def shown_heads(page: Any) -> list[str]:
    return [" ".join(text.split()) for text in section(page).locator("thead th:visible button").all_inner_texts()]


def test_kinds_and_groups_of_columns(page: Any) -> None:
    form = section(page).locator("form")
    before = shown_heads(page)
    assert [title for title in before if title in KINDS] == list(KINDS)
    form.get_by_label("Kind of question").select_option("count")
    assert shown_heads(page) == [title for title in before if title not in KINDS or title == "count"]
    form.get_by_label("cost").uncheck()
    form.get_by_label("recall").uncheck()
    assert (
        "prefill, ms" not in shown_heads(page)
        and "recall midway, %" not in shown_heads(page)
        and "kept, %" in shown_heads(page)
    )
    cells = section(page).locator("tbody").first.locator("tr").first.locator("th:visible, td:visible")
    assert cells.count() == len(shown_heads(page))


def test_a_click_on_a_run_shows_its_settings(page: Any) -> None:
    run = next(run for run in RESULT["runs"] if run["id"] == "duet@0.11")
    button = section(page).get_by_role("button", name="duet 11 %", exact=True)
    details = page.locator(f"[id='{button.get_attribute('aria-controls')}']")
    assert not details.is_visible() and button.get_attribute("aria-expanded") == "false"
    button.press("Space")
    assert details.is_visible() and button.get_attribute("aria-expanded") == "true"
    text = details.inner_text()
    assert (
        "[[6, 0.5], [9, 0]]" in text
        and f"entry\n{run['solved']['entry']}" in text
        and f"n = {run['kinds']['count']['n']}" in text
    )
    assert " ".join(map(str, run["solved"]["counts"])) in text
    page.get_by_role("button", name="kept, %", exact=True).first.click()
    body = section(page).locator("tbody").filter(has=page.get_by_role("button", name="duet 11 %", exact=True))
    assert body.locator("tr.details").is_visible()  # the details travel with their run
    button.click()
    assert not details.is_visible()


@pytest.mark.parametrize("width", [320, 800, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out(page: Any, width: int, scheme: str) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    section(page).locator("tbody th.run button").nth(3).click()
    for part in ("table", "details"):
        assert section(page).locator(part).first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = section(page).locator("tr.details:visible .inside").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(int(part) for part in ground[4:-1].split(",")) > 3 * 128
    assert light == (scheme == "light")


def test_the_name_of_a_run_stays_in_sight(page: Any) -> None:
    page.set_viewport_size({"width": 800, "height": 900})
    scroll = section(page).locator(".scroll")
    left = scroll.bounding_box()["x"]
    scroll.evaluate("element => element.scrollTo(600, 300)")
    first = section(page).locator("tbody th.run").nth(12).bounding_box()
    assert abs(first["x"] - left) < 3
    heads = section(page).locator("thead th").nth(9).bounding_box()
    assert abs(heads["y"] - scroll.bounding_box()["y"]) < 3


def test_without_scripts_the_table_is_there(browser: Any, address: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(address)
    assert opened.locator("section.result").first.locator("tbody:visible").count() == len(RESULT["runs"])
    assert not opened.locator("form").first.is_visible()
    context.close()


def test_hostile_labels_run_nothing(browser: Any, tmp_path: Path) -> None:
    result = made_up(3, (0.22,))
    attack = "</td></script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
    result["name"] = attack
    for run in result["runs"]:
        run["label"] += attack
    (tmp_path / "a.json").write_text(json.dumps(result))
    opened = browser.new_page()
    opened.goto(write([tmp_path / "a.json"], tmp_path / "out")[-1].as_uri())
    assert opened.title() == "Accuracy against budget" and opened.locator("img").count() == 0
    assert opened.locator("h2").inner_text() == f"tiny: {attack}"
    assert attack in opened.locator("tbody th.run").first.inner_text()
    opened.get_by_label("Method").fill("<script>")
    assert opened.locator("tbody:visible").count() == len(result["runs"])
    opened.close()


def test_a_script_that_slipped_in_would_not_run(browser: Any, address: str, tmp_path: Path) -> None:
    """The second lock: the page's policy names the one script that may run."""
    text = (
        Path(address.removeprefix("file://"))
        .read_text()
        .replace("<main>", "<main><script>document.title='taken'</script>", 1)
    )
    (tmp_path / "page.html").write_text(text)
    opened = browser.new_page()
    opened.goto((tmp_path / "page.html").as_uri())
    assert opened.title() == "Accuracy against budget"
    assert opened.locator(".shown").first.inner_text() != ""  # ours did
    opened.close()


def test_pictures_for_the_docs(browser: Any, address: str, tmp_path: Path) -> None:
    made = take(browser, Path(address.removeprefix("file://")).parent, tmp_path)
    assert [path.name for path in made] == [
        f"report-{name}.png" for name in ("page", "details", "narrow", "tokens", "time", "kinds")
    ]
    for path in made:
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(10**6) or []) > 20  # something is on it
