"""What the committed result files under lab/comparison/ measured, as rows, and the page that lists them all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from links import ROOT

from duet_vlm.evaluation.results import load

PAGE = "results.md"
LEADING, OPENING = "tiny-chain", "11%"  # the task and the share of the tokens that pages open on


@dataclass(frozen=True)
class Cell:
    """One run of a result file: a method at a budget on a task."""

    file: str
    task: str
    method: str
    label: str
    budget: float | None
    status: str
    alone: bool  # a single method with its usual settings
    accuracy: float | None
    interval: tuple[float, float] | None
    kept: float | None
    kept_interval: tuple[float, float] | None
    tokens: float | None
    flops: float | None
    kv: float | None

    @property
    def share(self) -> str:
        if self.budget is None:
            return "all" if self.method == "none" else "by hand"
        return f"{self.budget:.0%}" if self.budget <= 1 else f"{self.budget:g}"

    @property
    def accuracy_text(self) -> str:
        if self.accuracy is None:
            return self.status
        return f"{self.accuracy:.3f}" + (
            "" if self.interval is None else f" ({self.interval[0]:.3f}-{self.interval[1]:.3f})"
        )

    @property
    def kept_text(self) -> str:
        if self.kept is None:
            return "-"
        low, high = self.kept_interval or (None, None)
        return f"{100 * self.kept:.1f}" + (
            "" if low is None or high is None else f" ({100 * low:.1f}-{100 * high:.1f})"
        )

    @property
    def tokens_text(self) -> str:
        return "-" if self.tokens is None else f"{self.tokens:.1f}"


def files() -> list[Path]:
    """The result files of experiments, those of training included."""
    return sorted((ROOT / "lab/comparison").glob("**/results/*.json"))


def cells() -> list[Cell]:
    """All runs of all result files."""
    return [_cell(path, result, run) for path in files() for result in [load(path)] for run in result["runs"]]


def _cell(path: Path, result: dict[str, Any], run: dict[str, Any]) -> Cell:
    tokens, trained = run.get("tokens") or {}, "training" in path.parts
    said = f"{run['label']} (model trained as {path.stem})" if trained else run["label"]
    return Cell(
        str(path.relative_to(ROOT)), result["task"], run["method"], said, run["budget"], run["status"],
        not trained and not {"+", "["} & {*run["id"]} and path.stem == "methods",  # the id has settings in brackets
        run.get("accuracy"), _pair(run.get("interval")), run.get("kept"), _pair(run.get("kept_interval")),
        tokens.get("measured"), run.get("flops_share"), run.get("kv_share"),
    )  # fmt: skip


def _pair(values: list[float] | None) -> tuple[float, float] | None:
    return None if values is None else (values[0], values[1])


def table(head: list[str], lines: list[list[str]]) -> str:
    """A table of Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def sortable(text: str) -> str:
    """A table that assets/tables.js sorts by the column that is clicked."""
    return f'<div class="sortable" markdown>\n\n{text}\n\n</div>'


def filtered(text: str, **opening: str) -> str:
    """Tables below a box that hides rows without its words, and below a list of values for each of these columns, which
    stands at the given one as the page opens."""
    pairs = (f"{column}={value}" for column, value in opening.items())
    data = "".join(f' data-choose-{number}="{pair}"' for number, pair in enumerate(pairs))
    return f'<div class="filtered"{data} markdown>\n\n{text}\n\n</div>'


def _order(one: Cell) -> tuple[bool, bool, float]:
    """The leading task first, of a task the comparison of all methods, of that the largest share kept."""
    return one.task != LEADING, Path(one.file).stem != "methods", -(one.kept or 0)


def page() -> str:
    """All of them in one table that sorts and filters in the browser."""
    head = [
        "task",
        "method and setting",
        "budget",
        "accuracy (95 %)",
        "kept, % (95 %)",
        "mean tokens",
        "FLOPs",
        "KV cache",
        "file",
    ]
    lines = []
    for one in sorted(cells(), key=_order):
        shares = ["-" if value is None else f"{value:.0%}" for value in (one.flops, one.kv)]
        said = (
            one.label if one.label == one.method or one.method in ("none", "oracle") else f"{one.label} [{one.method}]"
        )
        name = f"[{Path(one.file).stem}](../{one.file})"
        lines.append(
            [
                one.task,
                said.replace("|", "\\|"),
                one.share,
                one.accuracy_text,
                one.kept_text,
                one.tokens_text,
                *shares,
                name,
            ]
        )
    text = [
        "---\nhide: [toc]\n---",
        "# All results",
        "Every run of every result file under `lab/comparison/`; the page opens on the leading task at 11 % of the tokens. "
        "The lists choose task and budget, the box filters by any words (`duet_plus`), a click on a column's head sorts. "
        "Kept, FLOPs and KV cache are shares of the full model's, tokens the measured mean per decoder layer and image. "
        "All are embedded toy tasks and models: they tell methods apart and do not predict a large model. Read "
        "[the comparison](comparison.md) for what they mean, and [accuracy against budget](evaluate.md) for how they "
        "were made; infeasible: the method cannot do with so few.",
        filtered(sortable(table(head, lines)), task=LEADING, budget=OPENING),
    ]
    return "\n\n".join(text) + "\n"
