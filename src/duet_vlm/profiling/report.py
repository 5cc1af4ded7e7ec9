"""The report of one prompt: planned costs beside measured ones."""

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
    """Token counts of one row of the batch.

    Attributes
    ----------
    text : int
        Text tokens.
    spans : tuple of int
        Tokens of each unreduced span.
    tokens_per_crop : tuple of tuple of int
        Per span: tokens of each part (crop, frame) that the tower encodes independently, with those that packing cuts
        off.
    plans : tuple of SpanPlan
        The plan of each span.
    queries : int
        Query positions of a ranking.
    measured : (tuple of int, tuple of int)
        Visual tokens, and all tokens, measured per layer.
    grids : tuple of (int, int) or None
        Per span: (rows, columns) of its tokens where it has them, parts below each other.
    projected : tuple of int
        Per span: rows of the projector's input if the encoder stage drops nothing (empty: all that the tower made).
    skipped : bool
        Tower layers without use were not run.
    nominal : tuple of int
        Visual tokens that enter, and at the input of each layer, where protected tokens come on top of the plans
        (empty: as planned).
    kept : tuple of float
        Per span: tokens per layer as measured.
    planned_left, in_tower_counts : tuple of tuple of TowerStages
        Per span and part: the blocks of the tower after which patches are dropped, and the tokens kept then, as planned
        and as measured (empty: none are dropped).
    projects_survivors_only : bool
        The projector, whose input is every token otherwise, gets those only.
    still : tuple of bool
        Per span: True for images, whose parts are no time steps.
    repeated : tuple of tuple of bool
        Per span and part: True if it was not encoded since it repeats the one before.
    sizes : tuple of tuple of int
        Per span: tokens of each part in the encoder stage, after pooling and packing (empty: as in the tower).
    spare : tuple of tuple of Spare
        Per span and part: patches that become no token (empty: there are none).
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
        """Per span: tokens of each part that the tower encoded."""
        return self.encoded_parts(self.tokens_per_crop)

    def encoded_parts(self, parts: Sequence[Sequence[Part]]) -> tuple[tuple[Part, ...], ...]:
        """Select from values per part those of the parts that the tower encoded."""
        spans = zip(parts, self._repeated(), strict=True)
        return tuple(
            tuple(some for some, again in zip(span, repeated, strict=True) if not again) for span, repeated in spans
        )

    def _repeated(self) -> tuple[tuple[bool, ...], ...]:
        repeated = self.repeated or ((),) * len(self.tokens_per_crop)
        return tuple(
            flags or (False,) * len(parts) for flags, parts in zip(repeated, self.tokens_per_crop, strict=True)
        )

    @property
    def steps(self) -> tuple[tuple[int, ...], ...]:
        """Per span: tokens of each time step."""
        still = self.still or (False,) * len(self.tokens_per_crop)
        return tuple(
            (sum(parts),) if alone else parts for parts, alone in zip(self.tokens_per_crop, still, strict=True)
        )

    def num_visual(self, layer: int) -> int:
        """Planned visual tokens at the input of ``layer`` (-1: at the entry to the decoder)."""
        if self.nominal:
            return self.nominal[layer + 1]
        return sum(p.entry if layer < 0 else p.counts[layer] for p in self.plans)

    @property
    def to_project(self) -> tuple[int, ...]:
        return self.projected or tuple(map(sum, self.tokens_per_crop))

    def parts(self) -> list[tuple[int, Grid, TowerStages, Spare]]:
        """Tokens, grid and spare patches of everything that the tower encodes independently, as if nothing were dropped
        inside it."""
        grids, spare = (
            self.grids or (None,) * len(self.tokens_per_crop),
            [pair for span in self.spare_patches() for pair in span],
        )
        all_parts = [
            (n, _part_of(grid, span)) for span, grid in zip(self.tokens_per_crop, grids, strict=True) for n in span
        ]
        return [(*part, (), pair) for part, pair in zip(all_parts, spare, strict=True)]

    def spare_patches(self) -> tuple[tuple[Spare, ...], ...]:
        """Per span: the spare patches of each part."""
        return self.spare or tuple(((0, 0),) * len(span) for span in self.tokens_per_crop)

    def reaching_projector(self, measured: bool = False) -> list[int]:
        """Per span: rows at the projector's input in the reduced model if the encoder stage drops nothing before it."""
        if not self.projects_survivors_only:
            shares = zip(self.to_project, self.encoded, self.tokens_per_crop, strict=True)
            return [
                rows * len(encoded) // max(1, len(parts)) if len(encoded) < len(parts) else rows
                for rows, encoded, parts in shares
            ]
        spans = zip(self.tokens_per_crop, self._left(measured), strict=True)
        return [sum(stages[-1][1] if stages else n for n, stages in zip(*span, strict=True)) for span in spans]

    @property
    def entering_projector(self) -> list[int]:
        """Per span: rows at the projector's input if the encoder stage runs before it: the kept ones, or the encoded
        ones of unreduced spans."""
        spans = zip(self.plans, self.encoded, self.tokens_per_crop, strict=True)
        return [
            p.entry * len(encoded) // len(parts) if len(encoded) < len(parts) and not p.reduces_entry else p.entry
            for p, encoded, parts in spans
        ]

    def in_tower(self, measured: bool = False, still: bool | None = None) -> list[tuple[int, Grid, TowerStages, Spare]]:
        """As ``parts``, with the drops inside the tower and without repeated parts; of images (``still``), of videos,
        or of both."""
        kinds = self.still or (True,) * len(self.tokens_per_crop)
        which = (still in (None, kind) for kind, span in zip(kinds, self.tokens_per_crop, strict=True) for _ in span)
        left, repeated = (
            (s for span in self._left(measured) for s in span),
            (repeats for span in self._repeated() for repeats in span),
        )
        all_parts = zip(self.parts(), left, repeated, which, strict=True)
        return [
            (n, grid, stages, spare)
            for (n, grid, _, spare), stages, repeats, selected in all_parts
            if selected and not repeats
        ]

    def _left(self, measured: bool) -> tuple[tuple[TowerStages, ...], ...]:
        return (self.in_tower_counts if measured else self.planned_left) or tuple(
            ((),) * len(span) for span in self.tokens_per_crop
        )


def _part_of(grid: Grid, passes: tuple[int, ...]) -> Grid:
    """The grid of one of several equal parts; None where they do not fill the span's."""
    if grid is None or len(set(passes)) != 1 or grid[0] % len(passes) or grid[0] * grid[1] != sum(passes):
        return None
    return grid[0] // len(passes), grid[1]


@dataclass(frozen=True)
class CostTotals:
    """Totals of the batch.

    Attributes
    ----------
    vision_flops : int
        FLOPs of vision tower and projector.
    decoder_flops : int
        FLOPs of the decoder's prefill with the head.
    ranking_flops : int
        FLOPs of ranking inside the decoder.
    kv_bytes : int or None
        Bytes of the KV cache.
    selection_flops : int
        FLOPs of the selection before the decoder (signals, choice, merge).
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
    """Predicted costs (from the plan) beside measured ones (from the tokens at the layers' inputs, and the cache
    tensors).

    Attributes
    ----------
    method, settings, budget : str, dict, int or float or None
        The method, its settings, and the budget (None: the method's own settings).
    batch, tokens : int
        Samples of the batch, and their visual tokens unreduced.
    nominal, measured : tuple of float
        Visual tokens per decoder layer, mean over the batch.
    images : tuple of tuple of float
        For each sample the visual tokens per decoder layer of each of its images (or videos), measured. Images of one
        prompt that are ranked together (``multi_image="joint"``) may differ from their own budget, their sum does not.
    full, predicted, observed : CostTotals
        The untouched model, the plan, and the run.
    clamped : tuple of int
        Numbers of the spans that were kept whole because they are no larger than the budget.
    floored : tuple of int
        Numbers of the spans that were too small for their fractional budget and kept the method's floor instead
        (``small_image_tokens``).
    decoded : int
        Tokens decoded after the prompt.
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
        """Planned visual tokens of the call, mean over the decoder layers."""
        return sum(self.nominal) / len(self.nominal)

    @property
    def measured_mean(self) -> float:
        """Visual tokens at the layers' inputs, mean over the decoder layers."""
        return sum(self.measured) / len(self.measured)

    @property
    def flops_bound(self) -> float:
        """Prefill speed-up of the decoder if time followed FLOPs."""
        return self.full.decoder_flops / (self.observed.decoder_flops + self.observed.ranking_flops)

    def to_json(self) -> str:
        """All fields, the two means and ``flops_bound`` as one JSON object."""
        derived = {
            "nominal_mean": self.nominal_mean,
            "measured_mean": self.measured_mean,
            "flops_bound": self.flops_bound,
        }
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
            by_image = "; ".join(", ".join(f"{count:.2f}" for count in row) or "-" for row in self.images)
            lines.append(f"mean visual tokens by image, measured: {by_image}")
        if self.clamped:
            lines.append(f"kept whole (no larger than the budget): images {', '.join(map(str, self.clamped))}")
        if self.floored:
            lines.append(
                f"kept the method's floor (too small for the budget): images {', '.join(map(str, self.floored))}"
            )
        return "\n".join(lines)


def _line(name: str, style: str, values: Sequence[float | None]) -> str:
    full, _, measured = values
    cells = "".join(f"{'-' if value is None else style.format(value):>14}" for value in values)
    share = f"{measured / full:>9.1%}" if full and measured is not None else f"{'-':>9}"
    return f"{name:<24}{cells}{share}"


def run_lengths(counts: Sequence[float]) -> str:
    """Format counts as run lengths: 84 x16, 42 x8, 0 x8."""
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
    scores_after_drop: bool = False,
    ranks_all: bool = False,
) -> Report:
    """Sum the samples up.

    Parameters
    ----------
    scored_layers : sequence of int
        Layers that rank.
    reused_layers : sequence of int
        Scored layers that reuse the keys of their ranking.
    cache_bytes : sequence of int or None
        Bytes of each layer's cache after prefill (None without a cache).
    projects_all : bool
        The encoder stage runs after the projector, which then gets every token and not only those that enter the
        decoder.
    selection : int
        Cost of signals, choice and merge before the decoder (``profiling.selection_cost.selection_flops``).
    deciding : int
        Cost of the method inside the decoder beyond attention from text (``profiling.selection_cost.deciding_flops``).
    products : bool
        The method uses attention from text.
    cut : bool
        Caches of earlier layers are trimmed to the tokens that reached the last one.
    scores_after_drop : bool
        A layer ranks for later drops, after its own drop.
    ranks_all : bool
        Every ranking is among all tokens that entered (re-entry).
    """
    depth, batch = decoder.layers, len(samples)
    images = [tokens for s in samples for tokens in s.spans]
    plans = [plan for s in samples for plan in s.plans]
    nominal = [tuple(s.text + s.num_visual(i) for i in range(depth)) for s in samples]
    full_rows = [(s.text + sum(s.spans),) * depth for s in samples]
    width = [max(rows[i] for rows in nominal) for i in range(depth)]  # the cache is as wide as the longest row
    all_projected = [rows for s in samples for rows in s.to_project]

    def reduced(measured: bool) -> tuple[int, list[int]]:
        """FLOPs of the tower, and the rows that reach the projector."""
        shapes = {s.skipped: vision.read() if s.skipped else vision for s in samples}
        runs = {
            skipped: [part for s in samples if s.skipped == skipped for part in s.in_tower(measured)]
            for skipped in shapes
        }
        tower = sum(tower_flops(shape, runs[skipped]) for skipped, shape in shapes.items())
        return tower, [
            n for s in samples for n in (s.reaching_projector(measured) if projects_all else s.entering_projector)
        ]

    towers = tower_flops(vision, [part for s in samples for part in s.parts()])

    def costs(
        rows: Sequence[Sequence[int]], tower: int, projected: Sequence[int], ranked: bool, kv: int | None
    ) -> CostTotals:
        # rows before layer i's drop
        entering = [(s.text + s.num_visual(-1), *r) for r, s in zip(rows, samples, strict=True)]
        scored = [
            (
                before[0 if ranks_all else i + scores_after_drop],
                s.queries,
                before[i + 1] if i in reused_layers else 0,
                products,
                i,
            )
            for before, s in zip(entering, samples, strict=True)
            for i in scored_layers
            if ranked
        ]
        ranking = sum(scoring_flops(decoder, *some) for some in scored) + deciding * ranked
        projector = sum(projector_flops(vision, n) for n in projected)
        return CostTotals(
            tower + projector, sum(prefill_flops(decoder, r) for r in rows), ranking, kv, selection * ranked
        )

    full_width = max(w[0] for w in full_rows)
    return Report(
        method=method,
        settings=settings,
        budget=to_plain(budget),
        batch=batch,
        tokens=sum(images),
        nominal=tuple(sum(s.num_visual(i) for s in samples) / batch for i in range(depth)),
        measured=tuple(sum(s.measured[0][i] for s in samples) / batch for i in range(depth)),
        images=tuple(s.kept for s in samples),
        full=costs(
            full_rows, towers, all_projected, False, batch * kv_bytes(decoder, (full_width,) * depth, element_bytes)
        ),
        predicted=costs(
            nominal, *reduced(False), True, batch * kv_bytes(decoder, rows_held(decoder, width, cut), element_bytes)
        ),
        observed=costs(
            [s.measured[1] for s in samples], *reduced(True), True, None if cache_bytes is None else sum(cache_bytes)
        ),
        clamped=tuple(i for i, p in enumerate(plans) if budget is not None and min(p.counts) == p.tokens),
        floored=tuple(i for i, p in enumerate(plans) if p.floored),
        decoded=decoded,
    )
