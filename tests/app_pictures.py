"""The page of ``duet-vlm app`` in a browser, and pictures of it for the docs: `python tests/app_pictures.py
PICTURE_FOLDER`, or `make pictures`."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from report_pictures import CHROMIUM, small

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "src/duet_vlm/evaluation/tiny/demo"


@contextlib.contextmanager
def served(*command: str, port: int | None = None, **environment: str) -> Iterator[str]:
    """The address of the page that a command serves, until the end of the block."""
    if port is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    words = command or (sys.executable, "-m", "duet_vlm.cli.main", "app")
    words = (*words, "--port", str(port)) if "app" in words else words
    place = {"PYTHONPATH": str(ROOT / "src"), "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(words, env=os.environ | place | environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}" in line, line
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(20)


def opened(
    browser: Any, address: str, watch: Callable[[Any], None] = lambda page: None, width: int = 1400, height: int = 1000
) -> Any:
    """The page in a window of its own, with all that makes it; ``watch`` sees it before it is loaded."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
    page.set_default_timeout(30_000)
    watch(page)
    page.goto(address)
    page.locator("#examples button").first.wait_for()
    page.locator("#report-0 table").wait_for()  # of the example that it opens with
    page.wait_for_function("document.querySelector('#answer-1 textarea').value")
    return page


def show(page: Any, picture: Path, question: str) -> None:
    """Drop a picture and write a question."""
    page.set_input_files("#file input[type=file]", picture)
    page.locator("#file").get_by_text(picture.stem).wait_for()
    page.fill("#question textarea", question)


def set_to(page: Any, control: str, value: str) -> None:
    """Write into a box, by its id."""
    box = page.locator(f"#{control} textarea, #{control} input").first
    box.fill(value)
    box.press("Tab")


def more(page: Any, number: int = 0) -> None:
    """Open the settings of a method that are not shown at once."""
    page.get_by_role("button", name="More settings").nth(number).click()
    page.locator(f"#budget-{number}").wait_for()


def choose(page: Any, control: str, value: str) -> None:
    """Choose in a list, by its id."""
    page.locator(f"#{control} input").click()
    page.get_by_role("option", name=value, exact=True).click()


def take_example(page: Any, number: int) -> None:
    """Click an example, and wait until it is taken."""
    page.locator("#examples button").nth(number).click()
    page.locator("#file").get_by_text(re.compile("picture-|clip|page")).first.wait_for()


def begin(page: Any) -> None:
    """Click, and wait until what was answered before is gone."""
    page.click("#ask")
    page.locator("#report-0 table").wait_for(state="detached")


def ask(page: Any) -> None:
    """Click, and wait until the slider's pictures are there."""
    begin(page)
    page.locator("#report-0 table").wait_for()
    page.locator("#report-0").scroll_into_view_if_needed()  # pictures are loaded where they are looked at
    page.locator("#patches-0 img").wait_for()


def take(browser: Any, address: str, folder: Path) -> list[Path]:
    """A question with one method as the page opens, and two methods half way through the depth."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    page = opened(browser, address)
    show(page, DEMO / "scene_1.png", "What shape is the yellow object?")
    for name in ("page", "compare"):
        if name == "compare":
            page.check("#compare input")
        ask(page)
        if name == "compare":
            set_to(page, "depth", "6")
            page.get_by_text("duet at 22 %, at layer 6").wait_for()
            page.locator("#patches-0 img").click(position={"x": 30, "y": 30})
            page.locator("#story").get_by_text("duet at 22 %").wait_for()
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)  # of Gradio's own movements
        made.append(folder / f"app-{name}.png")
        small(page.screenshot(full_page=True)).save(made[-1], optimize=True)
    page.close()
    return made


def main() -> None:
    from playwright.sync_api import sync_playwright

    with served() as address, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for path in take(browser, address, Path(sys.argv[1])):
            print(f"wrote {path}")
        browser.close()


if __name__ == "__main__":
    main()
