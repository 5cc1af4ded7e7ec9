"""Tables of docs/video.md and lab/NOTEBOOK.md, from the result files under lab/comparison/tiny-video and tiny-long."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import comparison_tables
from folders import COMPARISON, STUDIES

from duet_vlm.evaluation.report import columns
from duet_vlm.evaluation.report.markdown import table
from duet_vlm.evaluation.results import load, unpack
from duet_vlm_lab.generators import long_questions
from duet_vlm_lab.generators.clips_questions import CHANCE, KINDS, ORDERLESS
from duet_vlm_lab.generators.long_clips import LENGTHS
from duet_vlm_lab.tasks import TURN

STREAM = STUDIES / "stream.json"
PIECES = STREAM.with_name("pieces.json")
RESULTS = COMPARISON / "tiny-video" / "results"


def kept(name: str) -> str:
    """Every row of a result: measured tokens, accuracy, what it is of the full model's, difference to the reference."""
    result = load(RESULTS / f"{name}.json")
    reference = result["experiment"]["against"]
    head = [
        "",
        "tokens per clip",
        "fewer tokens",
        "accuracy (95 % interval)",
        "% of the full model's",
        f"points against `{reference}`",
    ]
    places = columns.places(result)
    lines = [
        _line(row)
        for row in sorted(result["runs"], key=lambda row: (-(row["beside"] or 1), places.get(row["label"], -1)))
    ]
    asked = result["questions"]
    seeds = ", ".join(map(str, result["experiment"]["seeds"]))
    note = f"{asked['count']:,} questions of task {result['task']} on test clips, {asked['per_seed']} for each of the seeds {seeds}, by the code of"
    note += f" commit {result['environment']['commit']};"
    return f"{table(head, lines)}\n\n{note} ▲ and ▼ differ from `{reference}` at that budget (adjusted p < .05; hollow where Holm's rule does not agree), = is level with it within 2 points."


def _line(row: dict[str, Any]) -> list[str]:
    if row["status"] != "ok":
        return [f"{row['label']} {row['beside']:.0%}", columns.refusal(row), *["-"] * 4]
    tokens = row["tokens"]
    less = 1 - tokens["measured"] / tokens["unreduced"]
    low, high = row["interval"]
    accuracy = f"{row['accuracy']:.3f} ({low:.3f}-{high:.3f})"
    more = comparison_tables._more(row).removeprefix(", ") or "-"
    return [
        row["label"],
        columns.tokens(tokens["measured"]),
        f"{-less:.0%}" if less else "0%",
        accuracy,
        columns.percent(row["kept"]),
        more,
    ]


def kinds() -> str:
    """Accuracy by kind of the full model and of every method at the small budget, under what chance gives."""
    head = ["accuracy", *KINDS]
    floors = {"guessing": CHANCE, "without the order of frames": ORDERLESS}
    lines = [[name, *(f"{chance[kind]:.3f}" for kind in KINDS)] for name, chance in floors.items()]
    for row in comparison_tables.done("tiny-video", "methods"):
        if row["beside"] in (None, 0.07):
            lines.append([row["label"], *(f"{row['kinds'][kind]['accuracy']:.3f}" for kind in KINDS)])
    return table(head, lines)


def long_full() -> str:
    """Accuracy of the full model on long clips, by kind and number of frames."""
    recorded = unpack(load(COMPARISON / "tiny-long" / "results" / "methods.json"))
    hits: dict[tuple[str, int], list[bool]] = {}
    for asked, kind, gold, said in zip(
        *(recorded[key] for key in ("questions", "kinds", "gold")), recorded["answers"]["none"], strict=True
    ):
        frames = LENGTHS[int(asked.split("/")[1]) // TURN % len(LENGTHS)]
        for key in ((kind, frames), (kind, 0), ("all", frames), ("all", 0)):
            hits.setdefault(key, []).append(said in gold)
    chance = {**long_questions.CHANCE, "all": sum(long_questions.CHANCE.values()) / len(long_questions.CHANCE)}

    def cell(kind: str, frames: int) -> str:
        return f"{sum(hits[kind, frames]) / len(hits[kind, frames]):.3f}"

    lines = [[kind, f"{chance[kind]:.3f}", *(cell(kind, frames) for frames in (*LENGTHS, 0))] for kind in chance]
    return table(["accuracy", "guessing", *(f"{frames} frames" for frames in LENGTHS), "all"], lines)


def stream() -> str:
    """Memory of a question about a clip, in pieces and in one."""
    found = {(row["frames"], row["way"]): row for row in json.loads(STREAM.read_text())["results"]}
    lines = []
    for frames in sorted({frames for frames, _ in found}):
        held = [
            f"{found[frames, way]['peak_mib']:.0f} MiB" if (frames, way) in found else "-"
            for way in ("pieces", "whole")
        ]
        lines.append([f"{frames:,}", f"{found[frames, 'pieces']['tokens']:,}", *held])
    return table(["frames", "visual tokens", "in pieces of 16", "in one piece"], lines)


def pieces() -> str:
    """The most MiB that clips take whose frames go through the tower some at a time, and all at once."""
    found = {
        (r["model"], r["method"], r["frames"], r["chunk_frames"]): r for r in json.loads(PIECES.read_text())["results"]
    }
    lines = []
    for model, method in dict.fromkeys(key[:2] for key in found):
        for frames in dict.fromkeys(key[2] for key in found):
            sides = [found[model, method, frames, chunk] for chunk in (None, 8)]
            most = [f"{side[stage] / 2**20:.0f}" for stage in ("encoding", "first logits") for side in sides]
            lines.append([model, method, str(frames), *most, f"{sides[0]['rows'] / 2**20:.1f}"])
    stages = [f"{stage}, {way}" for stage in ("encoded", "first logits") for way in ("whole", "in pieces")]
    return table(["model", "method", "frames", *stages, "rows of the clip"], lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "video_kept": lambda: kept("methods"),
    "video_more": lambda: kept("more"),
    "video_kinds": kinds,
    "long_full": long_full,
    "long_kinds": lambda: comparison_tables.kinds("tiny-long", "methods", 0.07),
    "video_stream": stream,
    "video_pieces": pieces,
    "video_recall": lambda: comparison_tables.recall("tiny-video", "methods", 0.07),
}
