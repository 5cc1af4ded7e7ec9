"""The headline and the short tables of README.md, and the tables of benchmarks/README.md, from committed result files.

Result files keep the names that the benchmarks give their rows; ``WORDS`` says them as these pages do.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comparison_tables
import inline_numbers
from folders import COMPARISON, ROOT, SPEED

import duet_vlm
from duet_vlm.evaluation.report import columns, markdown
from duet_vlm.evaluation.results import load
from duet_vlm.models.lookup import support

WIDTH = 118  # of a line of text
BEST = "duet_plus"
TOY = "tiny-chain"
# The rows of README's accuracy table.
SHOWN = (
    BEST,
    "duet",
    "divprune, DUET's schedule",
    "scope, DUET's schedule",
    "scope",
    "cdpruner",
    "random, DUET's counts",
)
# the columns of its speed table; one method and the last budget are its headline
METHOD, BUDGETS = "duet", ("33%", "11%")
# the authors' figure, on the page that says where it is from
PUBLISHED = re.compile(r"^\| `duet-64` \| ([\d.]+) \|", re.M)

WORDS = {  # in this order
    "tower with CLS, last layer unread": "with a CLS token (LLaVA), its unused last layer skipped",
    "tower with CLS": "with a CLS token (LLaVA)",
    "tower without CLS": "without a CLS token (Qwen2.5-VL)",
    "tower and projector": "with a CLS token, its unused last layer skipped, and projector",
    "choice, ": "",
    "picks=1": "one token per step",
    "picks=": "tokens per step: ",
    "stage, ": "",
    "keys made again": "key recompute",
    "keys made once": "key reuse",
    "grouped heads": "grouped-query attention",
    "decode step, padded, duet over no mask": "`duet`, padded batch of 2 (plain model: no mask)",
    "decode step, padded, visionzip": "`visionzip`, padded batch of 2",
    "decode step, long text": "`duet`, 512 text tokens",
    "decode step": "`duet`, 64 text tokens",
    "tower and decoder": "vision tower and decoder",
}


def _rows(name: str) -> list[dict[str, Any]]:
    return json.loads((SPEED / f"{name}.json").read_text())["results"]


def _words(name: str) -> str:
    for theirs, ours in WORDS.items():
        if theirs in name:
            name = name.replace(theirs, ours)
            if theirs.startswith(("tower", "decode step")):
                break
    return name


def _ratio(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['median']:.3f} ({low:.3f}-{high:.3f})"


def _speed_up(median: float, low: float, high: float) -> str:
    return f"{median:.2f}x ({low:.2f}-{high:.2f})"


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


# ---- README.md


def own_methods() -> dict[str, type[duet_vlm.Reducer]]:
    """Methods of the package itself, without those of other installed packages."""
    return {name: cls for name, cls in duet_vlm.list_methods().items() if cls.__module__.startswith("duet_vlm.")}


def _bench() -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The end-to-end benchmark, and its rows at the shorter text: the full model's and those of ``METHOD``."""
    found = json.loads((SPEED / "bench.json").read_text())
    text = min(row["text"] for row in found["rows"])
    sides = {row["side"]: row for row in found["rows"] if row["text"] == text}
    return found, {"full": sides["full"]} | {budget: sides[f"{METHOD} at {budget}"] for budget in BUDGETS}


def _spaced(budget: str) -> str:
    return budget.replace("%", " %")


def headline() -> str:
    """Gain and loss of one method at the smallest budget of the speed table."""
    _, rows = _bench()
    budget = BUDGETS[-1]
    full, small, share = rows["full"], rows[budget], float(budget.rstrip("%")) / 100
    whole, (low, *_, high) = small["speed_up"]["end to end"]["median"], _first_token()
    (kept,) = (
        row for row in comparison_tables.done(TOY, "methods") if row["beside"] == share and row["label"] == METHOD
    )
    published = PUBLISHED.search((ROOT / "docs" / "reproduce-duet.md").read_text())
    assert published is not None
    gained = _filled(
        f"**What you gain: with `{METHOD}` at {_spaced(budget)} of the visual tokens the first token comes {low:.1f} to {high:.1f} times as "
        f"fast, an answer of {full['new']} tokens {whole:.1f} times as fast, and the KV cache is {full['kv_bytes'] / small['kv_bytes']:.0f} "
        "times smaller.**"
    )
    lost = _filled(
        f"**What you lose: on a toy task of chained questions it keeps {columns.percent(kept['kept'])} % of the full model's accuracy; for "
        f"LLaVA-1.5-7B at this share its authors publish {published[1]} %.** Times are from a CPU and random weights; nothing has been measured on a "
        "GPU yet."
    )
    return f"{gained}\n\n{lost}"


def _first_token() -> list[float]:
    """Every measurement that there is of the headline's first token, on one shape, from the least on."""
    _, rows = _bench()
    budget = BUDGETS[-1]
    names = {
        "prefill": f"tower and decoder, {METHOD} at {budget}",
        "tower": f"llava, {METHOD} at {budget}: pixels to first token",
    }
    others = [next(row["median"] for row in _rows(file) if row["name"] == name) for file, name in names.items()]
    return sorted([rows[budget]["speed_up"]["to first token"]["median"], *others])


def names() -> str:
    """The families and methods."""
    families, methods = [row["family"] for row in support()], [name for name in own_methods() if name != "none"]

    def listed(found: list[str]) -> str:
        return ", ".join(f"`{name}`" for name in found)

    there = f"[{len(families)} model families](docs/families.md): {listed(families)}"
    return _filled(f"{there}. [{len(methods)} methods](docs/methods.md).")


def kept_short() -> str:
    """A few methods at every budget on the harder pictures; docs/comparison.md has all of them."""
    result = load(COMPARISON / TOY / "results" / "methods.json")
    runs = sorted(
        (row for row in comparison_tables.done(TOY, "methods") if row["label"] in SHOWN),
        key=lambda row: SHOWN.index(row["label"]),
    )
    title = "toy benchmark: % of the full model's accuracy kept at"
    full, size = columns.ACCURACY.cell(result["runs"][0]), result["model"]["parameters"] / 1e6
    note = _filled(
        f"A toy: {result['questions']['count']:,} questions in chains of up to three hops, an embedded model of {size:.1f} million parameters that "
        f"learned from answers alone. In full {full} are right; brackets hold 95 % intervals."
    )
    return f"{comparison_tables.by_budget(title, runs, lambda row: str(columns.KEPT.cell(row)))}\n\n{note}"


def gains() -> str:
    """First token, whole answer, memory."""
    found, rows = _bench()
    full, made = rows["full"], found["environment"]

    def time(stage: str) -> list[str]:
        taken = [f"{row['ms'][stage]['median'] / 1000:.2f} s" for row in rows.values()]
        faster = [_speed_up(**row["speed_up"][stage]) for row in rows.values()]
        return [taken[0], *(f"{seconds}: {ratio}" for seconds, ratio in zip(taken[1:], faster[1:], strict=True))]

    memory = [
        f"peak {row['peak_bytes'] / 2**20:.0f} MiB, KV cache {row['kv_bytes'] / 2**20:.0f} MiB" for row in rows.values()
    ]
    name = f"llava, {METHOD} at {BUDGETS[-1]}, 50% of the patches: pixels to first token"
    tower = next(row for row in _rows("tower") if row["name"] == name)
    half = _speed_up(tower["median"], *tower["interval"])
    lines = [
        ["time to first token", *time("to first token")],
        ["the same, half of the patches [in the tower](docs/reduce-in-the-tower.md)", "-", "-", half],
        [f"whole answer, {full['new']} tokens", *time("end to end")],
        ["memory beside the weights", *memory],
    ]
    shape, rounds = json.loads((ROOT / "benchmarks" / Path(found["model"]).name).read_text()), full["pairs"]
    decoder, vision = shape["text_config"], shape["vision_config"]
    # fewer cannot carry an interval of 95 %
    spread = "95 % intervals" if rounds >= 6 else f"the lowest and the highest of {rounds} rounds"
    note = _filled(
        f"**Not yet measured on a GPU.** {made['threads']} CPU threads, {made['dtype']}, {made['attention']}, batch of {full['batch']}. "
        f"Random weights: decoder of {decoder['num_hidden_layers']} layers x {decoder['hidden_size']}, tower of "
        f"{vision['num_hidden_layers']} x {vision['hidden_size']}; {full['text']} tokens besides the image. Times include the tower. "
        f"Both sides take turns; brackets hold {spread} (in the row of the tower: a 95 % interval, one thread). Peak memory is that of reading the "
        f"prompt. At {_spaced(BUDGETS[-1])} the first token was measured in three benchmarks of this shape: "
        f"{', '.join(f'{ratio:.2f}x' for ratio in _first_token())}; by FLOPs {inline_numbers.first_token('flops')}."
    )
    head = ["", f"all {full['tokens']} visual tokens", *(f"`{METHOD}` at {_spaced(budget)}" for budget in BUDGETS)]
    return f"{markdown.table(head, lines)}\n\n{note}"


# ---- benchmarks/README.md


def tower() -> str:
    return markdown.table(
        ["vision tower, attached / plain", "ratio (95 % interval)"],
        [[_words(row["name"]), _ratio(row)] for row in _rows("v2v")],
    )


def selection() -> str:
    rows = [[_words(row["name"]), _ratio(row)] for row in _rows("greedy")]
    return markdown.table(["token selection / full prefill of the decoder", "ratio (95 % interval)"], rows)


def stage() -> str:
    rows = [[_words(row["name"]), _ratio(row), _ratio(row["arithmetic"])] for row in _rows("t2v")]
    return markdown.table(
        ["T2V stage / dense layer of equal length", "ratio (95 % interval)", "its arithmetic alone"], rows
    )


def step() -> str:
    return markdown.table(
        ["decode step, attached / plain", "ratio (95 % interval)"],
        [[_words(row["name"]), _ratio(row)] for row in _rows("decode")],
    )


def prefill() -> str:
    rows = []
    for row in _rows("prefill"):
        name = _words(row["name"])
        if row.get("status") == "infeasible":
            rows.append([name, row["status"], "-", "-"])
            continue
        dense = row.get("same_rows")
        bare = _speed_up(dense["median"], *dense["interval"]) if dense else "-"
        rows.append([name, _speed_up(row["median"], *row["interval"]), bare, f"{row['predicted']:.2f}x"])
    return markdown.table(
        ["prefill speed-up, plain / attached", "measured (95 % interval)", "dense layers of equal length", "by FLOPs"],
        rows,
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "headline": headline, "names": names, "kept_short": kept_short, "gains": gains, "speed_tower": tower, "speed_selection": selection,
    "speed_stage": stage, "speed_step": step, "speed_prefill": prefill,
}  # fmt: skip
