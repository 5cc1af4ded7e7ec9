"""Regenerate every table and the numbers within sentences of README.md, docs/ and benchmarks/, and the lists that the
command line prints, from committed result files, the registry and the adapters: ``make tables``.
``lab/studies/lab_tables.py`` makes those of the lab.

``--check`` writes nothing and exits with 1 if a page differs from what the files say. A table without rows, or with a
column that no row fills, is an error both ways: page and generator then agree about nothing. So is a number that
nothing makes (``inline_numbers``).
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

import inline_numbers
import lab_tables
import numpy as np
import readme_tables
import scale_tables
from folders import ROOT, SPEED

import duet_vlm
from duet_vlm.api import catalogue
from duet_vlm.cli.models import cell
from duet_vlm.evaluation.report import columns
from duet_vlm.evaluation.statistics import kept_interval
from duet_vlm.models.lookup import support
from duet_vlm.planning.budget import SpanPlan
from duet_vlm.reducers.decoder import DecoderReducer
from duet_vlm.reducers.encoder import EncoderReducer
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.vision_tower import TowerReducer
from duet_vlm_lab.training_cost import LLAVA_7B, TrainedParts, TrainingExample, step_flops


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def result(name: str) -> dict[str, Any]:
    return json.loads((SPEED / f"{name}.json").read_text())


def speed() -> str:
    rows = []
    for name in ("v2v", "greedy", "t2v", "decode", "prefill"):
        for entry in result(name)["results"]:
            if "interval" not in entry:
                rows.append([entry["name"], entry["status"], entry["reason"]])
                continue
            low, high = entry["interval"]
            aim = (
                []
                if entry["target"] is None
                else [f"target {entry['target']:.3g}: {'met' if entry['met'] else '**missed**'}"]
            )
            bound = [f"{entry['predicted']:.3f} by FLOPs"] if "predicted" in entry else []
            bare = [f"{entry['same_rows']['median']:.3f} for as many bare rows"] if "same_rows" in entry else []
            alone = [f"{entry['arithmetic']['median']:.3f} for its arithmetic alone"] if "arithmetic" in entry else []
            rows.append(
                [
                    entry["name"],
                    f"{entry['median']:.3f} ({low:.3f}-{high:.3f})",
                    "; ".join(aim + bound + bare + alone) or "-",
                ]
            )
    return table(["what", "ratio", "held against"], rows)


def train_step() -> str:
    """One table per shape: the plain step, then each reduced one with its ratio, what FLOPs promise, and the stages."""
    head = [
        "step",
        "ms",
        "of plain (95 % interval)",
        "by FLOPs",
        "vision ms",
        "decoder ms",
        "backward ms",
        "optimiser ms",
    ]
    head += ["activations MiB", "peak memory MiB"]
    shapes: dict[str, dict[str, list[str]]] = {}
    for entry in result("train_step")["results"]:
        title = f"{entry['name'].split(',')[0].capitalize()} (batch of {entry['batch']}; gradients alone take {entry['gradients_mib']:.0f} MiB):"
        lines = shapes.setdefault(title, {})
        low, high = entry["interval"]
        ratios = [f"{entry['median']:.3f} ({low:.3f}-{high:.3f})", f"{entry['predicted']:.3f}"]
        for place, name, against in ((1, entry["base"], ["1", "1"]), (0, entry["side"], ratios)):
            stages = [f"{stage['milliseconds'][place]:.0f}" for stage in entry["stages"].values()]
            memory = [f"{entry[field][place]:.0f}" for field in ("activations_mib", "memory_mib")]
            lines[name] = [name, f"{entry['milliseconds'][place]:.0f}", *against, *stages, *memory]
    return "\n\n".join(f"{title}\n\n{table(head, lines.values())}" for title, lines in shapes.items())


def train_flops() -> str:
    """Predicted FLOPs of a step of LLaVA-1.5-7B, one sample of 576 visual and 65 other rows, by what is trained."""
    decoder, vision = LLAVA_7B
    recipes = {
        "projector (stage 1)": TrainedParts(decoder=False),
        "projector and decoder (stage 2)": TrainedParts(),
        "the same, gradient checkpointing": TrainedParts(checkpointing=True),
        "the same as transformers switches it on (a gradient runs through the frozen tower)": TrainedParts(
            checkpointing=True, input_gradients=True
        ),
        "projector and adapters of rank 128": TrainedParts(decoder=False, lora=128),
    }
    plans = [SpanPlan(576, 576, 0, (576,) * decoder.layers)]
    plans += [duet_vlm.get_method("duet")().plan(576, decoder.layers, budget) for budget in (192, 128, 64)]
    rows = []
    for name, trained in recipes.items():
        full, *reduced = (
            step_flops(
                decoder,
                vision,
                [TrainingExample(65, (plan,), 48 * (plan.entry < 576), plan.reduces_entry)],
                trained,
                unread_layers=1,
            ).total
            for plan in plans
        )
        rows.append([name, f"{full / 1e12:.1f}", *(f"{flops / full:.1%}" for flops in reduced)])
    return table(["trained", "TFLOPs per sample, all tokens", "192 tokens", "128", "64"], rows)


def pressing() -> str:
    """Right answers with a reduced prompt, a compressed cache, and both."""
    found = result("neighbours")
    cells: dict[str, dict[float, str]] = {}
    for row in found["pressing"]:
        cells.setdefault(row["method"], {})[row["share"]] = f"{columns.share(row['accuracy'])} ({row['keys']:.0f})"
    shares = list(next(iter(cells.values())))
    head = ["visual tokens", *("all keys" if share == 1 else f"{share:.0%} of the keys" for share in shares)]
    names = {"none": "all"}
    lines = [[names.get(method, f"`{method}` at 33 %"), *row.values()] for method, row in cells.items()]
    told = f"Share of right answers on {found['questions']} questions of the embedded task `tiny`; in brackets keys per layer and head."
    return table(head, lines) + "\n\n" + told


def reentry_cost() -> str:
    """Time with re-entry over time with drops."""
    lines = []
    for row in result("reentry")["results"]:
        low, high = row["interval"]
        held = "-" if row["target"] is None else f"{row['target']:.2f}: {'met' if row['met'] else '**missed**'}"
        flops = f"{row['predicted']:.3f}" if "predicted" in row else "-"
        lines.append([row["name"], f"{row['median']:.3f} ({low:.3f}-{high:.3f})", flops, held])
    return table(["what", "ratio", "by FLOPs", "target"], lines)


def overhead() -> str:
    """Cost of every method by itself, of the prefill and of one wide layer; those that cannot run below the table."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result("overhead")["results"]:
        method, unit = row["name"].split(", ", 1)
        found.setdefault(method, {})[unit] = row

    def cell(row: dict[str, Any] | None) -> str:
        if row is None or "interval" not in row:
            return "-"
        low, high = row["interval"]
        return f"{row['median']:.1%} ({low:.1%}-{high:.1%})"

    lines, out = [], []
    for method, units in found.items():
        prefill = units["of the prefill"]
        if "interval" not in prefill:
            out.append(f"`{method}`: {prefill['reason']}")
            continue
        held = f"{prefill['target']:.0%}: {'met' if prefill['met'] else '**missed**'}"
        wide = cell(units.get("of one layer, 4096 wide"))
        lines.append(
            [f"`{method}`", f"{prefill['budget']:.0%}", f"{prefill['predicted']:.1%}", cell(prefill), held, wide]
        )
    head = ["method", "budget", "by FLOPs", "measured, of the prefill", "target", "of one layer, 4096 wide"]
    told = "\n\nLeft out: " + "; ".join(out) + "." if out else ""
    return table(head, lines) + told


def serving() -> str:
    """Stock vLLM beside the plug-in: medians over rounds, and the lowest and highest ratio of a round to stock's."""
    found = result("serve")
    rounds = {(row["concurrency"], row["side"]): row["rounds"] for row in found["results"]}
    lines = []
    for row in found["results"]:
        cells = [f"{row['requests_per_second']:.2f}", f"{row['first_token_seconds']:.2f} s"]
        for place, key in enumerate(("requests_per_second", "first_token_seconds")):
            pairs = zip(row["rounds"], rounds[row["concurrency"], "stock"], strict=True)
            ratios = sorted(ours[key] / theirs[key] for ours, theirs in pairs)
            if row["side"] != "stock":
                cells[place] += f": {row[f'{key}_to_stock']:.2f}x ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        lines.append(
            [str(row["concurrency"]), row["side"], *cells, f"{row['prompt_rows']:.0f}", f"{row['kv_usage']:.1%}"]
        )
    text, made = found["shape"]["text"], found["environment"]
    told = f"Random LLaVA, decoder of {text['num_hidden_layers']} layers x {text['hidden_size']}, {found['shape']['new_tokens']} new tokens; "
    told += f"vLLM {made['vllm']}, {made['device']}; {len(found['results'][0]['rounds'])} rounds in turns, brackets hold the lowest and the highest."
    head = [
        "at once",
        "side",
        "requests per second",
        "time to first token",
        "rows of a prompt",
        "KV cache in use, at most",
    ]
    return table(head, lines) + "\n\n" + told


def serving_stages() -> str:
    """The first stage alone and both stages at equal means, over stock vLLM, several requests at once: medians of
    ratios, lowest and highest."""
    found = result("serve_stages")
    rows = {(row["new"], row["concurrency"], row["kind"], row["side"]): row for row in found["results"]}
    cases = [case for case in dict.fromkeys(key[:3] for key in rows) if case[1] > 1]
    shares = list(dict.fromkeys(key[3].split()[1] for key in rows if key[3] != "stock"))
    lines = []
    for new, concurrency, kind in cases:
        stock = rows[new, concurrency, kind, "stock"]
        for share in shares:
            cells = [str(new), str(concurrency), kind, share]
            for key in ("requests_per_second", "first_token_seconds", "kv_usage"):
                for stages in ("first", "both"):
                    row = rows[new, concurrency, kind, f"{stages} {share}"]
                    pairs = zip(row["rounds"], stock["rounds"], strict=True)
                    ratios = sorted(ours[key] / theirs[key] for ours, theirs in pairs if theirs[key])
                    cells.append(f"{row[f'{key}_to_stock']:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})" if ratios else "-")
            lines.append(cells)
    text, made = found["shape"]["text"], found["environment"]
    told = f"Random LLaVA, decoder of {text['num_hidden_layers']} layers x {text['hidden_size']}; vLLM {made['vllm']}, {made['device']}; "
    told += f"{len(found['results'][0]['rounds'])} rounds in turns, brackets hold the lowest and the highest ratio."
    head = ["new tokens", "at once", "pictures", "mean", *(f"{what}, {stages}" for what in ("requests per second", "time to first token", "KV cache at most") for stages in ("first", "both"))]  # fmt: skip
    return table(head, lines) + "\n\n" + told


def serving_accuracy() -> str:
    """Accuracy kept of embedded models on a server, and answers that are those of the method attached."""
    lines = []
    full: dict[str, np.ndarray] = {}
    for row in result("serve_accuracy")["results"]:
        hits = np.array(list(row["hits"])) == "1"
        base = full.setdefault(row["task"], hits)  # stock vLLM comes first
        mean = "all" if row["share"] is None else f"{row['share']:.0%}"
        interval = "" if row["share"] is None else columns.span(kept_interval(hits, base), columns.percent)
        kept = columns.Cell(0, columns.percent(hits.sum() / base.sum()), interval)
        same = f"{row['as_attached']} of {row['questions']}"
        lines.append([row["task"], row["stages"], mean, str(kept), same])
    return table(["task", "stages", "mean tokens", "accuracy kept, %", "answers as attached"], lines)


def static() -> str:
    """A decode step with a dynamic and a static cache, layers as they are and compiled."""
    found = result("neighbours")
    rows = []
    for row in found["decoding"]:
        low, high = row["interval"]
        rows.append([row["side"], f"{row['milliseconds']:.1f}", f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})"])
    widths = sorted(set(found["decoding"][0]["rows"]), reverse=True)
    told = f"`duet` at {found['budget']:.0%}: layers hold {', '.join(map(str, widths))} rows; a decoder of 12 x 768, float32, batch of 1."
    return table(["cache and layers", "ms per step", "of the first (95 %)"], rows) + "\n\n" + told


def methods() -> str:
    rows = []
    for name, cls in readme_tables.own_methods().items():
        where = [
            word for word, base in (("before", EncoderReducer), ("inside", DecoderReducer)) if issubclass(cls, base)
        ]
        where = ["tower"] if issubclass(cls, TowerReducer) else where
        asks = Input.SCORES in cls().requires
        asks = asks or Input.QUESTION in cls().requires
        rows.append([f"`{name}`", cls.summary, " + ".join(where) or "-", "yes" if asks else "no", cls.paper])
    return table(["method", "what it does", "where", "uses the text", "paper"], rows)


def supported() -> str:
    rows = support()
    return table(
        list(rows[0]),
        [
            [cell(value) if key not in ("family", "example") else f"`{value}`" for key, value in row.items()]
            for row in rows
        ],
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "pressing": pressing,
    "static": static,
    "serving": serving,
    "serving_stages": serving_stages,
    "serving_accuracy": serving_accuracy,
    "overhead": overhead,
    "reentry_cost": reentry_cost,
    "speed": speed,
    "train_step": train_step,
    "train_flops": train_flops,
    "methods": methods,
    "families": supported,
    **lab_tables.BLOCKS,
    **readme_tables.BLOCKS,
    **scale_tables.BLOCKS,
}
PAGES = (
    "README.md", "docs/choose.md", "docs/comparison.md", "docs/drop-curve.md", "docs/families.md", "docs/methods.md",
    "docs/reduce-in-the-tower.md", "docs/reentry.md", "docs/serve.md", "docs/train-with-reduction.md", "docs/trained-compressors.md", "docs/video.md",
    "benchmarks/README.md", "lab/NOTEBOOK.md",
)  # fmt: skip


@functools.cache
def made(name: str) -> str:
    """A block by its name."""
    return BLOCKS[name]()


def filled(page: str) -> str:
    """The page with every block and every number between its markers made anew."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- table:{match[1]} -->\n{made(match[1])}\n<!-- /table:{match[1]} -->"

    text = re.sub(r"<!-- table:(\w+) -->.*?<!-- /table:\1 -->", block, (ROOT / page).read_text(), flags=re.S)
    return inline_numbers.filled(text)


def faults(text: str) -> list[str]:
    """Faults of the tables in a block: no rows, rows that do not fit their head, columns in which no row has a value; a
    block without any text."""
    found = [] if text.strip() else ["nothing in it"]
    for lines in re.findall(r"(?:^\|.*(?:\n|\Z))+", text, flags=re.M):
        head, dashes, *rows = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines.strip().split("\n")
        ]
        found += [f"{' | '.join(head)}: no rows"] if not rows else []
        found += [
            f"{' | '.join(row)}: {len(row)} cells under a head of {len(head)}"
            for row in (dashes, *rows)
            if len(row) != len(head)
        ]
        found += [
            f"column {head[i]!r}: no value"
            for i in range(len(head))
            if rows and not any(row[i : i + 1] not in ([""], ["-"]) for row in rows)
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    stale, empty = [], [f"{name}: {fault}" for name in BLOCKS for fault in faults(made(name))]
    if empty:
        print("tables that say nothing:\n" + "\n".join(empty))
        return 1
    wrong = [f"{page}, {fault}" for page in PAGES for fault in inline_numbers.faults((ROOT / page).read_text())]
    if wrong:
        print("numbers in sentences that cannot be made:\n" + "\n".join(wrong))
        return 1
    for page in PAGES:
        text = filled(page)
        if text != (ROOT / page).read_text():
            stale.append(page)
            if not check:
                (ROOT / page).write_text(text)
    if catalogue.FILE.read_text() != catalogue.content():
        stale.append(catalogue.FILE.name)
        if not check:
            catalogue.FILE.write_text(catalogue.content())
    agreed = "all tables, numbers and lists agree with what they are made from"
    print(f"{'differ' if check else 'rewritten'}: {', '.join(stale)}" if stale else agreed)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
