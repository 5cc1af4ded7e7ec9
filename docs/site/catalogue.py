"""One page for each method, from the registry, the method's docstring, PAPERS.md and the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from docstrings import idea, paragraphs, settings
from links import LINK, ROOT
from measured import LEADING, Cell, cells, filtered, sortable, table
from PIL import Image
from typer.testing import CliRunner

import duet_vlm
from duet_vlm.api.catalogue import MADE
from duet_vlm.cli.main import app

FOLDER = "catalogue"
PICTURE, QUESTION = "src/duet_vlm/evaluation/tiny/demo/scene_1.png", "What shape is the yellow object?"
BUDGETS = ("0.22", "0.33", "0.5")  # the first that a method can meet on the embedded model is drawn
GROUPS = {  # heading of the catalogue -> what its methods share
    "Before the decoder": "They choose or merge visual tokens before the decoder; some drop more of them inside it.",
    "Inside the decoder": "All tokens enter, later layers read fewer; a budget has a floor.",
    "In the vision tower": "Fewer patches go through it; put one in front of another method: `contrast+duet_plus`. "
    "[What they keep](../reduce-in-the-tower.md).",
    "For clips": "They compare the frames of a clip. An image is a clip of one frame.",
    "Trained": "A module with weights of its own makes the rows that enter. [What they keep](../trained-compressors.md).",
    "Baselines": "What every method has to beat.",
}
BASELINES = ("baseline", "-")  # in place of a paper
USUAL = (LEADING, (0.33, 0.11))  # task and budgets of the accuracy columns
BENCHES = {  # the same of groups that are measured elsewhere, or whose floor lies above 11 %
    "Inside the decoder": (LEADING, (0.33, 0.22)),
    "For clips": ("tiny-video", (0.47, 0.07)),
}
PLACES = {"-": "nowhere: everything stays"}


def arxiv(paper: str) -> str:
    """The paper with its arXiv numbers as links."""
    return re.sub(r"(?:arXiv )?(\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def deviations(name: str) -> str:
    """What PAPERS.md says of a method, one heading level lower; empty where it has no section."""
    parts = re.split(r"^## (.+)\n", (ROOT / "PAPERS.md").read_text(), flags=re.M)[1:]
    found = (text for head, text in zip(parts[::2], parts[1::2], strict=True) if name in re.split(r",\s*", head))
    return LINK.sub(lambda link: f"{link[1]}{_from_root(link[2])}{link[3]}", next(found, "").strip())


def _from_root(link: str) -> str:
    # links are those of docs/catalogue/NAME.md in the repository
    return link if ":" in link or link.startswith("#") else f"../../{link}"


def wins(name: str, measured: list[Cell]) -> str:
    """On which tasks and budgets no other single method kept more, in words."""
    found: dict[str, list[float]] = {}
    for one in measured:
        if one.method == name and one.kept is not None and one.budget is not None:
            rivals = [
                c.kept
                for c in measured
                if (c.task, c.budget, c.alone) == (one.task, one.budget, True) and c.kept is not None
            ]
            if one.alone and one.kept == max(rivals) and len(rivals) > 1:
                found.setdefault(one.task, []).append(one.budget)
    tasks = [
        f"`{task}` at {', '.join(f'{budget:.0%}' for budget in sorted(set(budgets), reverse=True))}"
        for task, budgets in found.items()
    ]
    return (
        f"No other method measured at the same budget kept more on {'; on '.join(tasks)} of the tokens."
        if tasks
        else ""
    )


def numbers(name: str, measured: list[Cell]) -> str:
    """The rows of the result files in which the method stands, alone or in a composition."""
    mine = [one for one in measured if name in one.method.split("+")]
    if not mine:
        return (
            "Not measured on an embedded task yet: `duet-vlm eval --methods "
            + name
            + " --limit 200` does it on this machine.\n"
        )
    lines = [
        [f"`{one.task}`", cell(one.label), one.share, one.accuracy_text, one.kept_text, one.tokens_text] for one in mine
    ]
    told = [
        wins(name, measured),
        "Embedded toy tasks: they tell methods apart and do not predict a large model ([what they are](../comparison.md)).",
    ]
    head = ["task", "setting", "budget", "accuracy (95 %)", "kept of the full model's", "mean tokens"]
    return "\n\n".join([*filter(None, told), sortable(table(head, lines))])


def page(row: dict[str, Any], measured: list[Cell], picture: str | None) -> str:
    """The page of one method; ``row`` as ``duet-vlm methods --json`` has it, ``picture`` a file beside the page.

    First what a reader came for: a look at it, how to try it, the settings. Then the idea, the cost, numbers, families
    that refuse it, and what differs.
    """
    name, cls = row["name"], duet_vlm.get_method(row["name"])
    told = [f"# `{name}`", row["summary"][:1].upper() + row["summary"][1:] + "."]
    if picture:
        told.append(f"![What {name} keeps of a demo picture]({picture})")
    command = f'duet-vlm run --method {name} --budget 0.33 --image {PICTURE} --prompt "{QUESTION}" --compare'
    told += ["## Try it", f"```bash\n{command}\nduet-vlm methods {name}\n```"]
    told += ["## Settings", table(["setting", "type", "default", "meaning"], [
        [f"`{one.name}`", cell(one.type), f"`{cell(one.default)}`", cell(one.text)] for one in settings(cls)
    ])]  # fmt: skip
    facts = {
        "Paper": arxiv(row["paper"]) if row["paper"] != "-" else "none",
        "Reduces": PLACES.get(row["stage"], row["stage"]),
        "The question decides what stays": "yes" if row["needs_text"] else "no",
        "Needs of the model": ", ".join(f"`{need}`" for need in row["needs"]) or "nothing",
    }
    told += ["## Idea", *idea(cls), "\n".join(f"- **{name}:** {fact}" for name, fact in facts.items())]
    if cost := paragraphs(cls, ("Cost",)):
        told += [
            "## Cost",
            *(text.removeprefix("Cost: ")[:1].upper() + text.removeprefix("Cost: ")[1:] for text in cost),
        ]
    told += ["## Numbers", numbers(name, measured)]
    told += ["## Families that cannot run it", refusals(row)]
    if differing := [
        *paragraphs(cls, ("Differences", "From the paper", "What the paper leaves", "Chosen here")),
        deviations(name),
    ]:
        if any(differing):
            told += ["## Beside the authors' code", *filter(None, differing)]
    return "\n\n".join(told) + "\n"


def refusals(row: dict[str, Any]) -> str:
    """Families that refuse the method, or a preset of it, with the reason."""
    lines = []
    for case in row["families_without"]:
        what = f"preset `{case['preset']}`" if case["preset"] else "the method"
        lines.append([what, ", ".join(f"`{family}`" for family in case["families"]), cell(case["why"])])
    return (
        table(["what", "families", "why"], lines)
        if lines
        else "None that is known without a model: see [families](../families.md)."
    )


def pictures(folder: Path) -> dict[str, Path]:
    """name -> the demo picture as the method reduces it in the embedded model (WebP); methods that cannot be drawn
    there are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    found, runner = {}, CliRunner()
    for row in MADE["methods"]():
        for budget in BUDGETS:
            asked = [
                "viz",
                "-i",
                str(ROOT / PICTURE),
                "-p",
                QUESTION,
                "--method",
                row["name"],
                "-b",
                budget,
                "--json",
                "-o",
                str(folder),
            ]
            done = runner.invoke(app, asked)
            if done.exit_code == 0:
                found[row["name"]] = folder / f"{row['name']}.webp"
                Image.open(json.loads(done.stdout.strip().splitlines()[-1])["files"][0]).save(
                    found[row["name"]], quality=85
                )
                break
    return found


def group(name: str) -> str:
    """The heading of the catalogue that a method stands under."""
    cls: Any = duet_vlm.get_method(name)
    usual = cls()
    if getattr(usual, "trained_reducer", None) is not None:
        return "Trained"
    if cls.paper in BASELINES or name == "none":
        return "Baselines"
    if issubclass(cls, duet_vlm.TowerReducer):
        return "In the vision tower"
    if getattr(cls, "compares_frames", False):
        return "For clips"
    return "Before the decoder" if issubclass(cls, duet_vlm.EncoderReducer) else "Inside the decoder"


def grouped() -> dict[str, list[dict[str, Any]]]:
    """Heading -> the rows of its methods, by name."""
    return {head: [row for row in MADE["methods"]() if group(row["name"]) == head] for head in GROUPS}


def navigation() -> list[Any]:
    """The catalogue in the navigation: its index, then the methods below their headings."""
    named = {head: [row["name"] for row in found] for head, found in grouped().items()}
    return [
        f"{FOLDER}/index.md",
        *({head: [{name: f"{FOLDER}/{name}.md"} for name in names]} for head, names in named.items()),
    ]


def kept(name: str, task: str, budget: float, measured: list[Cell]) -> str:
    """Percent of the full model's accuracy that a method by itself keeps; the reason where it has no such number."""
    alone = {(one.method, one.task, one.budget): one for one in measured if one.alone}
    found = alone.get((name, task, budget))
    if found is None or found.kept is None:
        return "-" if found is None else found.status
    return f"{100 * found.kept:.1f}"


def index(measured: list[Cell]) -> str:
    """The catalogue: a table for each group, and a box that filters all of them. A column without a number is left out."""
    parts = []
    for head, found in grouped().items():
        task, budgets = BENCHES.get(head, USUAL)
        shares = {budget: [kept(row["name"], task, budget, measured) for row in found] for budget in budgets}
        shares = {budget: cells for budget, cells in shares.items() if any(text[0].isdigit() for text in cells)}
        links = [f"[`{row['name']}`]({row['name']}.md)" for row in found]
        words, papers = [cell(row["summary"]) for row in found], [arxiv(cell(row["paper"])) for row in found]
        columns = ["method", "what it does", *(f"kept at {budget:.0%}" for budget in shares), "paper"]
        lines = [list(line) for line in zip(links, words, *shares.values(), papers, strict=True)]
        told = GROUPS[head] + (f" Kept: % of the full model's accuracy on `{task}`." if shares else "")
        parts.append(f"## {head}\n\n{told}\n\n{sortable(table(columns, lines))}")
    return "\n\n".join([
        "---\nhide: [toc]\n---",
        "# Catalogue of methods",
        "One page each: a picture, how to try it, settings, idea, cost, numbers, and what differs from the authors' code. "
        "A click on a column's head sorts. Accuracies are those of [embedded toy tasks](../comparison.md); a dash: not "
        "measured there; infeasible: the budget is below the method's floor. [Which method when](../choose.md#which-method-when), "
        "[how they spend a budget](../methods.md), [all numbers](../results.md).",
        filtered("\n\n".join(parts)),
    ]) + "\n"  # fmt: skip


def pages(drawn: set[str]) -> dict[str, str]:
    """Address on the site -> text, for every method; ``drawn`` are those with a picture beside their page."""
    measured = cells()
    found = {
        f"{FOLDER}/{row['name']}.md": page(row, measured, f"{row['name']}.webp" if row["name"] in drawn else None)
        for row in MADE["methods"]()
    }
    return found | {f"{FOLDER}/index.md": index(measured)}
