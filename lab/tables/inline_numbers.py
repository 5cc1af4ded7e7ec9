"""Numbers within sentences, from committed result files, the registry and the arithmetic of a budget.

A page has them between markers that a reader does not see: ``<!-- n kept tiny-chain scope+duet@0.11 -->90.5<!-- /n
-->``. The first word names the number, the others are its arguments: a task under lab/comparison/ and runs by their id.
A range has whole numbers, a single value one decimal.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import readme_tables
import training_tables
from folders import COMPARISON, ROOT, SPEED, STUDIES

import duet_vlm
from duet_vlm.evaluation.report import columns
from duet_vlm.evaluation.results import load
from duet_vlm.evaluation.statistics import resampled
from duet_vlm.utils.suggest import did_you_mean

RESULTS = (SPEED, STUDIES)
MARK = re.compile(r"<!-- n ([^\n]*?) -->([^\n]*?)<!-- /n -->")
METHODS = ROOT / "src" / "duet_vlm" / "methods"


class NumberError(ValueError):
    """A marker that names nothing, or stands where Markdown would take it for a block."""


@functools.cache
def _result(task: str, name: str = "methods") -> dict[str, Any]:
    return load(COMPARISON / task / "results" / f"{name}.json")


@functools.cache
def _file(name: str) -> dict[str, Any]:
    (file,) = (file for folder in RESULTS if (file := folder / f"{name}.json").exists())
    return json.loads(file.read_text())


def _run(task: str, run: str, name: str = "methods") -> dict[str, Any]:
    # words of a marker have no spaces
    rows = {row["id"].replace(" ", ""): row for row in _result(task, name)["runs"] if row["status"] == "ok"}
    if run not in rows:
        raise NumberError(f"no run {run!r} in lab/comparison/{task}/results/{name}.json{did_you_mean(run, rows)}")
    return rows[run]


def _row(file: str, **is_: Any) -> dict[str, Any]:
    found = _file(file)
    rows = [
        row
        for row in found.get("results", found.get("rows", ()))
        if all(row.get(key) == value for key, value in is_.items())
    ]
    if len(rows) != 1:
        raise NumberError(f"{len(rows)} rows of benchmarks/results/{file}.json have {is_}")
    return rows[0]


def _range(values: Iterable[float]) -> str:
    """From the lowest to the highest, in whole numbers."""
    found = sorted(values)
    low, high = f"{found[0]:.0f}", f"{found[-1]:.0f}"
    return low if low == high else f"{low} to {high}"


# ---- what is kept


def kept(task: str, *runs: str) -> str:
    """Percent of the full model's accuracy that a run keeps; of several the lowest and the highest."""
    found = [_run(task, run)["kept"] for run in runs]
    return columns.percent(found[0]) if len(found) == 1 else _range(100 * share for share in found)


def woken(task: str, budget: str) -> str:
    """Percent of the full model's accuracy that ``duet_plus`` with re-entry keeps, on a sealed stream."""
    (row,) = (
        r
        for r in _result(task, "reentry")["runs"]
        if (r["label"], r["beside"]) == ("duet_plus, re-entry", float(budget))
    )
    return columns.percent(row["kept"])


def whole(task: str, run: str) -> str:
    """The same, to a whole number."""
    return f"{100 * _run(task, run)['kept']:.0f}"


def gap(task: str, *runs: str) -> str:
    """Points of what is kept between the runs of each pair, the first less the second; the smallest and the largest."""
    return _range(
        100 * (_run(task, more)["kept"] - _run(task, less)["kept"])
        for more, less in zip(runs[::2], runs[1::2], strict=True)
    )


def lead(run: str) -> str:
    """Points of accuracy of a run beyond ``duet_plus`` on questions that chose nothing: interval, questions that either
    alone answers right, p."""
    against = _run("tiny-chain", run, "fresh")["against"]
    more, interval = columns.points(against["difference"]), columns.span(against["interval"], columns.points)
    told = columns.chance(against["p_value"])
    chance = told if told.startswith("<") else f"= {told}"
    return f"{more} points ({interval}; {against['wins']} : {against['losses']} questions, p {chance})"


def asked() -> str:
    """Questions that chose nothing."""
    return f"{_result('tiny-chain', 'fresh')['questions']['count']:,}"


def _beside(task: str, budget: str | float) -> list[dict[str, Any]]:
    """Rows of methods as they come at a budget; references stand for no method."""
    found = [row for row in _result(task)["runs"] if row["status"] == "ok" and row["beside"] == float(budget)]
    return [row for row in found if row["method"].partition("+")[0] in duet_vlm.list_methods()]


def _asked_beside(task: str) -> list[dict[str, Any]]:
    """Rows of methods at all budgets that stand beside ``duet_plus``."""
    return [
        row
        for budget in {row["beside"] for row in _result(task)["runs"]} - {None}
        for row in _beside(task, budget)
        if row["against"]
    ]


def place(task: str, run: str) -> str:
    """Place of a run among all rows of its budget, by accuracy: ``7th of 30``."""
    rows = _beside(task, run.rpartition("@")[2])
    better = sum(row["accuracy"] > _run(task, run)["accuracy"] for row in rows)
    ending = {1: "st", 2: "nd", 3: "rd"}.get((better + 1) % 10 if (better + 1) // 10 != 1 else 0, "th")
    return f"{better + 1}{ending} of {len(rows)}"


def untold(task: str, budget: str) -> str:
    """Rows of a budget that are not told apart from the reference, and all of them: ``18 of 30``."""
    rows = [row for row in _beside(task, budget) if row["against"]]
    return f"{sum(columns.verdict(row) in columns.UNTOLD for row in rows)} of {len(rows)}"


def most_above(*tasks: str) -> str:
    """Points of accuracy, rounded up, by which the best row of any budget is above ``duet_plus``."""
    return str(max(math.ceil(100 * row["against"]["difference"]) for task in tasks for row in _asked_beside(task)))


def changed(task: str, *starts: str) -> str:
    """Points that other settings of ``duet_plus`` cost on validation questions, by how their runs begin: the smallest
    and the largest loss."""
    losses = [
        -100 * row["against"]["difference"] for row in _result(task, "settings")["runs"] if row["id"].startswith(starts)
    ]
    if not losses:
        raise NumberError(f"no settings {', '.join(starts)} in lab/comparison/{task}/results/settings.json")
    return f"{min(losses):.1f} to {max(losses):.1f}"


def settings(task: str, run: str) -> str:
    """Points of one setting of ``duet_plus`` against the default, with the interval."""
    against = _run(task, run, "settings")["against"]
    return f"{columns.points(against['difference'])} ({columns.span(against['interval'], columns.points)})"


def flops(task: str, *runs: str) -> str:
    """Share of the full model's FLOPs, what a method spends on its choice included; of several the lowest and the
    highest."""
    found = [f"{_run(task, run)['flops_share']:.2f}" for run in runs]
    return found[0] if len(found) == 1 else f"{min(found)} to {max(found)}"


def needed(*kinds: str) -> str:
    """Patches that questions of these kinds need, on average."""
    found = json.loads((COMPARISON / "tiny-chain" / "needed.json").read_text())["patches"]
    counts = [f"{found[kind]['mean']:.0f}" for kind in kinds]
    return " and ".join([", ".join(counts[:-1]), counts[-1]] if len(counts) > 1 else counts)


# ---- budgets


def wide(layers: str, depth: str, percent: str) -> str:
    """Percent of a budget that so many layers at full width spend, of a decoder so deep."""
    return f"{100 * int(layers) / int(depth) / (int(percent) / 100):.0f}"


def tokens(percent: str, of: str) -> str:
    """A budget in tokens."""
    return f"{int(percent) * int(of) / 100:.0f}"


# ---- time


def first_tokens() -> dict[str, float]:
    """Speed-ups to the first token of ``duet`` at 11 % at the shape of the benchmarks: three measurements, and what
    FLOPs allow."""
    tower = _row("tower", name="llava, duet at 11%: pixels to first token")
    return {
        "bench": _row("bench", side="duet at 11%", text=65)["speed_up"]["to first token"]["median"],
        "prefill": _row("prefill", name="tower and decoder, duet at 11%")["median"],
        "tower": tower["median"],
        "flops": tower["predicted"],
    }


def first_token(source: str) -> str:
    """One of these."""
    return f"{first_tokens()[source]:.2f}x"


def compiled() -> str:
    """Percent that compiled layers cost per decode step, with either cache."""
    rows = {row["side"]: row["ratio"] for row in _file("neighbours")["decoding"]}
    return _range(100 * (ratio - 1) for side, ratio in rows.items() if "compiled" in side)


def towers_met() -> str:
    """Percent within which the roofline meets the times of the towers, rounded up."""
    return f"{max(math.ceil(100 * abs(row['ratio'] - 1)) for row in _file('roofline')['results'] if row['name'].startswith('tower with'))}"


def step_beyond() -> str:
    """Percent that a decode step takes beyond what the roofline predicts."""
    return _range(
        100 * (1 / row["ratio"] - 1) for row in _file("roofline")["results"] if row["name"].startswith("decode step")
    )


def overhead(what: str) -> str:
    """Of the benchmark of what methods cost: how many were timed, or missed their target."""
    rows = [row for row in _file("overhead")["results"] if row["name"].endswith("of the prefill") and "interval" in row]
    return {"timed": str(len(rows)), "missed": str(sum(not row["met"] for row in rows))}[what]


def tower_first(share: str, input_: str) -> str:
    """Predicted speed-up of a 7B to the first token with a share of the patches, or with all."""
    side = "duet at 11%" + ("" if share == "all" else f", {share}% of the patches")
    return f"{_row('tower_roofline', model='7B', input=input_.replace('_', ' '), side=side)['speed_up']:.1f}"


# ---- what there is


def methods() -> str:
    return str(sum(name != "none" for name in readme_tables.own_methods()))


def compared(task: str) -> str:
    """Methods that occur in the comparison of a task, by themselves."""
    return str(len({row["method"] for row in _result(task)["runs"]} & set(duet_vlm.list_methods()) - {"none"}))


# ---- training


def regained(config: str, run: str) -> str:
    """Points that training with a share of the patches gains over the model trained in full, both run so."""
    common = [seed for seed in training_tables.seeds(config) if seed in training_tables.seeds("full-in-tower")]
    ours, free = (training_tables.hits(name, run, common) for name in (config, "full-in-tower"))
    if ours is None or free is None:
        raise NumberError(f"no run {run!r} of {config} under lab/comparison/training")
    interval = columns.span(
        resampled((ours.mean(0), free.mean(0)), lambda a, b, axis: a.mean(axis) - b.mean(axis)), columns.points
    )
    return f"{100 * (ours.mean() - free.mean()):.1f} points (95 %: {interval})"


def soak(*keys: str) -> str:
    """Numbers of the soak of a server, by their names, joined by commas."""
    found = _file("serve_soak")
    return ", ".join(f"{found[key]:,.0f}" for key in keys)


def rho(task: str, tokens: str, group: str = "all") -> str:
    """Spearman's rho of a bench with print, its interval, and over how many methods."""
    rows = json.loads((COMPARISON / "agreement.json").read_text())["rows"]
    (row,) = (r for r in rows if (r["bench"], str(r["tokens"]), r["group"]) == (task, tokens, group))
    low, high = row["rho_interval"]
    return f"{row['rho']:.2f} ({low:.2f} to {high:.2f}; {len(row['methods'])} methods)"


NUMBERS: dict[str, Callable[..., str]] = {
    each.__name__: each
    for each in (
        kept, whole, gap, lead, asked, place, untold, most_above, changed, settings, flops, needed, wide, tokens, first_token, compiled,
        towers_met, step_beyond, overhead, tower_first, methods, compared, regained, rho, soak, woken,
    )
}  # fmt: skip


@functools.cache
def made(name: str) -> str:
    """A number by what stands in its marker."""
    what, *words = name.split()
    if what not in NUMBERS:
        raise NumberError(f"no number {what!r}{did_you_mean(what, NUMBERS)}; there are {', '.join(sorted(NUMBERS))}")
    try:
        return NUMBERS[what](*words)
    except (NumberError, TypeError, ValueError, KeyError, FileNotFoundError) as error:
        raise NumberError(f"{name!r}: {error}") from error


def filled(text: str) -> str:
    """A page with every number between its markers made anew."""
    return MARK.sub(lambda match: f"<!-- n {match[1]} -->{made(match[1])}<!-- /n -->", text)


def faults(text: str) -> list[str]:
    """Markers that name no number, are not closed on their line, or begin one (Markdown takes such a line for a block
    of HTML)."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        marks = list(MARK.finditer(line))
        if len(marks) != len(re.findall(r"<!--\s*n\b", line)) or len(marks) != len(re.findall(r"<!--\s*/n\b", line)):
            found.append(f"line {number}: a marker is not of the form <!-- n NAME -->number<!-- /n --> on one line")
        if line.lstrip().startswith("<!-- n "):
            found.append(f"line {number}: begins with a marker; put a word in front of it")
        for mark in marks:
            try:
                made(mark[1])
            except NumberError as error:
                found.append(f"line {number}: {error}")
    return found


def seen(text: str) -> str:
    """A page as it is read: without the markers."""
    return MARK.sub(lambda match: match[2], text)
