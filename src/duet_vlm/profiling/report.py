"""The report of one prompt: what was planned beside what was measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from duet_vlm.planning.budget import SpanPlan, TowerStages
from duet_vlm.profiling.flops import Grid, Spare, prefill_flops, projector_flops, scoring_flops, tower_flops
from duet_vlm.profiling.kv import kv_bytes, rows_held
from duet_vlm.profiling.model_dims import DecoderDims, VisionDims
from duet_vlm.utils.field_types import to_plain

Part = TypeVar("Part")


@dataclass(frozen=True)
class SampleCounts:
    """One row of the batch: ``text`` rows, ``spans`` unreduced sizes and ``plans``, query rows, (visual, all) rows measured per layer.

    ``passes``: per span the tokens of each part (crop, frame) that the tower looks at by itself; what packing cuts off is among them.
    ``grids``: per span (rows, columns) of its tokens where it has them, parts below each other. ``projected``: per span the rows that the
    projector works on where V2V leaves them all to it (left out: all that the tower made). ``skipped``: tower layers whose output is not used
    were not run. ``nominal``: visual rows that enter, and at the input of each layer, where rows that predict come on top of the plans (left out:
    as the plans say). ``kept``: per span, tokens per layer as measured. ``planned_left``, ``left``: per span, of each part where patches leave
    the tower and how many tokens' are left then (``duet_vlm.planning.budget.Stages``), as planned and as measured (left out: none leave).
    ``projects_survivors_only``: the projector, which sees every token otherwise, sees only those. ``still``: which spans are pictures, whose parts are no
    steps of time. ``repeated``: per span, which parts did not go through the tower since they repeat the one before. ``sizes``: per span the tokens
    of each part as V2V sees them, where pooling and packing are done (left out: as the tower does). ``spare``: per span, of each part, patches
    that become no token (left out: there are none).
    """

    text: int
    spans: tuple[int, ...]
    tokens_per_crop: tuple[tuple[int, ...], ...]
    plans: tuple[SpanPlan, ...]
    queries: int
    measured: tuple[tuple[int, ...], tuple[int, ...]]
    grids: tuple[Grid, ...] = ()
    projected: tuple[int, ...] = ()
    skipped: bool = False
    nominal: tuple[int, ...] = ()
    kept: tuple[float, ...] = ()
    planned_left: tuple[tuple[TowerStages, ...], ...] = ()
    in_tower_counts: tuple[tuple[TowerStages, ...], ...] = ()
    projects_survivors_only: bool = False
    still: tuple[bool, ...] = ()
    repeated: tuple[tuple[bool, ...], ...] = ()
    sizes: tuple[tuple[int, ...], ...] = ()
    spare: tuple[tuple[Spare, ...], ...] = ()

    @property
    def encoded(self) -> tuple[tuple[int, ...], ...]:
        """Per span the tokens of each part that went through the tower."""
        return self.went(self.tokens_per_crop)

    def went(self, parts: Sequence[Sequence[Part]]) -> tuple[tuple[Part, ...], ...]:
        """What is said of the parts of each span, of those that went through the tower."""
        spans = zip(parts, self._repeated(), strict=True)
        return tuple(tuple(some for some, again in zip(span, repeated, strict=True) if not again) for span, repeated in spans)

    def _repeated(self) -> tuple[tuple[bool, ...], ...]:
        known = self.repeated or ((),) * len(self.tokens_per_crop)
        return tuple(some or (False,) * len(parts) for some, parts in zip(known, self.tokens_per_crop, strict=True))

    @property
    def steps(self) -> tuple[tuple[int, ...], ...]:
        """Per span the tokens of each step of time."""
        still = self.still or (False,) * len(self.tokens_per_crop)
        return tuple((sum(parts),) if alone else parts for parts, alone in zip(self.tokens_per_crop, still, strict=True))

    def visual(self, layer: int) -> int:
        """Visual rows that are meant to be left at the input of ``layer`` (-1: to enter)."""
        if self.nominal:
            return self.nominal[layer + 1]
        return sum(p.entry if layer < 0 else p.counts[layer] for p in self.plans)

    @property
    def to_project(self) -> tuple[int, ...]:
        return self.projected or tuple(map(sum, self.tokens_per_crop))

    def parts(self) -> list[tuple[int, Grid, TowerStages, Spare]]:
        """Tokens, grid and spare patches of everything that the tower looks at by itself, as if nothing left it."""
        grids, spare = self.grids or (None,) * len(self.tokens_per_crop), [some for span in self.wasted() for some in span]
        every = [(n, _part_of(grid, span)) for span, grid in zip(self.tokens_per_crop, grids, strict=True) for n in span]
        return [(*part, (), some) for part, some in zip(every, spare, strict=True)]

    def wasted(self) -> tuple[tuple[Spare, ...], ...]:
        """Per span the spare patches of each part."""
        return self.spare or tuple(((0, 0),) * len(span) for span in self.tokens_per_crop)

    def reaching_projector(self, measured: bool = False) -> list[int]:
        """Rows of each span that the projector of the reduced model works on where V2V leaves them all to it."""
        if not self.projects_survivors_only:
            shares = zip(self.to_project, self.encoded, self.tokens_per_crop, strict=True)
            return [rows * len(encoded) // max(1, len(parts)) if len(encoded) < len(parts) else rows for rows, encoded, parts in shares]
        spans = zip(self.tokens_per_crop, self._left(measured), strict=True)
        return [sum(stages[-1][1] if stages else n for n, stages in zip(*span, strict=True)) for span in spans]

    @property
    def entering_projector(self) -> list[int]:
        """The same where V2V works in front of the projector: what it leaves, and what was encoded of spans that it leaves whole."""
        spans = zip(self.plans, self.encoded, self.tokens_per_crop, strict=True)
        return [p.entry * len(encoded) // len(parts) if len(encoded) < len(parts) and not p.merges else p.entry for p, encoded, parts in spans]

    def in_tower(self, measured: bool = False, still: bool | None = None) -> list[tuple[int, Grid, TowerStages, Spare]]:
        """The same with where tokens leave the tower, without parts that repeat others; of pictures (``still``), of clips, or of both."""
        kinds = self.still or (True,) * len(self.tokens_per_crop)
        which = (still in (None, kind) for kind, span in zip(kinds, self.tokens_per_crop, strict=True) for _ in span)
        left, again = (s for span in self._left(measured) for s in span), (repeats for span in self._repeated() for repeats in span)
        every = zip(self.parts(), left, again, which, strict=True)
        return [(n, grid, stages, spare) for (n, grid, _, spare), stages, repeats, asked in every if asked and not repeats]

    def _left(self, measured: bool) -> tuple[tuple[TowerStages, ...], ...]:
        return (self.in_tower_counts if measured else self.planned_left) or tuple(((),) * len(span) for span in self.tokens_per_crop)


def _part_of(grid: Grid, passes: tuple[int, ...]) -> Grid:
    """The grid of one of several equal parts; None where they do not fill the span's."""
    if grid is None or len(set(passes)) != 1 or grid[0] % len(passes) or grid[0] * grid[1] != sum(passes):
        return None
    return grid[0] // len(passes), grid[1]


@dataclass(frozen=True)
class CostTotals:
    """Totals of the batch.

    FLOPs of vision tower and projector, of the decoder's prefill with the head, of ranking inside the decoder, and of selection before it
    (signals, choice, merge); bytes of the KV cache.
    """

    vision_flops: int
    decoder_flops: int
    ranking_flops: int
    kv_bytes: int | None
    selection_flops: int = 0

    @property
    def flops(self) -> int:
        return self.vision_flops + self.decoder_flops + self.ranking_flops + self.selection_flops


@dataclass(frozen=True)
class Report:
    """Predicted (from the plan) beside measured (from the rows that the layers really read, and the cache tensors).

    Attributes
    ----------
    nominal, measured : tuple of float
        Visual tokens per decoder layer, mean over the batch.
    images : tuple of tuple of float
        For each sample the visual tokens per decoder layer of each of its images (or clips), measured. Images of one prompt that are ranked
        together (``multi_image="joint"``) may differ from their own budget, their sum does not.
    full, predicted, observed : Costs
        The untouched model, the plan, and the run.
    clamped : tuple of int
        Numbers of the spans that were kept whole because they are no larger than the budget asks for.
    floored : tuple of int
        Numbers of the spans that were too small for their fractional budget and kept the method's floor instead (``small_image_tokens``).
    """

    method: str
    settings: dict[str, Any]
    budget: int | float | None
    batch: int
    tokens: int
    nominal: tuple[float, ...]
    measured: tuple[float, ...]
    images: tuple[tuple[float, ...], ...]
    full: CostTotals
    predicted: CostTotals
    observed: CostTotals
    clamped: tuple[int, ...]
    floored: tuple[int, ...]
    decoded: int

    @property
    def nominal_mean(self) -> float:
        """Planned visual tokens of the call, on average over the decoder layers."""
        return sum(self.nominal) / len(self.nominal)

    @property
    def measured_mean(self) -> float:
        """Visual tokens that the layers read, on average over the decoder layers."""
        return sum(self.measured) / len(self.measured)

    @property
    def flops_bound(self) -> float:
        """Prefill speed-up of the decoder if time followed FLOPs."""
        return self.full.decoder_flops / (self.observed.decoder_flops + self.observed.ranking_flops)

    def to_json(self) -> str:
        """All fields, the two means and ``flops_bound`` as one JSON object."""
        derived = {"nominal_mean": self.nominal_mean, "measured_mean": self.measured_mean, "flops_bound": self.flops_bound}
        return json.dumps(dataclasses.asdict(self) | derived)

    def __str__(self) -> str:
        per_sample = self.tokens / self.batch
        costs = (self.full, self.predicted, self.observed)
        budget = "own settings" if self.budget is None else f"budget {self.budget}"
        lines = [
            f"{self.method} ({budget}), batch of {self.batch}, {per_sample:.6g} visual tokens per sample unreduced",
            f"{'':24}{'full':>14}{'predicted':>14}{'measured':>14}{'of full':>9}",
            _line("mean visual tokens", "{:.2f}", [per_sample, self.nominal_mean, self.measured_mean]),
            _line("vision GFLOPs", "{:.3f}", [c.vision_flops / 1e9 for c in costs]),
            _line("decoder prefill GFLOPs", "{:.3f}", [c.decoder_flops / 1e9 for c in costs]),
            _line("selection GFLOPs", "{:.4f}", [c.selection_flops / 1e9 for c in costs]),
            _line("ranking GFLOPs", "{:.4f}", [c.ranking_flops / 1e9 for c in costs]),
            _line("KV cache KiB", "{:.0f}", [None if c.kv_bytes is None else c.kv_bytes / 1024 for c in costs]),
            f"FLOPs-bound speed-up of the decoder's prefill: {self.flops_bound:.2f}x",
            "visual tokens per layer, nominal:  " + run_lengths(self.nominal),
            "visual tokens per layer, measured: " + run_lengths(self.measured),
        ]
        if any(len(row) > 1 for row in self.images):
            each = "; ".join(", ".join(f"{count:.2f}" for count in row) or "-" for row in self.images)
            lines.append(f"mean visual tokens by image, measured: {each}")
        if self.clamped:
            lines.append(f"kept whole (no larger than the budget): images {', '.join(map(str, self.clamped))}")
        if self.floored:
            lines.append(f"kept the method's floor (too small for the budget): images {', '.join(map(str, self.floored))}")
        return "\n".join(lines)


def _line(name: str, style: str, values: Sequence[float | None]) -> str:
    full, _, measured = values
    cells = "".join(f"{'-' if value is None else style.format(value):>14}" for value in values)
    share = f"{measured / full:>9.1%}" if full and measured is not None else f"{'-':>9}"
    return f"{name:<24}{cells}{share}"


def run_lengths(counts: Sequence[float]) -> str:
    """84 x16, 42 x8, 0 x8."""
    parts: list[list[float]] = []
    for count in counts:
        if parts and parts[-1][0] == count:
            parts[-1][1] += 1
        else:
            parts.append([count, 1])
    return ", ".join(f"{count:g} x{int(times)}" for count, times in parts)


def make_report(
    *,
    method: str,
    settings: dict[str, Any],
    budget: int | float | None,
    samples: Sequence[SampleCounts],
    scored_layers: Sequence[int],
    reused_layers: Sequence[int] = (),
    decoder: DecoderDims,
    vision: VisionDims,
    element_bytes: int,
    cache_bytes: Sequence[int] | None,
    decoded: int,
    projects_all: bool = False,
    selection: int = 0,
    deciding: int = 0,
    products: bool = True,
    cut: bool = False,
    behind: bool = False,
) -> Report:
    """Sum the samples up. ``cache_bytes`` are the bytes of each layer's cache after prefill (None without a cache); ``reused_layers`` are
    scored layers that took over the keys they were ranked by.

    ``projects_all``: the family or the method reduces behind the projector, which then runs on every token and not only on those that enter.
    ``selection``: what signals, choice and merge before the decoder cost (``measure.choice.selection_flops``). ``deciding``: what
    the method inside the decoder costs beyond attention from text (``measure.choice.deciding_flops``), ``products``: it takes that. ``cut``:
    earlier layers forget what did not reach the last one. ``behind``: a layer ranks for later drops, the rows that its own has left.
    """
    depth, batch = decoder.layers, len(samples)
    images = [tokens for s in samples for tokens in s.spans]
    plans = [plan for s in samples for plan in s.plans]
    nominal = [tuple(s.text + s.visual(i) for i in range(depth)) for s in samples]
    whole = [(s.text + sum(s.spans),) * depth for s in samples]
    width = [max(rows[i] for rows in nominal) for i in range(depth)]  # the cache is as wide as the longest row
    everything = [rows for s in samples for rows in s.to_project]

    def reduced(measured: bool) -> tuple[int, list[int]]:
        """FLOPs of the tower, and the rows that reach the projector."""
        shapes = {s.skipped: vision.read() if s.skipped else vision for s in samples}
        runs = {skipped: [part for s in samples if s.skipped == skipped for part in s.in_tower(measured)] for skipped in shapes}
        tower = sum(tower_flops(shape, runs[skipped]) for skipped, shape in shapes.items())
        return tower, [n for s in samples for n in (s.reaching_projector(measured) if projects_all else s.entering_projector)]

    towers = tower_flops(vision, [part for s in samples for part in s.parts()])

    def costs(rows: Sequence[Sequence[int]], tower: int, projected: Sequence[int], ranked: bool, kv: int | None) -> CostTotals:
        entering = [(s.text + s.visual(-1), *r) for r, s in zip(rows, samples, strict=True)]  # rows before layer i's drop
        scored = [
            (before[i + behind], s.queries, before[i + 1] if i in reused_layers else 0, products, i)
            for before, s in zip(entering, samples, strict=True)
            for i in scored_layers
            if ranked
        ]
        ranking = sum(scoring_flops(decoder, *some) for some in scored) + deciding * ranked
        projector = sum(projector_flops(vision, n) for n in projected)
        return CostTotals(tower + projector, sum(prefill_flops(decoder, r) for r in rows), ranking, kv, selection * ranked)

    full_width = max(w[0] for w in whole)
    return Report(
        method=method,
        settings=settings,
        budget=to_plain(budget),
        batch=batch,
        tokens=sum(images),
        nominal=tuple(sum(s.visual(i) for s in samples) / batch for i in range(depth)),
        measured=tuple(sum(s.measured[0][i] for s in samples) / batch for i in range(depth)),
        images=tuple(s.kept for s in samples),
        full=costs(whole, towers, everything, False, batch * kv_bytes(decoder, (full_width,) * depth, element_bytes)),
        predicted=costs(nominal, *reduced(False), True, batch * kv_bytes(decoder, rows_held(decoder, width, cut), element_bytes)),
        observed=costs([s.measured[1] for s in samples], *reduced(True), True, None if cache_bytes is None else sum(cache_bytes)),
        clamped=tuple(i for i, p in enumerate(plans) if budget is not None and min(p.counts) == p.tokens),
        floored=tuple(i for i, p in enumerate(plans) if p.floored),
        decoded=decoded,
    )
