"""duet-vlm report: tables say what the file says, plots show it, the page is inert and self-contained, bad files lose
nothing."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_data import KINDS, made_up
from typer.testing import CliRunner

from duet_vlm.cli.main import app
from duet_vlm.evaluation.report import columns, markdown, plots, style, write
from duet_vlm.evaluation.report.check import check
from duet_vlm.viz import colors

RESULT = made_up()
# where the number of a column stands in the file, and by how much the table multiplies it: written down here once more
# on purpose
PLACES: dict[str, tuple[tuple[str, ...], float]] = {
    "nominal tokens": (("tokens", "nominal"), 1),
    "measured tokens": (("tokens", "measured"), 1),
    "accuracy": (("accuracy",), 1),
    "kept, %": (("kept",), 100),
    "of oracle, %": (("of_oracle",), 100),
    "difference to duet, points": (("against", "difference"), 100),
    "adjusted p": (("against", "p_adjusted"), 1),
    "FLOPs, %": (("flops_share",), 100),
    "KV cache, %": (("kv_share",), 100),
    "prefill, ms": (("prefill", "ms"), 1),
    "time ratio": (("prefill", "ratio"), 1),
    "recall at entry, %": (("recall", "entry"), 100),
    "recall with merged, %": (("recall", "entry_or_merged"), 100),
    "recall midway, %": (("recall", "middle"), 100),
} | {kind: (("kinds", kind, "accuracy"), 1) for kind in KINDS}
INTERVALS = {
    "accuracy": lambda run: run["interval"],
    "kept, %": lambda run: run["kept_interval"],
    "difference to duet, points": lambda run: run["against"]["interval"],
    "prefill, ms": lambda run: [run["prefill"]["low"], run["prefill"]["high"]],
    "time ratio": lambda run: run["prefill"]["ratio_interval"],
}


def looked_up(run: dict[str, Any], title: str) -> float | None:
    value: Any = run
    for key in PLACES[title][0]:
        value = value.get(key) if value else None
    return value


def save(folder: Path, result: Any, name: str = "methods.json") -> Path:
    path = folder / name
    path.write_text(result if isinstance(result, str) else json.dumps(result))
    return path


def call(*arguments: Any, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["report", *map(str, arguments)])
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return done


def near(text: str, truth: float, where: str) -> None:
    """``text`` is ``truth`` rounded to the places it shows."""
    if text.startswith("<"):
        assert truth < float(text[1:]), where
        return
    places = len(text.partition(".")[2])
    assert abs(float(text) - truth) <= 0.5 * 10**-places + 1e-9, f"{where}: {text} for {truth}"


def label_of(run: dict[str, Any]) -> str:
    return run["label"] if run["budget"] is None else f"{run['label']} {run['budget'] * 100:g} %"


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a markdown page: rows of cells, without the line of dashes."""
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.M)
    rows = [
        [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.strip().split("\n")]
        for block in blocks
    ]
    return [[table[0], *table[2:]] for table in rows]


def agree(head: list[str], rows: dict[str, list[str]], result: dict[str, Any]) -> int:
    """Every cell says what the file says; how many numbers were compared."""
    compared = 0
    assert set(rows) == {label_of(run) for run in result["runs"]}
    for run in result["runs"]:
        cells = dict(zip(head, rows[label_of(run)], strict=True))
        if run["status"] != "ok":
            assert f"infeasible, floor {run['floor']:.1f}" in cells.values()
            assert set(cells.values()) == {f"infeasible, floor {run['floor']:.1f}", "-"}
            continue
        for title, text in cells.items():
            truth, where = looked_up(run, title), f"{run['id']}, {title}"
            if truth is None:
                assert text == "-", where
                continue
            scale, (number, _, rest) = PLACES[title][1], text.partition(" ")
            near(number, truth * scale, where)
            compared += 1
            if title in INTERVALS and rest:
                for edge, expected in zip(
                    re.findall(r"(?<![\d.])[+-]?[\d.]+", rest.replace("-", " ") if " to " not in rest else rest),
                    INTERVALS[title](run),
                    strict=True,
                ):
                    near(edge, expected * scale, where)
                    compared += 1
    return compared


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A report of the large made-up result, by the command."""
    folder = tmp_path_factory.mktemp("report")
    call(save(folder, RESULT), "--out", folder / "out")
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


def test_files_of_a_report(made: dict[str, bytes]) -> None:
    stems = [f"tiny-methods-{name}" for name in ("tokens", "time", "kinds")]
    assert sorted(made) == sorted(
        ["report.html", "tiny-methods.md", *(f"{stem}.{form}" for stem in stems for form in ("png", "svg"))]
    )
    assert all(made[f"{stem}.png"].startswith(b"\x89PNG") for stem in stems)
    for stem in stems:
        assert ET.fromstring(made[f"{stem}.svg"]).tag.endswith("svg")
    assert all(f"({stem}.png)" in made["tiny-methods.md"].decode() for stem in stems)


def test_markdown_tables_say_what_the_file_says(made: dict[str, bytes]) -> None:
    _, *found = tables(made["tiny-methods.md"].decode())
    compared = sum(
        agree(head[1:], {row[0].replace("\\", ""): row[1:] for row in rows}, RESULT) for head, *rows in found
    )
    assert {title for head, *_ in found for title in head[1:]} == set(PLACES)
    assert compared > 1000


def test_compact_table_says_what_the_file_says() -> None:
    ((head, *rows),) = tables(markdown.compact(RESULT))
    assert head == ["run", "measured tokens", "accuracy", "kept, %", *KINDS]
    assert agree(head[1:], {row[0].replace("\\", ""): row[1:] for row in rows}, RESULT) > 500


def test_matrix_says_what_the_file_says(made: dict[str, bytes]) -> None:
    (head, *rows), *_ = tables(made["tiny-methods.md"].decode())
    assert head[1:] == ["33 %", "22 %", "11 %", "7 %", "5 %"]
    assert [row[0].replace("\\", "") for row in rows] == list(dict.fromkeys(run["label"] for run in RESULT["runs"][1:]))
    for run in RESULT["runs"][1:]:
        text = next(row for row in rows if row[0].replace("\\", "") == run["label"])[
            head.index(f"{run['budget'] * 100:g} %")
        ]
        if run["status"] != "ok":
            assert text == f"infeasible, floor {run['floor']:.1f}"
            continue
        for number, truth in zip(re.findall(r"[\d.]+", text), [run["kept"], *run["kept_interval"]], strict=True):
            near(number, 100 * truth, run["id"])
    assert f"accuracy is {RESULT['runs'][0]['accuracy']:.3f} (" in made["tiny-methods.md"].decode()


def test_matrix_leaves_what_was_not_run_empty() -> None:
    result = made_up(3, (0.22, 0.11))
    result["runs"] = [run for run in result["runs"] if run["id"] != "duet@0.11"]
    result["runs"][2]["budget"] = None
    ((head, *rows),) = tables(markdown.matrix(result))
    assert head[1:] == ["own settings", "22 %", "11 %"]
    # whatever the largest budget of each is
    assert [row[0] for row in rows] == [cell["label"] for cell in result["experiment"]["cells"]]
    assert [[cell != "-" for cell in row[1:]] for row in rows] == [
        [False, True, False],
        [True, False, True],
        [False, True, True],
    ]


def test_rows_go_from_large_to_small_budgets() -> None:
    shuffled = copy.deepcopy(RESULT)
    shuffled["runs"][1:] = shuffled["runs"][:0:-1]
    shuffled["runs"][5]["budget"] = 200  # tokens: more than a third of 256
    shuffled["runs"][9]["budget"] = None
    order = [run["budget"] for run in columns.ordered(shuffled)]
    shares = [2 if b is None else b if isinstance(b, float) else b / 256 for b in order[1:]]
    assert order[0] is None and order[1:3] == [None, 200]
    assert shares == sorted(shares, reverse=True)


class Page(HTMLParser):
    """The page as a browser would read it: elements with attributes, and the text of the table's cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_page_carries_the_numbers_of_the_file(made: dict[str, bytes]) -> None:
    page = Page(made["report.html"].decode())
    heads = [title.strip() for title in page.texts["th"][1 : 1 + len(PLACES)]]
    assert set(heads) == set(PLACES)
    cells = [attributes for attributes in page.all("td") if "data-group" in attributes]
    runs = {label_of(run): run for run in RESULT["runs"]}
    bodies = [" ".join(text.split("\n")[0].split()) for text in page.texts["th"][1 + len(PLACES) :]]
    assert len(cells) == len(bodies) * len(heads) and len(bodies) == len(runs)
    compared = 0
    for number, body in enumerate(bodies):
        run = next(
            run for label, run in runs.items() if body in (label, f"{label}infeasible, floor {run.get('floor', 0):.1f}")
        )
        for place, title in enumerate(heads):
            value = cells[number * len(heads) + place].get("data-value")
            truth = looked_up(run, title)
            assert (value is None) == (truth is None)
            if value is not None:
                assert float(value) == truth  # bit for bit: sorting must not see rounded numbers
                compared += 1
    assert compared > 1000


def test_page_needs_nothing_from_outside(made: dict[str, bytes]) -> None:
    text = made["report.html"].decode()
    page = Page(text)
    for tag, attributes in page.elements:
        for key in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert (attributes.get(key) or "#").startswith(("#", "data:,")), (tag, attributes)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    (policy,) = [entry["content"] for entry in page.all("meta") if entry.get("http-equiv") == "Content-Security-Policy"]
    assert policy and "default-src 'none'" in policy


def test_page_is_well_formed(made: dict[str, bytes]) -> None:
    page = Page(made["report.html"].decode())  # asserts that every element closes in its turn
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {value for _, a in page.elements for key in ("aria-controls", "aria-labelledby") if (value := a.get(key))}
    assert used and used <= set(ids)
    svg_ids = {
        v[1:] for _, a in page.elements for key in ("xlink:href", "href") if (v := a.get(key)) and v.startswith("#")
    }
    assert svg_ids <= set(ids)
    assert all(attributes.get("role") == "img" and attributes.get("aria-label") for attributes in page.all("svg"))


def test_infeasible_rows_have_their_floor(made: dict[str, bytes]) -> None:
    refused = [run for run in RESULT["runs"] if run["status"] == "infeasible"]
    assert len(refused) == 3
    for text in (made["tiny-methods.md"].decode(), made["report.html"].decode()):
        assert text.count("infeasible, floor 23.0") >= 2 and "infeasible, floor 15.4" in text


HOSTILE = """<img src=x onerror=alert(1)>|</td>`</script><script>alert(1)</script>--> $\\frac{ "' & _a_ *b* [c](http://d)
\x00\x1b\u202e# </style>]]>"""


def hostile() -> dict[str, Any]:
    """A result in which every text is an attempt to break out of the page, the table or the folder."""
    result = made_up(labels=3, budgets=(0.22,))
    result |= {"name": "../../../etc/passwd" + HOSTILE, "task": HOSTILE}
    result["environment"] = {HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}}
    result["model"] = {"name": HOSTILE}
    result["experiment"] |= {"against": HOSTILE, "model": HOSTILE, HOSTILE: HOSTILE}
    for number, run in enumerate(result["runs"]):
        run |= {"id": f"{HOSTILE}{number}", "label": f"{number}{HOSTILE}", "settings": {HOSTILE: HOSTILE}}
        run["kinds"] = {HOSTILE: run["kinds"]["count"]}
        if number:
            run["method"] = HOSTILE
        if run["against"]:
            run["against"]["run"] = HOSTILE
    result["runs"][-1] = {key: result["runs"][-1][key] for key in ("id", "label", "method", "budget", "settings")}
    result["runs"][-1] |= {"status": HOSTILE, "floor": 3.0, "message": HOSTILE}
    return result


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    call(save(tmp_path, hostile()), "--out", tmp_path / "deep" / "out")
    files = list(tmp_path.rglob("*"))
    assert {path.parent for path in files if path.is_file()} == {tmp_path, tmp_path / "deep" / "out"}
    assert all(re.fullmatch(r"[a-z0-9.-]+", path.name) for path in files)
    page = Page((tmp_path / "deep" / "out" / "report.html").read_text())
    assert page.open == [] and len(page.all("script")) == 1 and page.all("img") == []
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert any(HOSTILE.splitlines()[0] in text for text in page.texts["th"])
    text = next((tmp_path / "deep" / "out").glob("*.md")).read_text()
    assert not re.search(r"<(img|script|/td|/style)|[\x00\x1b\u202e]", text)
    found = tables(text)
    assert [len(rows) for rows in found] == [1 + 3, 1 + 4, 1 + 4, 1 + 4]
    assert all(len(row) == len(rows[0]) for rows in found for row in rows)
    for path in (tmp_path / "deep" / "out").glob("*.svg"):
        tags = {element.tag.rpartition("}")[2] for element in ET.parse(path).iter()}
        assert "script" not in tags and "svg" in tags


def test_markdown_escape_shows_the_text_itself() -> None:
    assert (
        markdown.escape("a|b\n\x00c <i> `d` read_digit _e_ 2*3") == "a\\|b c &lt;i&gt; \\`d\\` read_digit \\_e\\_ 2\\*3"
    )


def edited(change: Callable[[dict[str, Any]], Any]) -> str:
    result = made_up(labels=3, budgets=(0.22,))
    change(result)
    return json.dumps(result)


WHOLE = json.dumps(made_up(labels=2, budgets=(0.22,)))
BAD = {
    "not JSON": ("accuracy: 1", "not JSON"),
    "truncated": (WHOLE[: len(WHOLE) // 2], "cut short"),
    "empty": ("", "not JSON"),
    "a list": ("[]", "no result file"),
    "another format": (edited(lambda r: r.update(format=2)), "format 2"),
    "no runs": (edited(lambda r: r.pop("runs")), "runs"),
    "empty runs": (edited(lambda r: r.update(runs=[])), "'runs' is []"),
    "no tokens": (edited(lambda r: r["runs"][1].pop("tokens")), "run 1 ('duet@0.22') lacks 'tokens'"),
    "no measured": (edited(lambda r: r["runs"][2]["tokens"].pop("measured")), "lacks 'measured'"),
    "text for a number": (
        edited(lambda r: r["runs"][1].update(accuracy="high")),
        "'accuracy' is 'high', wanted a number from 0 to 1",
    ),
    "not a number": (edited(lambda r: r["runs"][1].update(flops=math.nan)), "'flops' is nan, wanted a finite number"),
    "short interval": (edited(lambda r: r["runs"][1].update(interval=[0.1])), "wanted two numbers"),
    "kind": (edited(lambda r: r["runs"][1]["kinds"]["count"].pop("n")), "'count' lacks 'n'"),
    "time of nothing": (edited(lambda r: r["runs"][1]["prefill"].update(ms=0)), "'ms' is 0, wanted a number above 0"),
    "twice": (edited(lambda r: r["runs"].append(r["runs"][1])), "two of this id"),
    "no baseline": (edited(lambda r: r["runs"].pop(0)), "the full model"),
    "seeds": (edited(lambda r: r["experiment"].update(seeds=3)), "'seeds' is 3"),
    "questions": (edited(lambda r: r["questions"].pop("count")), "lacks 'count'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_and_lose_nothing(name: str, tmp_path: Path) -> None:
    content, said = BAD[name]
    good, bad, out = save(tmp_path, RESULT, "good.json"), save(tmp_path, content, "bad.json"), tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("an earlier report")
    shown = call(good, bad, "--out", out, code=2)
    assert shown.stderr.startswith("error: ") and str(bad) in shown.stderr and said in shown.stderr
    assert shown.stderr.count("\n") == 1 and shown.stdout == ""
    assert [path.name for path in out.iterdir()] == ["report.html"] and (
        out / "report.html"
    ).read_text() == "an earlier report"


def test_missing_file(tmp_path: Path) -> None:
    assert "nowhere.json" in call(tmp_path / "nowhere.json", code=2).stderr


def test_check_accepts_what_may_be_absent() -> None:
    result = made_up(timed=False)
    for run in result["runs"]:
        for key in ("kept_interval", "solved", "recall", "against", "of_oracle", "seeds", "kv_share"):
            run.pop(key, None)
    check(result, "here")
    assert "tiny" in markdown.page(result, [], "again")


def test_untimed_results_have_no_plot_of_time(tmp_path: Path) -> None:
    call(save(tmp_path, made_up(3, (0.22, 0.11), timed=False)), "--out", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*-time.*")) and len(list((tmp_path / "out").glob("*.png"))) == 2
    assert "Prefill time was not measured" in (tmp_path / "out" / "report.html").read_text()


def test_one_run_and_nothing_feasible(tmp_path: Path) -> None:
    alone = made_up(2, (0.22,))
    alone["runs"] = alone["runs"][:1]
    call(save(tmp_path, alone), "--out", tmp_path / "alone")
    assert "No plots" in (tmp_path / "alone" / "report.html").read_text()
    refused = made_up(7, (0.05,))
    refused["runs"] = [run for run in refused["runs"] if run["method"] == "none" or run["status"] != "ok"]
    assert len(refused["runs"]) == 2
    call(save(tmp_path, refused), "--out", tmp_path / "refused")
    assert {path.name for path in (tmp_path / "refused").glob("*.svg")} == {"tiny-methods-kinds.svg"}


def test_several_files_share_a_page(tmp_path: Path) -> None:
    small = made_up(2, (0.22,), timed=False)
    paths = [
        save(tmp_path, small, "a.json"),
        save(tmp_path, small, "b.json"),
        save(tmp_path, small | {"task": "tiny-crowded"}, "c.json"),
    ]
    shown = json.loads(call(*paths, "--out", tmp_path / "out", "--json").stdout)
    assert sorted(shown["files"]) == sorted(str(path) for path in (tmp_path / "out").iterdir())
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert [entry["id"] for entry in page.all("section")] == ["tiny-methods", "tiny-methods-2", "tiny-crowded-methods"]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert (tmp_path / "out" / "tiny-methods-2.md").exists()


@pytest.mark.parametrize("task", ["3d", "2024_photos", "1", "007"])
def test_a_task_whose_name_begins_with_a_digit(tmp_path: Path, task: str) -> None:
    """Ids and references of its drawings are those of a task with letters, but for the name."""

    def drawn(name: str) -> tuple[list[str], list[str]]:
        call(save(tmp_path, made_up(3, (0.22, 0.11)) | {"task": name}), "--out", tmp_path / name)
        page = Page((tmp_path / name / "report.html").read_text())
        assert page.open == []
        ids = [v for _, a in page.elements if (v := a.get("id"))]
        used = [
            v
            for _, a in page.elements
            for key, value in a.items()
            if value
            for v in (
                [value[1:]] if key.endswith("href") and value.startswith("#") else re.findall(r"url\(#([^)]+)\)", value)
            )
        ]
        return ids, used

    slug = task.replace("_", "-")
    ids, used = drawn(task)
    assert len(used) > 20 and set(used) <= set(ids)
    assert (ids, used) == tuple([re.sub(r"^letters\b", slug, v) for v in found] for found in drawn("letters"))


@pytest.mark.slow
def test_same_file_same_bytes(tmp_path: Path) -> None:
    """In another process too, whatever the order of hashes and a personal matplotlib style say; and nothing is loaded
    before it is needed."""
    path = save(tmp_path, made_up(4, (0.22, 0.11)))
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 9\nfont.size: 30\nsvg.hashsalt: mine\n")
    call(path, "--out", tmp_path / "here")
    code = "import sys, duet_vlm.evaluation.report; from duet_vlm.cli.main import app; assert 'matplotlib' not in sys.modules; app()"
    other = {"PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    subprocess.run(
        [sys.executable, "-c", code, "report", path, "--out", tmp_path / "there"], check=True, env=os.environ | other
    )
    here, there = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("here", "there"))
    assert len(here) == 8 and here == there


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install ".[viz]"' in call(save(tmp_path, WHOLE), "--out", tmp_path / "out", code=2).stderr
    assert not (tmp_path / "out").exists()


def test_help() -> None:
    text = call("--help").stdout
    assert "--out" in text and "FILE" in text


# ---- what the plots show


def drawn(make: Callable[[dict[str, Any]], Any], result: dict[str, Any]) -> set[tuple[float, float]]:
    """Every marker in data coordinates."""
    import matplotlib

    with matplotlib.rc_context(plots.RC):
        (axes,) = make(result).axes
    points = set()
    for line in axes.lines:
        if line.get_marker() not in ("None", "", None) and line.get_transform() == axes.transData:
            points |= {(round(float(x), 6), round(float(y), 6)) for x, y in line.get_xydata()}
    return points


def test_plots_show_measured_tokens_and_times() -> None:
    done = [run for run in RESULT["runs"] if run["status"] == "ok"]
    wanted = {(round(run["tokens"]["measured"], 6), round(100 * run["kept"], 6)) for run in done}
    assert drawn(plots.kept_against_tokens, RESULT) == wanted
    wanted = {(round(run["prefill"]["ms"], 6), round(100 * run["accuracy"], 6)) for run in done}
    assert drawn(plots.accuracy_against_time, RESULT) == wanted


def test_heat_map_shows_every_kind_of_every_run() -> None:
    import matplotlib

    with matplotlib.rc_context(plots.RC):
        figure = plots.by_kind(RESULT)
    assert figure is not None
    texts = [text.get_text() for text in figure.axes[0].texts]
    for run in RESULT["runs"][1:]:
        if run["status"] == "ok":
            for entry in run["kinds"].values():
                shown = f"{100 * entry['kept']:.1f}"
                assert shown in texts
                texts.remove(shown)
    assert sum("infeasible" in text for text in texts) == 3


def test_labels_do_not_overlap() -> None:
    import matplotlib

    for make in (plots.kept_against_tokens, plots.accuracy_against_time):
        with matplotlib.rc_context(plots.RC):
            figure = make(made_up(12))
            assert figure is not None
            figure.canvas.draw()
            boxes = [text.get_window_extent() for text in figure.axes[0].texts]
            ticks = [
                [t.label1.get_window_extent() for t in axis.get_major_ticks()]
                for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis)
            ]
            width, height = figure.canvas.get_width_height()
        for group in (boxes, *ticks):
            assert not [(a, b) for i, a in enumerate(group) for b in group[:i] if a.overlaps(b)]
            assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in group)


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.001, 0.08))
def test_apart(wanted: list[float], gap: float) -> None:
    placed = style.apart(wanted, gap, 0.0, 1.0)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    assert all(placed[b] - placed[a] >= gap - 1e-9 for a, b in zip(order, order[1:], strict=False))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in placed)
    if all(wanted[b] - wanted[a] >= gap for a, b in zip(order, order[1:], strict=False)):
        assert placed == pytest.approx(wanted)


def test_apart_centres_what_collides() -> None:
    assert style.apart([0.5, 0.5, 0.9], 0.1, 0, 1) == pytest.approx([0.45, 0.55, 0.9])
    assert style.apart([0.0, 0.0], 0.1, 0, 1) == pytest.approx([0.0, 0.1])
    assert style.apart([1.0, 0.98], 0.1, 0, 1) == pytest.approx([1.0, 0.9])


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_cells_can_be_read() -> None:
    shades = [plots.shade(kept / 1000) for kept in range(1050, 0, -1)]
    assert min(contrast(*pair) for pair in shades) >= 4.5
    lightness = [luminance(fill) for fill, _ in shades]
    # but for rounding
    assert all(later <= before + 0.003 for before, later in zip(lightness, lightness[1:], strict=False))
    assert plots.shade(1.0) == plots.shade(1.2)


def test_colours_stand_out_on_light_and_dark_ground() -> None:
    css = Path(plots.__file__).with_name("page.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, flags=re.S)
    )
    for colours in (light, dark):
        for name, colour in colours.items():
            if name.startswith(("series", "ink", "muted", "link")):
                needed = 4.5 if name in ("ink", "muted", "link") else 3.0
                assert contrast(colour, colours["ground"]) >= needed, (name, colour)
                if name in ("ink", "muted"):
                    assert contrast(colour, colours["raised"]) >= needed
    assert {name: light[name] for name in colors.VARIABLES.values()} == {
        name: colour for colour, name in colors.VARIABLES.items()
    }


# How eyes without one kind of cone see linear RGB: Machado, Oliveira and Fernandes 2009, severity 1
EYES = {
    "all cones": np.eye(3),
    "no L": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "no M": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "no S": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def lab(colour: str, eye: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of an sRGB colour as this eye sees it."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = eye @ np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.maximum(to_xyz @ linear.clip(0, 1) / [0.9505, 1, 1.089], 0.0))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eye", EYES)
def test_series_can_be_told_apart(eye: str) -> None:
    """Twenty units of L*a*b* are a difference that nobody overlooks; about two are the least one can see."""
    css = Path(plots.__file__).with_name("page.css").read_text()
    for block in re.findall(r":root \{(.*?)\}", css, flags=re.S):
        colours = [lab(colour, EYES[eye]) for colour in re.findall(r"--series-\d: (#\w{6})", block)]
        assert len(colours) == len(colors.COLOURS)
        assert min(float(np.linalg.norm(a - b)) for i, a in enumerate(colours) for b in colours[:i]) >= 25


def test_looks_differ_and_references_stand_apart() -> None:
    methods = {f"method {i}": "duet" for i in range(20)} | {
        "oracle": "oracle",
        "random": "random",
        "uniform": "uniform",
    }
    looks = style.looks(methods)
    assert len({(look.colour, look.marker, str(look.dash)) for look in looks.values()}) == len(methods)
    coloured = {looks[label].colour for label, method in methods.items() if method == "duet"}
    assert all(
        looks[label].colour not in coloured and not looks[label].filled for label in ("oracle", "random", "uniform")
    )


def test_write_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one result file"):
        write([], tmp_path)


def test_the_page_opens_with_a_plot_and_the_best_of_each_budget(tmp_path: Path) -> None:
    found = columns.best(RESULT, style.FLOORS | {style.ORACLE, "none"})
    done = [
        run
        for run in RESULT["runs"]
        if run["status"] == "ok" and run["method"] not in ("none", "oracle", "random", "uniform")
    ]
    budgets = sorted({run["budget"] for run in done}, reverse=True)
    wanted = [
        max((run for run in done if run["budget"] == budget), key=lambda run: run["accuracy"])["id"]
        for budget in budgets
    ]
    assert [[run["id"] for run in runs] for _, runs in found] == [[each] for each in wanted]
    assert [budget for budget, _ in found] == [columns.budget(budget) for budget in budgets]
    (tmp_path / "a.json").write_text(json.dumps(RESULT))
    said: list[str] = []
    html = write([tmp_path / "a.json"], tmp_path / "out", said.append)[-1].read_text()
    assert len(said) == 4 and all(text.startswith("tiny-methods: ") for text in said)  # progress, plot by plot
    places = [html.index(mark) for mark in ("<figure", "Best at each budget", "<form", "<table>")]
    assert places == sorted(places)
    kept = f"{100 * found[0][1][0]['kept']:.1f}"
    assert f"kept {kept} % (" in html and "kept, % " not in html  # a unit stands behind its number


def test_a_folder_that_cannot_be_written_to_is_named_by_its_option(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RESULT))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        found = CliRunner().invoke(app, ["report", str(tmp_path / "a.json"), "--out", str(out)])
        assert found.exit_code == 2 and found.stderr.startswith(
            f"error: --out {out}: {'is a file' if out.is_file() else 'cannot be written to ('}"
        ), found.stderr


def test_methods_that_are_level_are_all_named(tmp_path: Path) -> None:
    """The three that answer equally often right, not the one on the fewest tokens; what they cost differs and is left
    to the table."""
    level, result = ("scope", "visionzip", "duet"), made_up()
    for run in result["runs"]:
        if run["budget"] == 0.33 and run["status"] == "ok" and run["method"] not in ("oracle", "random", "uniform"):
            run["accuracy"] = 0.97 if run["label"] in level else 0.9
            run["kept"] = run["accuracy"] / result["runs"][0]["accuracy"]
    (tmp_path / "a.json").write_text(json.dumps(result))
    html = write([tmp_path / "a.json"], tmp_path / "out")[-1].read_text()
    (line,) = re.findall(r"<li><b>33 %</b>: (.*?)</li>", html)
    names, _, rest = line.partition(" (level)<br>")
    assert sorted(names.split(", ")) == sorted(level) and rest.startswith("kept ") and ";" not in rest
    (line,) = re.findall(r"<li><b>22 %</b>: (.*?)</li>", html)
    assert "(level)" not in line and line.count(";") > 2


def test_the_eighth_method_has_a_colour_of_its_own() -> None:
    looks = style.looks({f"method {i}": "duet" for i in range(10)})
    assert len({look.colour for look in looks.values()}) == 10


def test_of_many_methods_those_are_named_that_lead_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """First whoever is best at a budget, then the second of each; the others are drawn thin, and told to be in the
    table."""
    import matplotlib

    def run(label: str, budget: float, accuracy: float, method: str = "duet") -> dict[str, Any]:
        tokens = {"measured": 9.0, "unreduced": 256.0}
        return {
            "label": label,
            "method": method,
            "status": "ok",
            "budget": budget,
            "accuracy": accuracy,
            "tokens": tokens,
        }

    shares = {"a": (0.9, 0.1), "b": (0.8, 0.9), "c": (0.7, 0.8), "d": (0.6, 0.2)}
    rows = [
        run(label, budget, share)
        for label, both in shares.items()
        for budget, share in zip((0.5, 0.1), both, strict=True)
    ]
    result = {"experiment": {}, "runs": [run("full model", 1.0, 1.0), *rows, run("told", 0.1, 1.0, "oracle")]}
    for against, wanted in (("a model", ["a", "ab", "abc", "abcd"]), ("d", ["d", "da", "dab", "dabc"])):
        result["experiment"] = {"against": against}
        assert ["".join(columns.leaders(result, frozenset({"oracle"}), most)) for most in (1, 2, 3, 9)] == wanted

    monkeypatch.setattr(plots, "MOST", 5)
    many = made_up()
    with matplotlib.rc_context(plots.RC):
        figure = plots.kept_against_tokens(many)
    assert figure is not None
    texts = [text.get_text() for text in figure.axes[0].texts]
    labels = {
        run["label"] for run in many["runs"][1:] if run["status"] == "ok" and run["method"] not in plots.REFERENCES
    }
    named = set(columns.leaders(many, plots.REFERENCES, plots.MOST))
    assert len(named) == 5 and labels & set(texts) == named
    assert f"thin and grey: {len(labels - named)} other methods, named in the table" in texts
