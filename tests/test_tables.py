"""Tables of README and docs against the result files, read here without the generator: ``tables.py --check`` compares
that with itself."""

from __future__ import annotations

import ast
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tables as generator

import duet_vlm
from duet_vlm.evaluation.results import load, unpack
from duet_vlm.evaluation.tasks import accepted

ROOT = Path(__file__).resolve().parent.parent


WRITTEN = (
    *ROOT.glob("*.md"),
    *(page for folder in ("docs", "benchmarks", "lab", "comparison") for page in (ROOT / folder).rglob("*.md")),
)
MARKED = sorted(str(page.relative_to(ROOT)) for page in WRITTEN if "<!-- table" in page.read_text())
NUMBERED = sorted(str(page.relative_to(ROOT)) for page in WRITTEN if re.search(r"<!--\s*/?n\b", page.read_text()))
NUMBER = re.compile(r"<!-- n ([^\n]*?) -->([^\n]*?)<!-- /n -->")


def blocks(page: str) -> dict[str, str]:
    return dict(re.findall(r"<!-- table:(\w+) -->\n(.*?)\n<!-- /table:\1 -->", (ROOT / page).read_text(), flags=re.S))


def cells(text: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the first table in a text."""
    head, _, *rows = [
        [cell.strip() for cell in line.strip()[1:-1].split("|")] for line in text.split("\n") if line.startswith("|")
    ]
    return head, rows


def runs(task: str) -> Iterator[dict[str, Any]]:
    yield from json.loads((ROOT / "lab/comparison" / task / "results/methods.json").read_text())["runs"]


@pytest.mark.parametrize("page", MARKED)
def test_every_table_on_a_page_has_rows(page: str) -> None:
    """By the page alone: what stands in front of readers, whoever made it."""
    text = (ROOT / page).read_text()
    heads = [match.end() for match in re.finditer(r"^\|[ :|-]*---[ :|-]*\|$", text, flags=re.M)]
    assert heads and all(text[end:].startswith("\n|") for end in heads), page


def test_every_block_is_made_and_shown() -> None:
    """A page that the generator does not look at would keep old numbers, a block on no page would be checked for
    nothing."""
    assert {*MARKED, *NUMBERED} == set(generator.PAGES)
    shown = [name for page in MARKED for name in blocks(page)]
    opened = [name for page in MARKED for name in re.findall(r"<!-- table\b:?(\w*)", (ROOT / page).read_text())]
    assert sorted(shown) == sorted(opened) and set(shown) == set(generator.BLOCKS)


@pytest.mark.parametrize(
    "text, fault",
    [
        ("| a | b |\n| --- | --- |", "no rows"),
        ("above\n\n| a | b |\n| --- | --- |\n\n| a |\n| --- |\n| 1 |", "no rows"),
        ("| a | b |\n| --- | --- |\n| 1 |", "1 cells under a head of 2"),
        ("| a | b |\n| --- | --- |\n| 1 | - |\n| 2 |  |", "column 'b': no value"),
        ("  \n", "nothing in it"),
    ],
)
def test_a_table_that_says_nothing_is_an_error(
    text: str, fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where page and generator agree, and also where pages are to be written."""
    page = f"<!-- table:one -->\n{text}\n<!-- /table:one -->\n"
    (tmp_path / "page.md").write_text(page)
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    monkeypatch.setattr(generator, "PAGES", ("page.md",))
    monkeypatch.setattr(generator, "BLOCKS", {"one": lambda: text})
    for words in (["tables.py", "--check"], ["tables.py"]):
        generator.made.cache_clear()
        monkeypatch.setattr(sys, "argv", words)
        assert generator.main() == 1 and fault in capsys.readouterr().out
    assert (tmp_path / "page.md").read_text() == page
    assert generator.faults("text\n\n| a | b \\| c |\n| --- | ---: |\n| 1 | - |\n| - | 2 |\n\nmore") == []
    generator.made.cache_clear()


# ---- numbers within sentences


@pytest.fixture
def one_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The generator looks at one page, which has no table."""
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    monkeypatch.setattr(generator, "PAGES", ("page.md",))
    monkeypatch.setattr(generator, "BLOCKS", {})
    return tmp_path / "page.md"


def checked(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tables.py", *words])
    return generator.main()


def test_a_stale_number_in_a_sentence_fails_the_check(
    one_page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "One layer is <!-- n wide 1 6 33 -->{}<!-- /n --> % of the budget.\n"
    one_page.write_text(line.format(33))
    assert checked(monkeypatch, "--check") == 1 and "differ: page.md" in capsys.readouterr().out
    assert one_page.read_text() == line.format(33)
    assert checked(monkeypatch) == 0 and one_page.read_text() == line.format(51)  # 1 / 6 / .33 = .505
    assert checked(monkeypatch, "--check") == 0


@pytest.mark.parametrize(
    "text, fault",
    [
        ("It is <!-- n wyde 1 6 33 -->51<!-- /n --> %.", "line 1: no number 'wyde' (did you mean 'wide'?)"),
        ("It is <!-- n wide 1 6 -->51<!-- /n --> %.", "missing 1 required positional argument"),
        (
            "It\nkeeps <!-- n kept tiny-chain duett@0.11 -->51<!-- /n --> %.",
            "line 2: 'kept tiny-chain duett@0.11': no run 'duett@0.11'",
        ),
        ("It keeps <!-- n kept tiny-chian duet@0.11 -->51<!-- /n --> %.", "line 1: 'kept tiny-chian duet@0.11'"),
        ("It is <!-- n wide 1 6 33 -->51 %.", "not of the form"),
        ("It is <!-- n wide 1 6 33 -->\n51<!-- /n --> %.", "not of the form"),
        ("It is <!--n wide 1 6 33-->51<!-- /n --> %.", "not of the form"),
        ("It is\n<!-- n wide 1 6 33 -->51<!-- /n --> %.", "line 2: begins with a marker"),
    ],
)
def test_a_number_that_nothing_makes_is_an_error(
    text: str, fault: str, one_page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where pages are to be written: nothing is."""
    one_page.write_text(text)
    for words in (["--check"], []):
        assert checked(monkeypatch, *words) == 1 and fault in capsys.readouterr().out
    assert one_page.read_text() == text


def test_numbers_in_sentences_are_those_of_the_result_files() -> None:
    """What pages say a run keeps, against the files; ranges by their ends."""
    kept = {
        (task, row["id"].replace(" ", "")): row for task in ("tiny", "tiny-chain", "tiny-crowded") for row in runs(task)
    }
    compared = 0
    for page in NUMBERED:
        for words, said in NUMBER.findall((ROOT / page).read_text()):
            what, *rest = words.split()
            if what in ("kept", "whole"):
                found = [100 * kept[rest[0], run]["kept"] for run in rest[1:]]
                ends = (
                    [min(found), max(found)]
                    if " to " in said
                    else [found[0]] * (len(found) == 1 or max(found) - min(found) < 1)
                )
                numbers = [float(number) for number in said.split(" to ")]
                assert numbers == pytest.approx(ends, abs=0.0501 if "." in said else 0.501), (page, words)
                compared += 1
            if what == "gap":
                pairs = [
                    100 * (kept[rest[0], a]["kept"] - kept[rest[0], b]["kept"])
                    for a, b in zip(rest[1::2], rest[2::2], strict=True)
                ]
                assert [float(number) for number in said.split(" to ")] == pytest.approx(
                    [min(pairs), max(pairs)], abs=0.501
                ), (page, words)
                compared += 1
    assert compared > 30


def test_what_leads_on_questions_that_chose_nothing() -> None:
    """Counted from the answers in the file, and the test worked out by hand."""
    result = load(ROOT / "lab/comparison/tiny-chain/results/fresh.json")
    found = unpack(result)
    page, seen = (ROOT / "docs/comparison.md").read_text(), 0
    hits = {
        run: [accepted(answer, gold) for answer, gold in zip(said, found["gold"], strict=True)]
        for run, said in found["answers"].items()
    }
    for words, said in NUMBER.findall(page):
        if words.startswith("lead "):
            run = words.split()[1]
            ours, best = hits[run], hits["duet_plus@" + run.split("@")[1]]
            wins = sum(a and not b for a, b in zip(ours, best, strict=True))
            losses = sum(b and not a for a, b in zip(ours, best, strict=True))
            chance = min(
                1.0, 2 * sum(math.comb(wins + losses, i) for i in range(min(wins, losses) + 1)) / 2 ** (wins + losses)
            )
            assert f"; {wins} : {losses} questions" in said and float(said.split()[0]) == pytest.approx(
                100 * (wins - losses) / len(ours), abs=0.0501
            )
            assert float(said.rstrip(")").split()[-1]) == pytest.approx(chance, abs=0.00051)
            seen += 1
    assert seen == 4 and not {seed for seed in (0, 1, 2)} & set(result["experiment"]["seeds"])


def usual(row: dict[str, Any]) -> bool:
    """Whether a run had every setting of its method as it comes; references stand for no method."""
    if row["method"] not in duet_vlm.list_methods():
        return False
    method = duet_vlm.make_method(row["method"])
    return method.with_settings(row["settings"]) == method  # an option that there was not yet is the usual one


def test_how_much_each_method_keeps() -> None:
    """Every cell against the run whose settings are the method's own; nothing that was measured is left out."""
    head, rows = cells(blocks("docs/choose.md")["which"])
    columns = [(title.split()[0], float(title.split()[1].rstrip("%")) / 100) for title in head[1:]]
    truth = {(task, row["method"], row["beside"]): row for task, _ in columns for row in runs(task) if usual(row)}
    compared = set()
    for name, *texts in rows:
        for (task, budget), text in zip(columns, texts, strict=True):
            row = truth.get((task, name.strip("`"), budget))
            assert (row is None) == (text == ""), (name, task, budget)
            if row is not None:
                assert text == (f"{100 * row['kept']:.1f}" if row["status"] == "ok" else "-"), row["id"]
                compared.add((task, name.strip("`"), budget))
    assert compared == {key for key in truth if (key[0], key[2]) in columns} and len(compared) > 150
    chains = [float(texts[columns.index(("tiny-chain", 0.11))]) for _, *texts in rows if re.match(r"\d", texts[1])]
    assert len(chains) > 15 and chains == sorted(chains, reverse=True)


@pytest.mark.parametrize(
    "page, block, task",
    [
        ("lab/NOTEBOOK.md", "page_kinds", "tiny-page"),
        ("docs/comparison.md", "kinds_chain", "tiny-chain"),
        ("lab/NOTEBOOK.md", "kinds_crowded", "tiny-crowded"),
    ],
)
def test_kinds_of_questions(page: str, block: str, task: str) -> None:
    head, rows = cells(blocks(page)[block])
    beside = 0.07 if block == "kinds_crowded" else 0.11
    truth = {row["label"]: row for row in runs(task) if row["status"] == "ok" and row["beside"] in (None, beside)}
    assert {label for label, *_ in rows} == set(truth)
    for label, *texts in rows:
        row = truth[label]
        expected = [row["kinds"][kind]["accuracy"] for kind in head[1:-1]] + [row["accuracy"]]
        assert texts == [f"{value:.3f}" for value in expected], label


@pytest.mark.parametrize(
    "page, block, task", [("docs/comparison.md", "kept_chain", "tiny-chain"), ("lab/NOTEBOOK.md", "kept_tiny", "tiny")]
)
def test_how_much_is_kept_at_every_budget(page: str, block: str, task: str) -> None:
    head, rows = cells(blocks(page)[block])
    truth = {(row["label"], row["budget"]): row for row in runs(task)}
    compared = 0
    for label, *texts in rows:
        for title, text in zip(head[1:], texts, strict=True):
            row = truth.get(
                (label.replace("\\", ""), float(title.rstrip(" %")) / 100 if title[0].isdecimal() else None)
            )
            assert row is not None or text == "-", (label, title)
            if row is not None and row["status"] == "ok":
                assert float(text.split()[0]) == pytest.approx(100 * row["kept"], abs=0.0501), (label, title)
                compared += 1
    assert compared == sum(row["status"] == "ok" for row in truth.values()) - 1  # the full model is the hundred


def registered(folder: str, sign: str) -> int:
    """How many classes of a folder of the source have the decorator ``sign``."""
    classes = [
        node
        for file in (ROOT / "src/duet_vlm" / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    calls = [each.func for node in classes for each in node.decorator_list if isinstance(each, ast.Call)]
    return sum(getattr(call, "attr", getattr(call, "id", "")) == sign for call in calls)


def test_lists_of_the_command_line_hold_what_the_source_holds() -> None:
    """``catalogue.json`` is compared with what makes it; both are empty where that finds nothing."""
    lists = json.loads((ROOT / "src/duet_vlm/api/catalogue.json").read_text())
    assert len(lists["methods"]) == registered("methods", "register") > 50
    assert all(row[key] for row in lists["methods"] for key in ("name", "summary", "stage", "paper"))
    texts = [file.read_text() for file in (ROOT / "src/duet_vlm/models").glob("*.py")]
    named = {name for text in texts for name in re.findall(r'^    family = "(\w+)"', text, flags=re.M)}
    assert {row["family"] for row in lists["models"]} == named and len(named) >= 17 and len(lists["presets"]) > 10
    for name in ("methods", "presets", "models"):
        first = set(lists[name][0])
        assert all(set(row) == first for row in lists[name])
