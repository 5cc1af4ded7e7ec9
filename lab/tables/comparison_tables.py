"""The tables of docs/comparison.md, from the result files under comparison/."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from folders import COMPARISON, STUDIES

import duet_vlm
from duet_vlm.evaluation.drop_curve import curve_of
from duet_vlm.evaluation.experiment import ExperimentCell
from duet_vlm.evaluation.report import columns
from duet_vlm.evaluation.report.markdown import table
from duet_vlm.evaluation.results import load, unpack
from duet_vlm.evaluation.statistics import difference_interval, sign_test
from duet_vlm.evaluation.tasks import accepted

Row = dict[str, Any]


def done(task: str, name: str) -> list[Row]:
    """The feasible rows of a result, in the order of the experiment's cells."""
    result = load(COMPARISON / task / "results" / f"{name}.json")
    places = columns.places(result)
    return sorted(
        (row for row in result["runs"] if row["status"] == "ok"), key=lambda row: places.get(row["label"], -1)
    )


def by_budget(title: str, runs: list[Row], cell: Callable[[Row], str]) -> str:
    """Labels by budget."""
    budgets = sorted({row["beside"] for row in runs}, reverse=True)
    cells: dict[str, dict[float, str]] = {}
    for row in runs:
        cells.setdefault(row["label"], {})[row["beside"]] = cell(row)
    return table(
        [title, *(f"{b:.0%}" for b in budgets)],
        [[label, *(own.get(b, "-") for b in budgets)] for label, own in cells.items()],
    )


def kinds(task: str, name: str, budget: float) -> str:
    """Accuracy per kind of question at one budget, the full model first."""
    runs = [row for row in done(task, name) if row["beside"] in (None, budget)]
    names = list(runs[0]["kinds"])
    lines = [
        [row["label"], *(f"{row['kinds'][kind]['accuracy']:.3f}" for kind in names), f"{row['accuracy']:.3f}"]
        for row in runs
    ]
    return table(["accuracy", *names, "all"], lines)


def recall(task: str, name: str, budget: float) -> str:
    """Needed tokens that are left, and accuracy relative to the oracle."""
    lines = []
    for row in done(task, name):
        if row["beside"] == budget:
            found = row["recall"]
            shares = [found["entry"], found["entry_or_merged"], found["middle"], row["of_oracle"]]
            lines.append([row["label"], f"{row['solved']['entry']}", *map(columns.percent, shares)])
    return table(
        [
            "",
            "tokens entering",
            "needed: enter, %",
            "enter or merged, %",
            "alive at half depth, %",
            "accuracy / oracle's, %",
        ],
        lines,
    )


def ablation(group: str, task: str = "tiny-crowded") -> str:
    """One group of DUET's settings beside the default, at equal measured means."""
    lines = []
    for row in done(task, "ablations"):
        if row["label"] == "duet" or row["label"].startswith(f"{group}: "):
            lines.append((row["beside"], row["label"] != "duet", row))
    out = []
    for beside, other, row in sorted(lines, key=lambda line: (-line[0], line[1])):
        solved = row["solved"]
        shown = [
            f"{solved['dominant']} + {solved['contextual']}",
            columns.tokens(row["tokens"]["measured"]),
            columns.share(row["accuracy"]),
        ]
        out.append(
            [
                f"{beside:.0%}",
                row["label"].partition(": ")[2] if other else "default",
                *shown,
                _more(row).removeprefix(", ") or "-",
            ]
        )
    return table(
        ["budget", group, "dominant + contextual", "measured tokens", "accuracy", "points against the default"], out
    )


FRONTS = ("cdpruner", "scope", "divprune", "vispruner", "visionzip")


def fronts_of(task: str) -> dict[str, tuple[str | None, ...]]:
    """Choices before the decoder: the runs that keep one count, follow DUET's schedule, and have ``duet_plus``'s
    drops."""
    duets = "((3, 0.5), (4, 0.0))" if task == "tiny-chain" else "((6, 0.5), (9, 0.0))"  # by depth
    return {
        "duet_plus": (None, f"duet_plus[schedule={duets}]", "duet_plus"),
        "duet": (None, "duet", "duet+duet_plus"),
        **{name: (name, f"{name}+duet", f"{name}+duet_plus") for name in FRONTS},
    }


def right(task: str, name: str) -> dict[str, np.ndarray]:
    """Per run which questions were answered right."""
    found = unpack(load(COMPARISON / task / "results" / f"{name}.json"))
    return {
        key: np.array([accepted(a, gold) for a, gold in zip(said, found["gold"], strict=True)])
        for key, said in found["answers"].items()
    }


def fronts(task: str, name: str) -> str:
    """Choices by schedule: percent kept, and with the drops of ``duet_plus`` the points more or fewer
    than itself."""
    hits, kept = right(task, name), {row["id"]: row["kept"] for row in done(task, name)}
    lines = []
    for budget in (0.11, 0.07, 0.05):
        best = hits[f"duet_plus@{budget:g}"]
        for front, runs in fronts_of(task).items():
            ids = [None if run is None else f"{run}@{budget:g}" for run in runs]
            cells = [columns.percent(kept[run]) if run in kept else "-" for run in ids]
            own = hits.get(next(run for run in reversed(ids) if run in hits))
            low, high = map(columns.points, difference_interval(own, best))
            wins, losses, p_value = sign_test(own, best)
            more = f"{columns.points(own.mean() - best.mean())} ({low} to {high}); {wins} : {losses}, p {columns.chance(p_value)}"
            lines.append([f"{budget:.0%}", front, *cells, "-" if front == "duet_plus" else more])
    head = [
        "budget",
        "chosen by",
        "one count",
        "DUET's schedule",
        "duet_plus's drops",
        "at its last entry: points against duet_plus; wins : losses",
    ]
    return table(head, lines)


SPENT = {"tiny-chain": (0.33, 0.11, 0.05), "tiny-crowded": (0.33, 0.11, 0.05), "tiny-video": (0.47, 0.07)}


def which() -> str:
    """Percent kept by every method as it comes, on the three tasks; ordered by what is kept of chains at 11 %, those
    that cannot last."""
    kept: dict[str, dict[tuple[str, float], Row]] = {}
    for task in SPENT:
        for row in load(COMPARISON / task / "results" / "methods.json")["runs"]:
            if (
                row["method"] in duet_vlm.list_methods()
                and row["beside"] in SPENT[task]
                and row["id"] == ExperimentCell(row["method"], row["beside"]).id
            ):
                kept.setdefault(row["method"], {})[task, row["beside"]] = row

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        return columns.percent(row["kept"]) if row["status"] == "ok" else "-"

    def rank(found: dict[tuple[str, float], Row]) -> float:
        row = found.get(("tiny-chain", 0.11))
        return -1.0 if row is None else -row["kept"] if row["status"] == "ok" else -0.001

    head = ["% kept by", *(f"{task} {budget:.0%}" for task, budgets in SPENT.items() for budget in budgets)]
    lines = [
        [f"`{method}`", *(cell(found.get((task, budget))) for task, budgets in SPENT.items() for budget in budgets)]
        for method, found in sorted(kept.items(), key=lambda item: (("tiny-chain", 0.11) not in item[1], rank(item[1])))
    ]
    return table(head, lines)


def unguided(task: str) -> str:
    """Kept on the shipped checkpoint and on the one finished without attention supervision, by budget."""
    guided = {row["id"]: row for row in done(task, "methods")}
    runs = [row for row in done(task, "unguided") if row["id"] in guided and row["beside"]]

    def cell(row: Row) -> str:
        return f"{columns.percent(guided[row['id']]['kept'])} / {columns.KEPT.cell(row)} {columns.verdict(row)}".strip()

    return by_budget("kept, %: shipped / unguided", runs, cell)


def against(task: str, name: str) -> str:
    """Accuracy, and points more or less than the reference, by budget."""
    runs = [row for row in done(task, name) if row["beside"]]
    return by_budget(
        "accuracy, and points against the default", runs, lambda row: columns.share(row["accuracy"]) + _more(row)
    )


def _more(row: Row) -> str:
    found = row["against"]
    if found is None:
        return ""
    return f", {columns.points(found['difference'])} ({columns.span(found['interval'], columns.points)}) {columns.verdict(row)}".rstrip()


def schedules_unguided() -> str:
    """DUET's stages and schedules on the checkpoint finished without attention supervision."""
    out = []
    for row in done("tiny-crowded", "unguided"):
        if row["label"].startswith("duet,") or (row["label"] == "duet" and row["beside"] in (0.11, 0.05)):
            shown = [
                columns.tokens(row["tokens"]["measured"]),
                columns.share(row["accuracy"]),
                _more(row).removeprefix(", ") or "-",
            ]
            out.append((-row["beside"], row["label"] != "duet", [f"{row['beside']:.0%}", row["label"], *shown]))
    return table(
        ["budget", "", "measured tokens", "accuracy", "points against duet"],
        [line for *_, line in sorted(out, key=lambda x: x[:2])],
    )


def random_seeds() -> str:
    """How far three patterns of ``random`` lie apart."""
    rows = [row for row in done("tiny-crowded", "ablations") if row["label"].startswith("random")]
    budgets = list(dict.fromkeys(row["beside"] for row in rows))
    labels = sorted({row["label"] for row in rows})
    cells = {(row["label"], row["beside"]): str(columns.ACCURACY.cell(row)) for row in rows}
    return table(
        ["accuracy", *(f"{b:.0%}" for b in budgets)], [[label, *(cells[label, b] for b in budgets)] for label in labels]
    )


def proposed() -> str:
    """Proposals of the drop curve, beside the fixed schedules, on questions that were not there when it was chosen."""
    lines = []
    for task in ("tiny-chain", "tiny-crowded", "tiny-video"):
        rows = [row for row in done(task, "drop-curve-fresh") if row["beside"]]
        own = {row["beside"]: row for row in rows if row["label"] == "proposed"}
        for budget, row in sorted(own.items(), reverse=True):
            fixed = [
                other
                for label in ("paper", "deep")
                for other in rows
                if (other["label"], other["beside"]) == (label, budget)
            ]
            schedule = ", ".join(f"{keep:.0%} from {layer}" for layer, keep in row["settings"]["schedule"]) or "none"
            others = [columns.share(other["accuracy"]) + _more(other) for other in fixed]
            lines.append([f"`{task}`", f"{budget:.0%}", schedule, columns.share(row["accuracy"]), *others])
    return table(
        [
            "task",
            "budget",
            "proposed: kept of what enters",
            "accuracy",
            "paper's, points against it",
            "deep, points against it",
        ],
        lines,
    )


def curve(file: str) -> str:
    """The drop curve of a result under comparison/, by kind of question."""
    found = curve_of(load(COMPARISON / file))
    assert found is not None
    head = ["no visual token from layer", *(str(point.layer) for point in found.points), "full model"]
    lines = [["all", *(columns.share(point.accuracy) for point in found.points), columns.share(found.full)]]
    lines += [
        [kind, *(f"{point.kinds[kind]:.2f}" for point in found.points), f"{full:.2f}"]
        for kind, full in found.kinds.items()
    ]
    return table(head, lines)


def knobs() -> str:
    """Other methods' knobs: what was tried, what was chosen, and on fresh questions the default and what was chosen."""
    found = json.loads((STUDIES / "knobs.json").read_text())
    fresh = {
        (row["task"], row["method"], row["setting"], row["budget"]): row
        for row in found["results"]
        if row["status"] == "ok"
    }
    pairs = sorted(
        {(task, budget) for task, _, _, budget in fresh}, key=lambda pair: (pair[0] != "tiny-chain", -pair[1])
    )

    def shown(method: str, setting: str, pair: tuple[str, float]) -> str:
        row = fresh.get((pair[0], method, setting, pair[1]))
        low, high = row.get("interval", (0, 0)) if row else (0, 0)
        return f"{row['accuracy']:.3f}{' ▲' * (low > 0)}{' ▼' * (high < 0)}" if row else "-"

    lines = [["`duet_plus`", "", *(shown("duet_plus", "default", pair) for pair in pairs)]]
    for method, chosen in found["chosen"].items():
        others = dict.fromkeys(
            row["setting"] for row in found["tried"] if row["method"] == method and row["setting"] != "default"
        )
        tried = ", ".join(f"**{name}**" if name == chosen else name for name in others)
        turned = ["default", chosen] if chosen != "default" else []
        cells = [" → ".join(shown(method, each, pair) for each in turned).replace("- → -", "-") for pair in pairs]
        lines.append([f"`{method}`", tried, *cells])
    return table(
        ["method", "values tried beside the default", *(f"`{task}`, {budget:.0%}" for task, budget in pairs)], lines
    )


CHAIN_GROUPS = ("queries", "positions", "stages", "schedule")
GROUPS = ("queries", "positions", "cluster width", "contextual share", "stages", "schedule")


def agreement() -> str:
    """Rank correlation of each bench with print: rho, its interval, and how many methods."""
    found = json.loads((COMPARISON / "agreement.json").read_text())
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in found["rows"]:
        low, high = row["rho_interval"]
        told = f"{row['rho']:.2f} ({low:.2f} to {high:.2f}), tau {row['tau']:.2f}, n {len(row['methods'])}"
        cells.setdefault((row["bench"], row["group"]), {})[row["tokens"]] = told
    tokens = sorted({row["tokens"] for row in found["rows"]}, reverse=True)
    head = ["bench", "methods", *(f"{n} tokens" for n in tokens)]
    rows = [[bench, group, *(by_tokens.get(n, "-") for n in tokens)] for (bench, group), by_tokens in cells.items()]
    return table(head, rows)


def reentry() -> str:
    """Percent kept with and without re-entry on sealed streams, and points against ``duet_plus``."""
    lines: list[list[str]] = []
    budgets: list[float] = []
    for stream in json.loads((COMPARISON / "streams.json").read_text()):
        task, _, file = stream["result"].split("/")
        if file != "reentry.json":
            continue
        rows = [row for row in done(task, "reentry") if row["beside"]]
        budgets = sorted({row["beside"] for row in rows}, reverse=True)
        for label in dict.fromkeys(row["label"] for row in rows):
            own = {row["beside"]: row for row in rows if row["label"] == label}
            cells = [columns.percent(own[b]["kept"]) + _more(own[b]) for b in budgets]
            lines.append([f"`{task}`", label, *cells])
    return table(["task", "method", *(f"{budget:.0%}" for budget in budgets)], lines)


def stale() -> str:
    """Cosine of a visual token's state with that behind a gap, from a third of the depth on: mean, and lowest layer."""
    found = json.loads((STUDIES / "stale_states.json").read_text())["results"]
    gaps = list(next(iter(found.values()))["cosines"])
    lines = []
    for task, each in found.items():
        first = (len(each["cosines"][gaps[0]]) + 1) // 3
        later = [each["cosines"][gap][first:] for gap in gaps]
        lines.append([f"`{task}`", *(f"{np.mean(means):.2f} ({min(means):.2f})" if means else "-" for means in later)])
    return table(["read by the full model", *(f"{gap} layer{'s'[: gap != '1']}" for gap in gaps)], lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "agreement": agreement,
    "reentry": reentry,
    "stale": stale,
    "kinds_chain": lambda: kinds("tiny-chain", "methods", 0.11),
    "recall_chain": lambda: recall("tiny-chain", "methods", 0.11),
    "which": which,
    "fronts_chain": lambda: fronts("tiny-chain", "methods"),
    **{f"ablation_chain_{group}": lambda group=group: ablation(group, "tiny-chain") for group in CHAIN_GROUPS},  # type: ignore[misc]
    "drop_curve": proposed,
    "curve_crowded": lambda: curve("tiny-crowded/results/drop-curve.json"),
    "curve_chain": lambda: curve("tiny-chain/results/drop-curve.json"),
    "kinds_crowded": lambda: kinds("tiny-crowded", "methods", 0.07),
    "recall_crowded": lambda: recall("tiny-crowded", "methods", 0.07),
    "fronts_tiny": lambda: fronts("tiny", "methods"),
    "fronts_crowded": lambda: fronts("tiny-crowded", "methods"),
    "unguided_crowded": lambda: unguided("tiny-crowded"),
    "schedules_unguided": schedules_unguided,
    "random_seeds": random_seeds,
    "knobs": knobs,
    "settings_chain": lambda: against("tiny-chain", "settings"),
    "settings_crowded": lambda: against("tiny-crowded", "settings"),
    **{f"ablation_{group.replace(' ', '_')}": lambda group=group: ablation(group) for group in GROUPS},  # type: ignore[misc]
}
