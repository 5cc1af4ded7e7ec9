"""The page of ``duet-vlm app`` in a real Chromium without a window: `make test-browser`. Skipped where Gradio,
playwright or a browser is missing."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from app_pictures import DEMO, ROOT, ask, begin, choose, more, opened, served, set_to, show, take, take_example
from PIL import Image
from report_pictures import CHROMIUM

from duet_vlm.evaluation import tiny

pytest.importorskip("gradio", reason="needs Gradio: make test-browser installs it")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser installs it")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: apt-get install chromium (or set CHROMIUM to its path)"
)

ITEMS = tiny.demo_images()
QUESTION, ANSWER = ITEMS[0].questions[0]


def stock(number: int) -> str:
    """What the model answers to the first question about a picture, without the page and without a method."""
    model, processor = tiny.load()
    inputs = processor(images=ITEMS[number].image, text=tiny.prompt(ITEMS[number].questions[0][0]), return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return str(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served() as found:
        yield found


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page whose model does not stop before the longest answer."""
    folder = tmp_path_factory.mktemp("endless")
    model, processor = tiny.load()
    model.generation_config.suppress_tokens = [model.generation_config.eos_token_id]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with served(sys.executable, "-m", "duet_vlm.cli.main", "app", "--model", str(folder)) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        # the sandbox wants what containers lack
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, opened; at the end: no script has failed, and nothing was asked of another machine."""
    faults: list[str] = []
    requests: list[str] = []

    def watch(page: Any) -> None:
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))

    found = opened(browser, address, watch)
    yield found
    found.close()
    assert faults == []
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []


def problem(page: Any, part: str) -> str:
    """What the page says is wrong, once it says this."""
    found = page.locator("#problem [role=alert]").filter(has_text=part)
    found.wait_for()
    return found.inner_text()


def texts(page: Any, count: int) -> list[str]:
    return [page.input_value(f"#answer-{number} textarea") for number in range(count)]


def test_a_picture_and_a_question(page: Any) -> None:
    show(page, DEMO / ITEMS[0].name, QUESTION)
    ask(page)
    assert texts(page, 2) == [ANSWER, ANSWER]
    full, reduced = (page.inner_text(f"#facts-{number}") for number in range(2))
    assert "s to the first token" in full and "tokens" in full and "visual tokens" not in full
    assert "the same answer" in reduced and "56.2 of 256 visual tokens per layer" in reduced
    assert "duet (budget 0.22), batch of 1, 256 visual tokens per sample unreduced" in page.inner_text("#report-0")
    assert "duet at 22 %, at the entry to the decoder: 90 of 256 alive" in page.inner_text("#step-0")
    assert page.locator("#scores-0 img").is_visible()
    assert (
        not page.locator("#answer-2").is_visible()
        and not page.locator("#view-1").is_visible()
        and not page.locator("#problem").is_visible()
    )


def test_the_slider_walks_through_the_depth(page: Any) -> None:
    show(page, DEMO / ITEMS[0].name, QUESTION)
    ask(page)
    seen, there = (
        [],
        {
            -1: "in the vision tower: 256 of 256",
            0: "at the entry to the decoder: 90",
            6: "at layer 6: 45",
            11: "at layer 11: 0",
        },
    )
    for layer, words in there.items():
        set_to(page, "depth", str(layer))
        page.locator("#step-0").get_by_text(words).wait_for()
        seen.append((page.get_attribute("#patches-0 img", "src"), page.locator("#scores-0 img").is_visible()))
    assert len({source for source, _ in seen}) == 4
    # nobody is ranked in the tower, and where all leave
    assert [scored for _, scored in seen] == [False, True, True, False]
    set_to(page, "depth", "0")
    page.locator("#step-0").get_by_text("at the entry").wait_for()
    picture = page.locator("#patches-0 img")
    box = picture.bounding_box()
    picture.click(position={"x": box["width"] * 4.5 / 16, "y": box["height"] * 10.5 / 16})
    page.locator("#story").get_by_text("duet at 22 %: Row 11, column 5 ").wait_for()


def test_the_handle_of_the_slider_moves_it_too(page: Any) -> None:
    show(page, DEMO / ITEMS[0].name, QUESTION)
    ask(page)
    page.locator("#depth input[type=range]").press("End")
    page.locator("#step-0").get_by_text("at layer 11: 0 of 256 alive").wait_for()


def test_two_methods_are_compared(page: Any) -> None:
    show(page, DEMO / ITEMS[0].name, QUESTION)
    assert not page.locator("#method-1").is_visible()
    page.check("#compare input")
    page.locator("#method-1").wait_for()
    choose(page, "method-1", "visionzip")
    more(page, 1)
    set_to(page, "budget-1", "64")
    ask(page)
    page.locator("#view-1 #patches-1 img").wait_for()
    assert texts(page, 3)[0] == ANSWER and all(texts(page, 3))
    assert "visionzip at 64 tokens, at the entry to the decoder: 64 of 256 alive" in page.inner_text("#step-1")
    assert "visionzip (budget 64)" in page.inner_text("#report-1") and "duet (budget 0.22)" in page.inner_text(
        "#report-0"
    )


def test_schedule_tower_and_other_settings(page: Any) -> None:
    show(page, DEMO / ITEMS[0].name, QUESTION)
    more(page)
    own = {"schedule-0": "((3, 0.5), (8, 0.25))", "settings-0": "duet_dominant=60\nduet_contextual=4"}
    for control, value in {"budget-0": "none", **own}.items():
        set_to(page, control, value)
    choose(page, "tower-0", "contrast")
    set_to(page, "keep-0", "0.5")
    ask(page)
    assert "visual tokens per layer, measured: 64 x3, 32 x5, 16 x4" in page.inner_text("#report-0")
    assert "contrast+duet" in page.inner_text("#step-0")
    set_to(page, "depth", "-1")
    page.locator("#step-0").get_by_text("in the vision tower: 128 of 256 alive").wait_for()


def test_answers_are_written_side_by_side(browser: Any, endless: str) -> None:
    page = opened(browser, endless)
    show(page, DEMO / ITEMS[0].name, QUESTION)
    page.locator("#longest input[type=number]").fill("150")
    begin(page)
    moments = []
    deadline = time.time() + 60
    while time.time() < deadline and not page.locator("#report-0 table").count():
        moments.append(tuple(map(len, texts(page, 2))))
        page.wait_for_timeout(20)
    final = tuple(map(len, texts(page, 2)))
    half_way = {pair for pair in moments if all(0 < now < end for now, end in zip(pair, final, strict=True))}
    assert len(half_way) >= 3  # both were growing
    assert all("150 tokens" in page.inner_text(f"#facts-{number}") for number in range(2))
    page.close()


def test_stop_ends_the_answers(browser: Any, endless: str) -> None:
    page = opened(browser, endless)
    show(page, DEMO / ITEMS[0].name, QUESTION)
    page.locator("#longest input[type=number]").fill("512")
    begin(page)
    page.wait_for_function("document.querySelector('#answer-1 textarea').value.length > 0")
    page.click("#stop")
    page.wait_for_timeout(500)
    before = texts(page, 2)
    page.wait_for_timeout(500)
    assert texts(page, 2) == before and not page.locator("#report-0 table").count()
    page.locator("#longest input[type=number]").fill("4")
    ask(page)  # and the next question is answered
    assert "4 tokens" in page.inner_text("#facts-1")
    page.close()


def test_a_clip_and_a_question(browser: Any) -> None:
    pytest.importorskip("av", reason="needs PyAV")
    with served(
        sys.executable,
        "-m",
        "duet_vlm.cli.main",
        "app",
        "--model",
        "tiny-video",
        "--method",
        "frames+duet",
        "--budget",
        "0.3",
    ) as found:
        page = opened(browser, found)
        assert all(texts(page, 2)) and "frames+duet at 30 %, at the entry to the decoder:" in page.inner_text("#step-0")
        take_example(page, 0)
        ask(page)
        assert all(texts(page, 2)) and "frames+duet at 30 %, at the entry to the decoder:" in page.inner_text("#step-0")
        box = page.locator("#patches-0 img").bounding_box()
        page.locator("#patches-0 img").click(position={"x": box["width"] * 0.01, "y": box["height"] * 0.51})
        page.locator("#story").get_by_text("Step 5, row 1, column 1 ").wait_for()
        page.close()


def test_uploads_go_with_the_process(browser: Any, tmp_path: Path) -> None:
    with served(TMPDIR=str(tmp_path)) as found:
        page = opened(browser, found)
        show(page, DEMO / ITEMS[0].name, QUESTION)
        assert list(tmp_path.glob("duet-vlm-app-*/**/scene_1.png"))
        page.close()
    assert not list(tmp_path.glob("duet-vlm-app-*"))


def test_two_users_at_once(browser: Any, address: str) -> None:
    """Each in a browser of their own: another picture, another question, another method; nobody sees what is the
    other's."""
    pages = [opened(browser, address) for _ in range(2)]  # playwright makes a browser context for each
    methods = ("duet", "pyramiddrop")
    for page, item, method in zip(pages, ITEMS[:2], methods, strict=True):
        show(page, DEMO / item.name, item.questions[0][0])
        set_to(page, "method-0", method)
        set_to(page, "share-0", "33")
    for page in pages:
        begin(page)
    for number, (page, method) in enumerate(zip(pages, methods, strict=True)):
        page.locator("#report-0 table").wait_for()
        assert texts(page, 1) == [stock(number)]
        assert f"{method} (budget 0.33)" in page.inner_text("#report-0")
    for page, method in zip(pages, methods, strict=True):
        set_to(page, "depth", "9")
        page.locator("#step-0").get_by_text(f"{method} at 33 %, at layer 9").wait_for()
    for page in pages:
        page.close()


def in_sight(page: Any, *places: str) -> None:
    """Each of these lies in the window as it stands, whole, and nothing was scrolled for it."""
    width, height = page.viewport_size["width"], page.viewport_size["height"]
    for place in places:
        box = page.locator(place).first.bounding_box()
        assert box is not None, place
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, (place, box)
        assert box["y"] >= 0 and box["y"] + box["height"] <= height, (place, box)
    assert page.evaluate("scrollY") == 0


def colours(page: Any, place: str) -> set[tuple[int, ...]]:
    """Colours of a place in a picture of the window as it stands."""
    box = page.locator(place).first.bounding_box()
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    corners = (box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"])
    return {colour for _, colour in shot.crop(tuple(map(round, corners))).getcolors(1 << 24) or ()}


LAPTOP = {"width": 1360, "height": 768}


def test_all_that_one_question_needs_is_above_the_fold(browser: Any, address: str) -> None:
    """A laptop's window: what is asked with, the examples, then answers and the first pictures, without scrolling."""
    page = opened(browser, address, **LAPTOP)
    in_sight(page, "#file", "#question", "#ask", "#stop", "#method-0", "#share-0", "#examples", "#status")
    thumbs = page.locator("#examples img")
    assert thumbs.count() == len(ITEMS)
    for number in range(thumbs.count()):
        page.wait_for_function("n => document.querySelectorAll('#examples img')[n].naturalWidth > 50", arg=number)
        in_sight(page, f"#examples img >> nth={number}")
    take_example(page, 1)
    begin(page)
    page.locator("#report-0 table").wait_for()
    page.locator("#patches-0 img").wait_for()
    in_sight(page, "#status", "#answer-0", "#answer-1", "#facts-0", "#facts-1", "#depth", "#step-0")
    assert page.locator("#patches-0 img").bounding_box()["y"] < LAPTOP["height"] - 100
    page.close()


def test_the_page_opens_with_its_first_example_answered(browser: Any, address: str) -> None:
    """Each visitor sees it, in the first window and without a click; the place for a picture of one's own stays free."""
    for _ in range(2):
        page = opened(browser, address, **LAPTOP)
        page.locator("#patches-0 img").wait_for()
        assert page.input_value("#question textarea") == QUESTION and texts(page, 2) == [ANSWER, ANSWER]
        in_sight(page, "#preview img", "#status", "#answer-0", "#answer-1", "#facts-0", "#facts-1", "#depth", "#step-0")
        assert page.inner_text("#status").startswith("The first example, asked when the page was started")
        assert "duet at 22 %, at the entry to the decoder: 90 of 256 alive" in page.inner_text("#step-0")
        assert "56.2 of 256 visual tokens per layer" in page.inner_text("#facts-1")
        assert page.locator("#patches-0 img").bounding_box()["y"] < LAPTOP["height"] - 200
        assert page.locator("#file input[type=file]").count() == 1
        page.close()


def test_the_example_that_the_page_opens_with_can_be_asked_about(page: Any) -> None:
    set_to(page, "share-0", "33")
    page.fill("#question textarea", ITEMS[0].questions[1][0])
    ask(page)
    assert "duet at 33 %" in page.inner_text("#step-0") and texts(page, 1) != [ANSWER]
    show(page, DEMO / ITEMS[1].name, ITEMS[1].questions[0][0])  # and one's own comes in its place
    ask(page)
    assert texts(page, 1) == [stock(1)]


def test_that_it_works_is_seen_at_once(browser: Any, endless: str) -> None:
    page = opened(browser, endless, **LAPTOP)
    take_example(page, 0)
    page.locator("#longest input[type=number]").fill("512")
    page.evaluate("scrollTo(0, 0)")
    page.evaluate("document.querySelector('#ask').click()")  # no wait for what the server says
    page.wait_for_timeout(20)
    assert page.inner_text("#status").startswith("Working: ")
    in_sight(page, "#status", "#answer-0", "#answer-1")
    page.locator("#status").get_by_text("Working: answers are written").wait_for()
    page.click("#stop")
    page.locator("#status").get_by_text("Stopped").wait_for()
    page.close()


def test_an_error_is_above_the_fold(browser: Any, address: str) -> None:
    page = opened(browser, address, **LAPTOP)
    page.fill("#question textarea", "")
    page.click("#ask")
    problem(page, "no question")
    in_sight(page, "#problem", "#problem [role=alert]")
    assert (253, 238, 233) in colours(page, "#problem")  # its ground, in the picture of the window
    page.wait_for_function("!document.querySelector('#status').innerText.includes('Working')")
    page.close()


def test_the_budget_is_a_slider(page: Any) -> None:
    show(page, DEMO / ITEMS[0].name, QUESTION)
    handle = page.locator("#share-0 input[type=range]")
    for _ in range(11):
        handle.press("ArrowLeft")
    ask(page)
    assert "duet at 11 %" in page.inner_text("#step-0") and " 28.0 of 256 visual tokens" in page.inner_text("#facts-1")
    more(page)
    set_to(page, "budget-0", "64")
    ask(page)
    assert "duet at 64 tokens" in page.inner_text("#step-0")
    handle.press("ArrowRight")  # who moves it means it
    page.wait_for_function("document.querySelector('#budget-0 textarea, #budget-0 input').value === ''")
    ask(page)
    assert "duet at 12 %" in page.inner_text("#step-0")


def test_what_the_command_line_says_of_the_budget_stands_on_the_slider_or_beside_it() -> None:
    from duet_vlm.app.page import _budgeted, _on_slider

    starts = {"0.22": (22, ""), "1.0": (100, ""), "0.225": (22, "0.225"), "64": (22, "64"), "": (22, "none")}
    assert {text: _on_slider(text) for text in starts} == starts
    rest = ["", "none", "", ""]
    meant = {(22, ""): "22%", (22, "0.225"): "0.225", (22, " 64 "): "64", (22, "none"): "", (7, None): "7%"}
    for (share, exact), text in meant.items():
        assert _budgeted(["duet", exact, *rest, share]) == ["duet", text, *rest]


def test_the_slider_of_the_depth_opens_where_something_was_lost(page: Any) -> None:
    """FastV reads two layers first; DUET drops at the entry: the later of the two is where both have something to show."""
    show(page, DEMO / ITEMS[0].name, QUESTION)
    page.check("#compare input")
    ask(page)
    assert page.input_value("#depth input[type=number]") == "2"
    page.locator("#step-1").get_by_text("fastv at 22 %, at layer 2: 16 of 256 alive").wait_for()
    assert "duet at 22 %, at layer 2: 90 of 256 alive" in page.inner_text("#step-0")


def test_both_figures_of_speed_are_named_and_explained(page: Any) -> None:
    show(page, DEMO / ITEMS[0].name, QUESTION)
    ask(page)
    facts, report = page.inner_text("#facts-1"), page.inner_text("#report-0")
    (bound,) = re.findall(r"FLOPs-bound speed-up of the decoder's prefill: ([\d.]+x)", report)
    assert re.search(r"first token [\d.]+x as fast, measured", facts) and f"{bound} by FLOPs of the decoder" in facts
    words = page.inner_text("#speeds")
    assert "Measured: " in words and "By FLOPs: " in words and "vision tower" in words


def test_reports_are_readable_on_a_phone(browser: Any, address: str) -> None:
    page = opened(browser, address, width=430, height=900)
    show(page, DEMO / ITEMS[0].name, QUESTION)
    page.check("#compare input")
    begin(page)
    page.locator("#report-1 table").wait_for()
    one, other = (page.locator(f"#report-{number}").bounding_box() for number in range(2))
    assert other["y"] >= one["y"] + one["height"] and one["width"] > 300 and other["width"] > 300
    for number in range(2):
        report, cell = page.locator(f"#report-{number} .report"), page.locator(f"#report-{number} td").first
        assert report.evaluate("e => e.scrollWidth <= e.clientWidth")
        assert cell.evaluate("e => parseFloat(getComputedStyle(e).fontSize)") >= 11
    assert page.evaluate("document.documentElement.scrollWidth") <= 430
    page.close()


def test_a_phone_is_shown_that_it_works(browser: Any, address: str) -> None:
    page = opened(browser, address, width=430, height=900)
    show(page, DEMO / ITEMS[0].name, QUESTION)
    assert page.evaluate("scrollY") == 0  # nothing was asked yet
    begin(page)
    page.locator("#report-0 table").wait_for()
    box, answer = page.locator("#status").bounding_box(), page.locator("#answer-1").bounding_box()
    assert -1 < box["y"] and answer["y"] + answer["height"] <= 900
    page.close()


def test_an_example_is_one_click(page: Any) -> None:
    take_example(page, 1)
    assert page.input_value("#question textarea") == ITEMS[1].questions[0][0]
    ask(page)
    assert texts(page, 1) == [stock(1)]


def test_errors_are_said_in_words(page: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    page.set_input_files("#file input[type=file]", tmp_path / "notes.png")
    assert problem(page, "notes") == "notes.png: not an image that can be read"
    page.locator("#file button[aria-label]").first.click()
    page.locator("#problem").wait_for(state="hidden")
    page.click("#ask")  # the example that the page opened with has gone, too
    assert problem(page, "nothing to look at") == "nothing to look at: drop a picture or a clip first"
    show(page, DEMO / ITEMS[0].name, "")
    page.click("#ask")
    assert problem(page, "no question") == "no question: write what you want to know about the picture"
    page.fill("#question textarea", QUESTION)
    more(page)
    for control, value, words in (
        ("budget-0", "1.5", "budget 1.5: a fraction of the visual tokens is above 0 and up to 1.0"),
        ("budget-0", "some", "budget some: give a token count (64), a fraction (0.22) or a percentage (22%)"),
        ("method-0", "fastw", "unknown method 'fastw' (did you mean 'fastv'"),
        ("method-0", "adsc", "adsc cannot reach 56.32 mean visual tokens per layer on a span of 256 tokens"),
    ):
        set_to(page, control, value)
        page.click("#ask")
        assert problem(page, words).startswith(words)
        set_to(page, "budget-0", "0.22")
    set_to(page, "method-0", "duet")
    ask(page)  # and all is well again
    assert not page.locator("#problem").is_visible() and texts(page, 1) == [ANSWER]


def test_a_large_upload_is_refused_in_words_and_by_the_server(page: Any, address: str, tmp_path: Path) -> None:
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(200_000_000)  # takes no room on the disk
    page.set_input_files("#file input[type=file]", tmp_path / "large.png")
    page.get_by_text('exceed the maximum allowed size of 100.0 Mb: "large.png"').wait_for()
    command = [
        "curl",
        "-s",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        "-F",
        f"files=@{tmp_path / 'large.png'}",
        f"{address}gradio_api/upload",
    ]
    if shutil.which("curl"):
        assert subprocess.run(command, capture_output=True, text=True).stdout == "413"


def test_files_of_the_machine_are_not_served(address: str) -> None:
    for path in (ROOT / "README.md", "/etc/hostname"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/file={path}")
        assert refused.value.code in (403, 404)


def test_hostile_names_and_questions_run_nothing(page: Any, tmp_path: Path) -> None:
    attack = "<img src=x onerror=document.title=1>"
    show(page, DEMO / ITEMS[0].name, attack)
    set_to(page, "method-0", attack)
    page.click("#ask")
    assert attack in problem(page, "unknown method")
    set_to(page, "method-0", "duet")
    ask(page)
    assert page.title() == "duet-vlm"


def test_a_narrow_window_shows_all_of_it(browser: Any, address: str) -> None:
    page = opened(browser, address, width=390)
    show(page, DEMO / ITEMS[0].name, QUESTION)
    ask(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_the_example_runs_as_a_space(browser: Any, tmp_path: Path) -> None:
    """Copied to a folder of its own, and started as a Space starts it: without options, told by the environment where
    to listen."""
    shutil.copy(ROOT / "examples/space/app.py", tmp_path / "app.py")
    with served(
        sys.executable, str(tmp_path / "app.py"), GRADIO_SERVER_NAME="127.0.0.1", DUET_VLM_MODEL="tiny"
    ) as found:
        page = opened(browser, found)
        show(page, DEMO / ITEMS[0].name, QUESTION)
        ask(page)
        assert texts(page, 2) == [ANSWER, ANSWER]
        page.close()


def test_pictures_for_the_docs(browser: Any, address: str, tmp_path: Path) -> None:
    made = take(browser, address, tmp_path)
    assert [path.name for path in made] == ["app-page.png", "app-compare.png"]
    for path in made:
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(10**6) or []) > 100
