"""A finished search in words: the setting to use, or the reason for none."""

from __future__ import annotations

import shlex
from typing import Any

from duet_vlm.evaluation.tune.binomial import LEVEL, needed


def setting_file(result: dict[str, Any]) -> dict[str, Any]:
    """Content of ``duet.json``: the chosen method, budget and settings, and their origin."""
    row = chosen_row(result)
    assert row is not None  # a file is written only where something was chosen
    told = {key: row[key] for key in ("kept", "bound", "ms", "speedup")} | {"tested": row["testing"]}
    record = {
        "goal": result["goal"]["words"],
        "model": result["model"],
        "task": result["task"],
        "commit": result["environment"]["commit"],
    }
    return {"method": row["method"], "budget": row["budget"], "settings": row["settings"], "found": record | told}


def chosen_row(result: dict[str, Any]) -> dict[str, Any] | None:
    return next((row for row in result["candidates"] if row["id"] == result["chosen"]), None)


def python_line(row: dict[str, Any]) -> str:
    """The Python line that attaches the setting without its file."""
    settings = "".join(f", {key}={_tuples(value)!r}" for key, value in row["settings"].items())
    budget = "" if row["budget"] is None else f", budget={row['budget']!r}"
    return f"handle = duet_vlm.attach(model, {row['method']!r}{budget}{settings})"


def shell_line(row: dict[str, Any], model: str, clips: bool = False) -> str:
    """The command line that uses the setting; ``clips``: the questions were about videos."""
    words = ["duet-vlm", "run", "--model", model, "--method", row["method"]]
    words += (
        []
        if row["budget"] is None
        else ["--budget", f"{row['budget']:g}" if isinstance(row["budget"], float) else str(row["budget"])]
    )
    for key, value in row["settings"].items():
        words += ["--set", f"{key}={_tuples(value)!r}"]
    return shlex.join([*words, "--video" if clips else "--image", "FILE", "--prompt", "TEXT"])


def verdict(result: dict[str, Any]) -> str:
    """One paragraph: the choice with its bound, or the nearest candidate and the number of questions that would tell
    more."""
    row, counts = chosen_row(result), result["questions"]
    if row is not None:
        tested = row["testing"]
        questions = "one question" if tested["asked"] == 1 else f"{tested['asked']} questions"
        return (
            f"{row['id']}: {result['full_ms'] / row['ms']:.2f} times faster to the first token ({row['ms']:.4g} ms, the full model "
            f"{result['full_ms']:.4g} ms). In the test, {questions} that the full model answers right, it keeps {tested['asked'] - tested['lost']}. "
            f"So it keeps at least {row['bound']:.2%} (with {1 - LEVEL:.0%} confidence)."
        )
    tried = [row for row in result["candidates"] if row["testing"]["asked"]] or [
        row for row in result["candidates"] if row["kept"] is not None
    ]
    if not tried:
        return "Nothing qualifies: every candidate was refused or too dear before a question was asked; the reasons stand in the table."
    near = max(tried, key=lambda row: (row["kept"], -row["ms"]))
    keep, more = result["goal"]["keep"], ""
    if keep is not None and near["kept"] > keep:  # it may well be good enough: say how many questions would show it
        most = counts["losses"] + 2
        more = f" More questions may show that it does: a test of {needed(keep, most)} allows {most} losses, this one of {counts['testing']} allowed "
        more += f"{counts['losses']}."
    return f"Nothing qualifies for {result['goal']['words']}. Nearest is {near['id']}: it kept {near['kept']:.1%} of the answers so far.{more}"


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
