"""One page that needs nothing else: no network, no file beside it. Content of a result file is shown as text, never as
markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from duet_vlm.evaluation.report import columns, markdown
from duet_vlm.evaluation.report.columns import Column, Run, at
from duet_vlm.evaluation.report.plots import darkness
from duet_vlm.evaluation.report.style import FLOORS, ORACLE
from duet_vlm.viz.colors import VARIABLES

Plots = dict[str, tuple[str, bytes, bytes]]
Entries = list[tuple[str, str]]


def page(results: Sequence[tuple[str, str, dict[str, Any], Plots]], again: str) -> str:
    """The page of several results.

    Parameters
    ----------
    results : sequence of (slug, source, result, plots)
        A short unique name of letters, digits and hyphens, the file it came from, the checked result, and its plots.
    again : str
        The command that makes this page anew.
    """
    here = files("duet_vlm.evaluation.report")
    script = here.joinpath("page.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(here.joinpath("page.html.j2").read_text("utf-8"))
    sections = [_section(*entry) for entry in results]
    return template.render(
        sections=sections,
        again=again,
        style=Markup(here.joinpath("page.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def _section(slug: str, source: str, result: dict[str, Any], plots: Plots) -> dict[str, Any]:
    shown = _columns(result)
    runs = columns.ordered(result)
    return {
        "slug": slug,
        "title": f"{result['task']}: {result['name']}",
        "facts": columns.facts(result),
        "note": markdown.NOTE.replace("`", ""),
        "source": source,
        "best": _best(result),
        "budgets": list(dict.fromkeys(text for run in runs if (text := columns.budget(run["budget"])))),
        "statuses": sorted({run["status"] for run in runs}, key=lambda status: (status != "ok", status)),
        "kinds": columns.kinds(result),
        "groups": list(dict.fromkeys(group for group, _, _ in shown)),
        "columns": [_head(*entry) for entry in shown],
        "runs": [_row(run, shown) for run in runs],
        "plots": [
            {"name": name, "caption": caption, "svg": _inline(svg, f"{slug}-{name}", caption)}
            for name, (caption, _, svg) in plots.items()
        ],
        "timed": at(result["runs"][0], "prefill", "ms") is not None,
        "cards": [
            _card(title, result[key])
            for title, key in (("Environment", "environment"), ("Model", "model"), ("Questions", "questions"))
        ],
        "experiment": json.dumps(result["experiment"], indent=1, ensure_ascii=False),
    }


def _best(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Opening of a section: budgets, the runs that keep the most at each, and the cost of a single best run."""
    shown = (columns.KEPT, columns.MEASURED, *columns.COST)
    named = [(c, *c.title.partition(", ")[::2]) for c in shown]  # "kept, %" in a head is "kept 99.8 %" in a line
    return [
        {
            "budget": budget, "labels": [run["label"] for run in runs],
            "cells": [
                (name, f"{cell.text} {unit}".strip(), cell.extra)
                # of several that are level what all have in common
                for c, name, unit in named[: 1 if len(runs) > 1 else None]
                if (cell := c.cell(runs[0]))
            ],
        }
        for budget, runs in columns.best(result, FLOORS | {ORACLE, "none"})
    ]  # fmt: skip


def _columns(result: dict[str, Any]) -> list[tuple[str, str | None, Column]]:
    """(group, kind or None, column) in the order of the table."""
    groups: dict[str, list[Column]] = {
        "accuracy": [columns.NOMINAL, columns.MEASURED, columns.ACCURACY, columns.KEPT],
        "comparison": [columns.difference(result), columns.P_VALUE, columns.OF_ORACLE],
    }
    kinds = [("kinds", kind, columns.kind(kind)) for kind in columns.kinds(result)]
    costs = [
        (group, None, column) for group, some in (("cost", columns.COST), ("recall", columns.RECALL)) for column in some
    ]
    return [*((group, None, column) for group, some in groups.items() for column in some), *kinds, *costs]


def _head(group: str, kind: str | None, column: Column) -> dict[str, Any]:
    return {"group": group, "kind": kind, "title": column.title, "help": column.help}


def _row(run: Run, shown: Sequence[tuple[str, str | None, Column]]) -> dict[str, Any]:
    cells = []
    for group, kind, column in shown:
        cell = column.cell(run) if run["status"] == "ok" else None
        kept = at(run, "kinds", kind, "kept") if kind is not None else None
        loss = 0.0 if kept is None else round(darkness(kept), 3)
        written = cell and {"value": repr(cell.value), "text": cell.text, "extra": cell.extra, "loss": loss}
        cells.append(({"group": group, "kind": kind}, written))
    counts = at(run, "solved", "counts")
    return {
        "label": run["label"],
        "text": f"{columns.name(run)} {run['method']} {run['id']}".lower(),
        "budget": columns.budget(run["budget"]),
        "status": run["status"],
        "role": "reference" if run["method"] in FLOORS | {ORACLE, "none"} else "method",
        "refusal": "" if run["status"] == "ok" else columns.refusal(run),
        "message": run.get("message"),
        "cells": cells,
        "cards": _cards(run),
        "counts": counts,
        "counts_of": max([at(run, "solved", "tokens") or 1, *(counts or [])]),
    }


def _cards(run: Run) -> list[dict[str, Any]]:
    """Details of a run: settings, solved counts, seeds, cost, comparison, kinds."""
    cards = [
        _card("Run", {"id": run["id"], "method": run["method"], "preset": run.get("preset")}),
        _card("Settings", run["settings"]),
    ]
    if run["status"] != "ok":
        return cards
    if run.get("solved"):
        cards.append(_card("Solved", {key: value for key, value in run["solved"].items() if key != "counts"}))
    cards.append(_card("Accuracy by seed", {f"seed {seed}": value for seed, value in (run.get("seeds") or {}).items()}))
    cards.append(
        _card("Per question", {"FLOPs": f"{run['flops']:.3g}", "KV cache": f"{run['kv_bytes'] / 1024:.1f} KiB"})
    )
    if run.get("against"):
        other = run["against"]
        wins = {"right here, wrong there": other["wins"], "wrong here, right there": other["losses"]}
        cards.append(_card(f"Against {other['run']}", wins | {"p, not adjusted": columns.chance(other["p_value"])}))
    if run.get("prefill"):
        cards.append(_card("Timing", {key: run["prefill"][key] for key in ("rounds", "batch")}))
    cards.append(
        _card("Kinds: accuracy, share kept, questions", {kind: _kind(entry) for kind, entry in run["kinds"].items()})
    )
    return [card for card in cards if card["entries"]]


def _kind(entry: dict[str, Any]) -> str:
    kept = entry.get("kept")
    between = columns.span(entry.get("kept_interval"), columns.percent)
    share = "" if kept is None else f", {columns.percent(kept)} %" + (f" ({between})" if between else "")
    return f"{columns.share(entry['accuracy'])}{share}, n = {entry['n']:,}"


def _card(title: str, entries: dict[str, Any]) -> dict[str, Any]:
    return {"title": title, "entries": [(key, _value(value)) for key, value in entries.items() if value is not None]}


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return (
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else f"{value:.4g}"
        if isinstance(value, float)
        else str(value)
    )


def _inline(svg: bytes, prefix: str, caption: str) -> Markup:
    """An SVG of ours as part of the page: ids made unique, colours left to the page, with a description for screen
    readers.

    The drawing comes from matplotlib, which escapes the labels in it; its comments hold labels and are dropped.
    """
    text = svg.decode()
    text = re.sub(r"<!--.*?-->", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(f": {colour}", f": var(--{variable})")
    text = re.sub(r"\n\s*", "\n", text)
    label = Markup(' role="img" aria-label="{}; the table of this section holds the numbers"').format(caption)
    return Markup(text.replace("<svg", f"<svg{label}", 1))
