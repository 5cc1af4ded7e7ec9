"""Pictures of a report for the docs: `python tests/report_pictures.py REPORT_FOLDER PICTURE_FOLDER`, or `make
pictures`."""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def take(browser: Any, report: Path, folder: Path) -> list[Path]:
    """Three views of a page, and the plots of its first result."""
    folder.mkdir(parents=True, exist_ok=True)
    address = (report / "report.html").absolute().as_uri()
    made, first = [], ""
    for name, width, height, scheme in (
        ("page", 1400, 900, "light"),
        ("details", 1000, 900, "dark"),
        ("narrow", 390, 760, "light"),
    ):
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.goto(address)
        first = page.locator("section.result").first.get_attribute("id")
        if name == "details":
            budgets = page.locator("select[name=budget]").first
            budgets.select_option(index=budgets.locator("option").count() - 1)
            page.get_by_role("button", name="kept, %", exact=True).first.click()
            page.locator("tbody.method:visible th.run button").first.click()
        made.append(folder / f"report-{name}.png")
        small(page.screenshot()).save(made[-1], optimize=True)
        page.close()
    for name in ("tokens", "time", "kinds"):
        plot = report / f"{first}-{name}.png"
        if plot.exists():
            made.append(folder / f"report-{name}.png")
            small(plot.read_bytes()).save(made[-1], optimize=True)
    return made


def small(png: bytes) -> Image.Image:
    """With 256 colours, which flat pictures do not miss."""
    return Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE)


def main() -> None:
    from playwright.sync_api import sync_playwright

    report, folder = map(Path, sys.argv[1:])
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for path in take(browser, report, folder):
            print(f"wrote {path}")
        browser.close()


if __name__ == "__main__":
    main()
