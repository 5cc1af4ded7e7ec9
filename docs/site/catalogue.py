"""One page for each method, from the registry, the method's docstring, PAPERS.md and the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from docstrings import idea, paragraphs, settings
from links import LINK, ROOT
from measured import Cell, cells, sortable, table
from PIL import Image
from typer.testing import CliRunner

import duet_vlm
from duet_vlm.cli.lists import rows
from duet_vlm.cli.main import app

FOLDER = "catalogue"
PICTURE, QUESTION = "src/duet_vlm/evaluation/tiny/demo/scene_1.png", "What shape is the yellow object?"
BUDGETS = ("0.22", "0.33", "0.5")  # the first that a method can meet on the embedded model is drawn
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
    return link if ":" in link or link.startswith("#") else f"../../{link}"  # links are those of docs/catalogue/NAME.md in the repository


def wins(name: str, measured: list[Cell]) -> str:
    """On which tasks and budgets no other single method kept more, in words."""
    found: dict[str, list[float]] = {}
    for one in measured:
        if one.method == name and one.kept is not None and one.budget is not None:
            rivals = [c.kept for c in measured if (c.task, c.budget, c.alone) == (one.task, one.budget, True) and c.kept is not None]
            if one.alone and one.kept == max(rivals) and len(rivals) > 1:
                found.setdefault(one.task, []).append(one.budget)
    tasks = [f"`{task}` at {', '.join(f'{budget:.0%}' for budget in sorted(set(budgets), reverse=True))}" for task, budgets in found.items()]
    return f"No other method measured at the same budget kept more on {'; on '.join(tasks)} of the tokens." if tasks else ""


def numbers(name: str, measured: list[Cell]) -> str:
    """The rows of the result files in which the method stands, alone or in a composition."""
    mine = [one for one in measured if name in one.method.split("+")]
    if not mine:
        return "Not measured on an embedded task yet: `duet-vlm eval --methods " + name + " --limit 200` does it on this machine.\n"
    lines = [[f"`{one.task}`", cell(one.label), one.share, one.accuracy_text, one.kept_text, one.tokens_text] for one in mine]
    told = [wins(name, measured), "Embedded toy tasks: they tell methods apart and do not predict a large model ([what they are](../comparison.md))."]
    head = ["task", "setting", "budget", "accuracy (95 %)", "kept of the full model's", "mean tokens"]
    return "\n\n".join([*filter(None, told), sortable(table(head, lines))])


def page(row: dict[str, Any], measured: list[Cell], picture: str | None) -> str:
    """The page of one method; ``row`` as ``duet-vlm methods --json`` has it, ``picture`` a file beside the page."""
    name, cls = row["name"], duet_vlm.get_method(row["name"])
    told = [f"# `{name}`", row["summary"][:1].upper() + row["summary"][1:] + "."]
    facts = {
        "Paper": arxiv(row["paper"]) if row["paper"] != "-" else "none",
        "Reduces": PLACES.get(row["stage"], row["stage"]),
        "The question decides what stays": "yes" if row["needs_text"] else "no",
        "Needs of the model": ", ".join(f"`{need}`" for need in row["needs"]) or "nothing",
    }
    told.append("\n".join(f"- **{name}:** {fact}" for name, fact in facts.items()))
    if picture:
        told.append(f"![What {name} keeps of a demo picture]({picture})")
    told += ["## Idea", *idea(cls)]
    if cost := paragraphs(cls, ("Cost",)):
        told += ["## Cost", *(text.removeprefix("Cost: ")[:1].upper() + text.removeprefix("Cost: ")[1:] for text in cost)]
    told += ["## Families that cannot run it", refusals(row)]
    told += ["## Settings", table(["setting", "type", "default", "meaning"], [
        [f"`{one.name}`", cell(one.type), f"`{cell(one.default)}`", cell(one.text)] for one in settings(cls)
    ])]  # fmt: skip
    if differing := [*paragraphs(cls, ("Differences", "From the paper", "What the paper leaves", "Chosen here")), deviations(name)]:
        if any(differing):
            told += ["## Beside the authors' code", *filter(None, differing)]
    told += ["## Numbers", numbers(name, measured)]
    command = f'duet-vlm run --method {name} --budget 0.33 --image {PICTURE} --prompt "{QUESTION}" --compare'
    told += ["## Try it", f"```bash\n{command}\nduet-vlm methods {name}\n```"]
    return "\n\n".join(told) + "\n"


def refusals(row: dict[str, Any]) -> str:
    """Families that refuse the method, or a preset of it, with the reason."""
    lines = []
    for case in row["families_without"]:
        what = f"preset `{case['preset']}`" if case["preset"] else "the method"
        lines.append([what, ", ".join(f"`{family}`" for family in case["families"]), cell(case["why"])])
    return table(["what", "families", "why"], lines) if lines else "None that is known without a model: see [families](../families.md)."


def pictures(folder: Path) -> dict[str, Path]:
    """name -> the demo picture as the method reduces it in the embedded model (WebP); methods that cannot be drawn there are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    found, runner = {}, CliRunner()
    for row in rows("methods"):
        for budget in BUDGETS:
            asked = ["viz", "-i", str(ROOT / PICTURE), "-p", QUESTION, "--method", row["name"], "-b", budget, "--json", "-o", str(folder)]
            done = runner.invoke(app, asked)
            if done.exit_code == 0:
                found[row["name"]] = folder / f"{row['name']}.webp"
                Image.open(json.loads(done.stdout.strip().splitlines()[-1])["files"][0]).save(found[row["name"]], quality=85)
                break
    return found


def pages(drawn: set[str]) -> dict[str, str]:
    """Address on the site -> text, for every method; ``drawn`` are those with a picture beside their page."""
    measured = cells()
    found = {f"{FOLDER}/{row['name']}.md": page(row, measured, f"{row['name']}.webp" if row["name"] in drawn else None) for row in rows("methods")}
    lines = [[f"[`{row['name']}`]({row['name']}.md)", cell(row["summary"]), row["stage"], arxiv(cell(row["paper"]))] for row in rows("methods")]
    head = "# Catalogue of methods\n\nOne page each: idea, cost, needs, settings, what differs from the authors' code, and what was measured. "
    head += "A click on a column's head sorts. [How to choose](../methods.md), [all numbers](../results.md).\n\n"
    found[f"{FOLDER}/index.md"] = head + sortable(table(["method", "what it does", "where", "paper"], lines)) + "\n"
    return found
