"""Other rules for what goes through the tower, tried beside those that ship: ``python lab/studies/tower_tries.py``,
results/tower_tries.json.

In front of ``duet_plus`` at 11 %, against it behind the whole tower, on questions that no other table uses. What a try
computes beside the tower (keys and values of pooled rows, rows that go through the blocks unread, a scorer) is paid
with patches, so that all of a level cost the same. What did not help is kept here and nowhere else. How many rows for
what leaves, asked of more questions, results/tower_rows.json: ``--limit 2000 --seed 531 --only "^(contrast|motion)(,
context of .*)?$" --out lab/studies/results/tower_rows.json``.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import benchmark_path  # noqa: F401
import numpy as np
import torch
from common import environment
from torch import Tensor, nn
from tower_context import Context, context_flops
from tower_scorers import AskedScorer, Scorer, asked_scorer, embedding_of, scorer, scorer_flops

from duet_vlm import TowerReducer, TowerView, register
from duet_vlm.api.loading import LoadedModel, load
from duet_vlm.evaluation import statistics
from duet_vlm.evaluation.experiment import ExperimentCell
from duet_vlm.evaluation.run_sample import answer
from duet_vlm.evaluation.tasks import right, task
from duet_vlm.models.lookup import adapter_for
from duet_vlm.ops.select import top
from duet_vlm.profiling.flops import vision_flops
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions

BUDGET, WHOLE, METHOD, BATCH = 0.11, "whole tower", "duet_plus", 40
TASKS = {"tiny": "tiny", "tiny-crowded": "tiny", "tiny-video": "tiny-video"}
FRAMES = 8  # of a clip, each with a CLS row among its tokens


class Here:
    """The running batch, for rules that look at more than a method may."""

    context: Context
    embed: nn.Module
    texts: Sequence[str] = ()


@register("tower_try")
@dataclass(frozen=True)
class Try(TowerReducer):
    """The score of ``base``, plus ``weight`` times another one, each over its spread in the picture; what leaves may be
    frozen by cells of ``frozen`` x ``frozen`` patches."""

    paper = "-"
    summary = "a rule that is tried"
    requires = frozenset({Input.PATCH_CONTRAST, Input.PIXELS, Input.KEY_NORM})

    base: str = "contrast"
    rule: str = ""
    weight: float = 0.5
    frozen: int = 0

    def boundaries(self, depth: int) -> Sequence[int]:
        return (0, 2) if self.rule == "second" else (0,)

    def keep_patches(self, view: TowerView) -> Tensor:
        if view.after:
            assert view.key_norm is not None
            return top(-view.key_norm, view.valid, view.num_keep)
        score = BASES[self.base](view)
        if self.rule in RULES:
            score = even(score) + self.weight * even(RULES[self.rule](view))
        stays = top(score, view.valid, view.num_keep)
        if self.frozen:
            Here.context.freeze(view.valid & ~stays, view.grids[0], self.frozen)
        return stays


def even(score: Tensor) -> Tensor:
    return (score - score.mean(1, keepdim=True)) / score.std(1, keepdim=True).clamp(min=1e-6)


# ---- scores


def contrast(view: TowerView) -> Tensor:
    assert view.contrast is not None
    return view.contrast


def motion(view: TowerView) -> Tensor:
    """As ``motion`` ranks the patches of clips: their distance from the median over time, and a little contrast."""
    assert view.pixels is not None
    starts = [number for number, before in enumerate(view.previous_picture) if before < 0]
    clips = zip(starts, [*starts[1:], len(view.previous_picture)], strict=True)
    change = [
        (clip - clip.median(0).values).abs().mean(-1)
        for clip in (view.pixels[first:end, :, 0].float() for first, end in clips)
    ]
    still = contrast(view) / contrast(view).amax(1, keepdim=True)
    return 0.05 * still + torch.cat([one / one.amax() for one in change])


def colours(view: TowerView) -> Tensor:
    """[P, U, 3, side, side]."""
    assert view.pixels is not None
    pixels = view.pixels[:, :, 0].float().unflatten(-1, (3, -1))
    side = round(pixels.shape[-1] ** 0.5)
    return pixels.unflatten(-1, (side, side))


def chroma(view: TowerView) -> Tensor:
    pixels = colours(view)
    return (pixels.amax(2) - pixels.amin(2)).mean((-1, -2))


def edges(view: TowerView) -> Tensor:
    pixels = colours(view)
    return (pixels.diff(dim=-1).square().mean((-1, -2, -3)) + pixels.diff(dim=-2).square().mean((-1, -2, -3))).sqrt()


def around(view: TowerView) -> Tensor:
    """Contrast of the neighbourhood: mean over 3 x 3 patches."""
    grid = nn.functional.pad(contrast(view).unflatten(1, view.grids[0])[:, None], (1, 1, 1, 1), mode="replicate")
    return nn.functional.avg_pool2d(grid, 3, 1)[:, 0].flatten(1)


def change(view: TowerView) -> Tensor:
    """From the frame before."""
    assert view.pixels is not None
    score, pixels = torch.zeros_like(contrast(view)), view.pixels[:, :, 0].float()
    for frame, before in enumerate(view.previous_picture):
        if before >= 0:
            score[frame] = (pixels[frame] - pixels[before]).abs().mean(-1)
    return score


def learned(view: TowerView) -> Tensor:
    return scorer(Here.embed)(embedding_of(colours(view), Here.embed, view.grids[0])).flatten(1)


def asked(view: TowerView) -> Tensor:
    """Patches that the questions of the batch need."""
    frames = len(view.grids) // len(Here.texts)
    texts = [text for text in Here.texts for _ in range(frames)]
    return asked_scorer(Here.embed, frames > 1)(embedding_of(colours(view), Here.embed, view.grids[0]), texts).flatten(
        1
    )


BASES = {"contrast": contrast, "motion": motion}
RULES = {"chroma": chroma, "edges": edges, "around": around, "change": change, "learned": learned, "asked": asked}
NETS = {"learned": Scorer, "asked": AskedScorer}


# ---- what is tried


@dataclass(frozen=True)
class Cell:
    """A tower method with its settings, and what its table calls it; ``both``: measured at either level, not at the
    lower one only."""

    label: str
    method: str = "tower_try"
    settings: dict[str, Any] = field(default_factory=dict)
    both: bool = False


def tries(task_name: str) -> list[Cell]:
    """Measurements on a task."""

    def tried(label: str, both: bool = False, **settings: Any) -> Cell:
        return Cell(label, settings=settings, both=both)

    if task_name == "tiny-video":
        moving = {"base": "motion", "options": {"proportional_attention": False}}
        return [
            Cell("motion", "motion", both=True),
            Cell("contrast", "contrast", both=True),
            Cell("contrast, no mass", "contrast", {"options": {"proportional_attention": False}}),
            Cell("contrast, ground 8%", "contrast", {"ground": 0.08}),
            Cell("change", "rlt"),
            tried("contrast + change, no mass", rule="change", options=TokenOptions(proportional_attention=False)),
            Cell("motion, mass", "motion", {"options": {"proportional_attention": True}}),
            tried("motion, frozen context, cells of 2 x 2", **moving, frozen=2, both=True),
            tried("motion, frozen context, cells of 4 x 4", **moving, frozen=4),
            *(
                Cell(f"motion, context of {rows}", "motion", {"options": {"pooled_context_tokens": rows}}, both=True)
                for rows in (1, 2, 4, 6, 8)
            ),
            Cell("contrast, context of 4", "contrast", {"options": {"pooled_context_tokens": 4}}),
            tried("motion + question", **moving, rule="asked", weight=1.0, both=True),
            tried("motion + question, context of 4", **moving, rule="asked", weight=1.0, context=4, both=True),
        ]
    return [
        Cell("contrast", "contrast", both=True),
        Cell("contrast, no mass", "contrast", {"options": {"proportional_attention": False}}, both=True),
        *(Cell(f"contrast, ground {share:.0%}", "contrast", {"ground": share}) for share in (0.04, 0.08, 0.16)),
        tried("contrast + chroma", rule="chroma"),
        tried("contrast + edges", rule="edges"),
        tried("contrast + neighbourhood", rule="around"),
        tried("learned scorer", rule="learned", weight=10.0),
        Cell("contrast, then short keys after 2 blocks", settings={"rule": "second"}),
        tried(
            "contrast, frozen context, cells of 2 x 2",
            frozen=2,
            options=TokenOptions(proportional_attention=False),
            both=True,
        ),
        tried("contrast, frozen context, cells of 2 x 2, ranked by mass", frozen=2),
        tried("contrast, frozen context, cells of 4 x 4", frozen=4, options=TokenOptions(proportional_attention=False)),
        *(
            Cell(f"contrast, context of {rows}", "contrast", {"options": {"pooled_context_tokens": rows}}, both=True)
            for rows in (1, 2, 4, 6, 8, 12, 16)
        ),
        tried("contrast + question", rule="asked", weight=1.0, both=True),
        tried("contrast + question, context of 4", rule="asked", weight=1.0, context=4, both=True),
    ]


# patches of a picture or frame, where nothing is computed beside
LEVELS = {"tiny": (128, 107), "tiny-crowded": (128, 107), "tiny-video": (28, 23)}


def cost(cell: Cell, patches: int, loaded: LoadedModel, tokens: int) -> float:
    """FLOPs of a tower that leaves so many of a picture's ``tokens``, over those of the whole one."""
    shape, settings = adapter_for(loaded.model).vision_dims().read(), cell.settings
    rule = Try(rule=settings.get("rule", ""))
    left = rule.stage_counts(tokens, patches + settings.get("pooled_context_tokens", 0), shape.layers)
    total = vision_flops(shape, tokens, None, tuple(zip(rule.boundaries(shape.layers), left, strict=True)))
    if frozen := settings.get("frozen"):
        total += context_flops(shape, patches, tokens // frozen**2)
    net = NETS.get(settings.get("rule", ""))
    return (total + (scorer_flops(net(), tokens) if net else 0)) / vision_flops(shape, tokens)


@functools.cache
def prepared(model: str) -> tuple[LoadedModel, Any, Context]:
    """A model, its tower, and what can add context to it."""
    loaded = load(model)
    tower = loaded.model.model.video_tower if model == "tiny-video" else loaded.model.model.vision_tower
    return loaded, tower, Context(tower)


class Parts:
    """Right answers of finished batches, kept in a file until all are there: the same command, or one with other tries,
    goes on from it."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.found = {
            (one["task"], one["batch"], key): hits
            for one in lines
            if one["facts"] == facts
            for key, hits in one["right"].items()
        }

    def add(self, task_name: str, batch: int, hits: dict[str, list[bool]]) -> None:
        self.found |= {(task_name, batch, key): right_ones for key, right_ones in hits.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"task": task_name, "batch": batch, "facts": self.facts, "right": hits}) + "\n")


def measured(name: str, limit: int, seed: int, only: str, parts: Parts) -> list[dict[str, Any]]:
    """Rows of one task; the first of a level is what the others are compared with, too."""
    loaded, tower, Here.context = prepared(TASKS[name])
    asked_of, clips, tokens = task(name), name == "tiny-video", tower.embeddings.num_patches
    Here.embed = tower.embeddings.patch_embedding
    runs, rows = {WHOLE: ExperimentCell(METHOD, BUDGET, label=WHOLE)}, {}
    for level in LEVELS[name]:
        for cell in tries(name):
            if not re.search(only, cell.label) or not (cell.both or level == LEVELS[name][-1]):
                continue
            most = cost(Cell("contrast"), level, loaded, tokens)
            patches = max(n for n in range(1, level + 1) if cost(cell, n, loaded, tokens) <= most)
            settings = {"keep": FRAMES * (patches + 1) if clips else patches, **cell.settings}
            run = ExperimentCell(
                f"{cell.method}+{METHOD}",
                BUDGET,
                {f"{cell.method}_{key}": value for key, value in settings.items()},
                cell.label,
            )
            runs[run.id] = run
            rows[run.id] = {
                "task": name,
                "tower": cell.label,
                "level": level,
                "patches": patches,
                "flops": cost(cell, patches, loaded, tokens),
            }
    hits: dict[str, list[bool]] = {}
    for first in range(0, limit, BATCH):
        questions = [asked_of.ask(seed, index) for index in range(first, min(first + BATCH, limit))]
        Here.texts = [q.text for q in questions]
        lacking = [run for run in runs.values() if (name, first, run.id) not in parts.found]
        said = answer(loaded, lacking, questions, asked_of.max_new_tokens) if lacking else {}
        parts.add(
            name,
            first,
            {key: [right(q, a) for q, a in zip(questions, o.answers, strict=True)] for key, o in said.items()},
        )
        for run in runs.values():
            hits.setdefault(run.id, []).extend(parts.found[name, first, run.id])
    whole, usual = np.array(hits[runs[WHOLE].id]), {}
    for key, row in rows.items():
        own = np.array(hits[key])
        beside = usual.setdefault(row["level"], own)
        row |= {
            "accuracy": float(own.mean()),
            "full": float(whole.mean()),
            "difference": float(own.mean() - whole.mean()),
        }
        row["interval"] = statistics.difference_interval(own, whole)
        row |= {"gain": float(own.mean() - beside.mean()), "gain_interval": statistics.difference_interval(own, beside)}
    return list(rows.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--seed", type=int, default=521, help="stream of questions; one that nothing was chosen on")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--only", default="", help="regular expression: only tries with such names")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tower_tries.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = {"benchmark": "tower_tries", "questions": args.limit, "seed": args.seed, "environment": environment()}
    parts, rows = Parts(args.out.with_suffix(".parts.jsonl"), out), []
    for name in args.tasks:
        rows += measured(name, args.limit, args.seed, args.only, parts)
        for row in rows:
            if row["task"] == name:
                print(*row.values(), flush=True)
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    if out == {key: value for key, value in before.items() if key != "results"}:  # other tasks of the same measurement
        rows += [row for row in before["results"] if row["task"] not in args.tasks]
    rows.sort(key=lambda row: list(TASKS).index(row["task"]))
    args.out.write_text(json.dumps(out | {"results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
