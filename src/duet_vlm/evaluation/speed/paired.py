"""One benchmark: sides (the full model, methods, baselines) in turns on the same prompts, with all their facts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import duet_vlm
from duet_vlm.api.handle import Handle
from duet_vlm.evaluation.results import environment
from duet_vlm.evaluation.speed.prompts import BenchPrompt, encode, prompt_for
from duet_vlm.evaluation.speed.timers import StageTimers
from duet_vlm.models.adapter import Adapter
from duet_vlm.models.lookup import adapter_for
from duet_vlm.profiling.flop_counter import cache_bytes, memory_of
from duet_vlm.profiling.timing import PairedTiming, ratio, time_paired


@dataclass(frozen=True)
class BenchSide:
    """The untouched model, or a method at a budget; ``settings`` as pairs of name and value."""

    method: str | None = None
    budget: int | float | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        if self.method is None:
            return "full"
        name = self.method + (
            f"[{', '.join(f'{key}={value}' for key, value in self.settings)}]" if self.settings else ""
        )
        return (
            name
            if self.budget is None
            else f"{name} at {self.budget:.0%}"
            if isinstance(self.budget, float)
            else f"{name} at {self.budget}"
        )


@dataclass(frozen=True)
class BenchPlan:
    """The measurements of a benchmark: every side on every (batch, text).

    Attributes
    ----------
    sides : tuple of BenchSide
        The full model and the methods.
    batches, texts : tuple of int
        Batch sizes, and text tokens of a prompt.
    tokens, frames : int or None, int
        As ``prompt_for`` takes them.
    new : int
        Tokens that generate() writes.
    rounds, warmup : int
        Measured rounds, and rounds before them.
    memory : bool
        Measure the peak of memory, too.
    steps : int or None
        Steps of decoding that are timed one by one (None: all ``new`` but the first).
    generate_rounds : int or None
        Rounds of generate() (None: as many as ``rounds``; 0: none).
    chunk_frames, still_frames
        As ``attach`` takes them, for all but the full model.
    """

    sides: tuple[BenchSide, ...]
    batches: tuple[int, ...] = (1,)
    texts: tuple[int, ...] = (32,)
    tokens: int | None = None
    frames: int = 0
    new: int = 8
    rounds: int = 7
    warmup: int = 2
    memory: bool = True
    steps: int | None = None
    generate_rounds: int | None = None
    chunk_frames: int | None = None
    still_frames: float | None = None


def sides_of(methods: Sequence[str], budgets: Sequence[int | float]) -> tuple[BenchSide, ...]:
    return (BenchSide(), *(BenchSide(method, budget) for method in methods for budget in budgets))


def result(
    name: str,
    model: nn.Module,
    plan: BenchPlan,
    say: Callable[[str], object],
    picture: Any = None,
) -> dict[str, Any]:
    """A result file: the measurements, the model, the machine and the versions."""
    weight = next(model.parameters())
    dtype = str(weight.dtype).removeprefix("torch.")
    return {
        "benchmark": "bench", "model": name, "weights": sum(p.numel() for p in model.parameters()),
        "environment": environment(str(weight.device), dtype, 1) | {"attention": model.config._attn_implementation},
        "plan": dataclasses.asdict(plan) | {"sides": [str(side) for side in plan.sides]},
        "rows": run(model, plan, picture, say),
    }  # fmt: skip


def run(
    model: nn.Module,
    plan: BenchPlan,
    picture: Any = None,
    say: Callable[[str], object] = print,
) -> list[dict[str, Any]]:
    """Measure; one row per side, batch and text length."""
    adapter = adapter_for(model)
    rows: list[dict[str, Any]] = []
    prompts = [(batch, text) for batch in plan.batches for text in plan.texts]
    for number, (batch, text) in enumerate(prompts, 1):
        prompt = prompt_for(adapter, batch, text, plan.tokens, plan.frames, picture)
        say(f"measuring prompt {number} of {len(prompts)}: {len(plan.sides)} sides in turns, {plan.rounds} rounds")
        rows += _compare(adapter, plan, prompt)
    return rows


def _compare(adapter: Adapter, plan: BenchPlan, prompt: BenchPrompt) -> list[dict[str, Any]]:
    sides, infeasible = _feasible(adapter, plan.sides, prompt)
    passes = {side: BenchPass(adapter, side, prompt, plan) for side in sides}
    with torch.inference_mode():
        facts = {side: each.facts() for side, each in passes.items()}
        time_paired(
            {str(side): each for side, each in passes.items()},
            plan.rounds,
            plan.warmup,
            {str(s): p.around for s, p in passes.items()},
        )
        ends = _end_to_end(passes, plan)
    full = passes[sides[0]].timings(plan.rounds) | ends.get("full", {})
    rows = []
    for side, each in passes.items():
        times = each.timings(plan.rounds) | ends.get(str(side), {})
        row: dict[str, Any] = {"side": str(side), "method": side.method, "budget": side.budget}
        row |= {"settings": dict(side.settings), "batch": prompt.batch, "tokens": prompt.tokens}
        row |= {"text": prompt.rows - prompt.tokens, "new": plan.new, "pairs": plan.rounds}
        row["ms"] = {name: _spread(times[name]) for name in times if not name.startswith(("layer ", "hook "))}
        row["speed_up"] = {
            name: dataclasses.asdict(ratio(full[name], times[name]))
            for name in row["ms"]
            if min(times[name].seconds) > 0
        }
        rows.append(row | facts[side] | _by_layer(times, facts[side]["rows"]))
    return rows + infeasible


def _end_to_end(passes: dict[BenchSide, BenchPass], plan: BenchPlan) -> dict[str, dict[str, PairedTiming]]:
    """The stock generate() of every side."""
    rounds = plan.rounds if plan.generate_rounds is None else plan.generate_rounds
    if rounds == 0:
        return {}
    works = {str(side): each.generate for side, each in passes.items()}
    times = time_paired(
        works,
        rounds,
        0 if rounds == 1 else min(1, plan.warmup),
        {str(side): each.held for side, each in passes.items()},
    )
    return {side: {"end to end": timing} for side, timing in times.items()}


def _feasible(
    adapter: Adapter, sides: Sequence[BenchSide], prompt: BenchPrompt
) -> tuple[list[BenchSide], list[dict[str, Any]]]:
    """The sides that can be attached; a side below a method's floor becomes a row with the floor."""
    feasible, rows = [], []
    for side in sides:
        try:
            if side.method is not None:
                duet_vlm.make_method(side.method, **dict(side.settings)).plan(
                    prompt.tokens, len(adapter.layers), side.budget
                )
            feasible.append(side)
        except duet_vlm.BudgetError as error:
            rows.append({"side": str(side), "batch": prompt.batch, "status": "infeasible", "floor": error.floor})
    return feasible, rows


class BenchPass:
    """One side from pixels through some steps of decoding, with timers."""

    def __init__(self, adapter: Adapter, side: BenchSide, prompt: BenchPrompt, plan: BenchPlan) -> None:
        self.adapter, self.side, self.prompt, self.plan = adapter, side, prompt, plan
        self.clocks: StageTimers | None = None
        self.seen: list[dict[str, float]] = []

    def attached(self) -> Handle:
        """The side's handle; for the full model one that changes nothing."""
        if self.side.method is None:
            return duet_vlm.attach(self.adapter.model, "none")
        side, plan = self.side, self.plan
        chunk_settings = {"chunk_frames": plan.chunk_frames, "still_frames": plan.still_frames}
        return duet_vlm.attach(
            self.adapter.model, side.method, budget=side.budget, **chunk_settings | dict(side.settings)
        )

    def held(self) -> AbstractContextManager[Any]:
        """The full model is timed as it is, without a handle."""
        return contextlib.nullcontext() if self.side.method is None else self.attached()

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        self.clocks = clocks = StageTimers(self.adapter)
        try:
            with self.held():
                clocks.inside()
                yield
            self.seen.append(clocks.read())
        finally:
            clocks.remove()
            self.clocks = None

    def __call__(self) -> None:
        """One pass, inside ``around``."""
        clocks, model, prompt = self.clocks, self.adapter.model, self.prompt
        assert clocks is not None
        clocks.note("encode starts")
        encoded = encode(model, prompt.picture)
        clocks.note("encode ends")
        clocks.note("prefill starts")
        output = model(**prompt.text, **prompt.sizes, mm_encoder_outputs=encoded, logits_to_keep=1, use_cache=True)
        clocks.note("prefill ends")
        mask, token = prompt.text["attention_mask"], prompt.text["input_ids"][:, -1:]
        clocks.muted = True
        for done in range(1, 1 + (self.plan.new - 1 if self.plan.steps is None else self.plan.steps)):
            clocks.note("step starts")
            step = {"input_ids": token, "attention_mask": torch.cat([mask, mask.new_ones(len(mask), done)], 1)}
            step["position_ids"] = torch.full(
                (3, *token.shape) if self.adapter.mrope else token.shape, prompt.rows + done - 1, device=token.device
            )
            output = model(**step, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
            clocks.note("step ends")

    def generate(self) -> None:
        """End to end: pixels to ``new`` tokens by the stock generate()."""
        new = self.plan.new
        self.adapter.model.generate(
            **self.prompt.text, **self.prompt.picture, max_new_tokens=new, min_new_tokens=new, do_sample=False
        )

    def timings(self, rounds: int) -> dict[str, PairedTiming]:
        """Seconds of every stage in the last ``rounds`` passes."""
        last = self.seen[-rounds:]
        return {name: PairedTiming(tuple(each[name] for each in last)) for name in last[0]}

    def whole(self) -> Any:
        """From pixels to the first logits in one call."""
        return self.adapter.model(**self.prompt.text, **self.prompt.picture, logits_to_keep=1, use_cache=True)

    def facts(self) -> dict[str, Any]:
        """Facts of the report; the peak of memory up to the first logits (of the full model without a handle)."""
        device, prompt = str(next(self.adapter.model.parameters()).device), self.prompt
        text = prompt.rows - prompt.tokens
        with self.attached() as handle:
            held = sum(cache_bytes(self.whole().past_key_values))
            report = handle.report()
            peak = memory_of(self.whole, device)[0] if self.plan.memory and self.side.method is not None else None
        if self.plan.memory and self.side.method is None:
            peak = memory_of(self.whole, device)[0]
        return {
            "mean_tokens": report.measured_mean, "rows": [round(n) + text for n in report.measured],
            "flops": dataclasses.asdict(report.observed), "flops_share": report.observed.flops / report.full.flops,
            "flops_bound": report.flops_bound, "kv_bytes": held, "peak_bytes": peak,
        }  # fmt: skip


def _spread(timing: PairedTiming) -> dict[str, float]:
    low, high = timing.quartiles
    return {"median": 1000 * timing.median, "low": 1000 * low, "high": 1000 * high}


def _by_layer(times: dict[str, PairedTiming], rows: Sequence[int]) -> dict[str, Any]:
    """Layers with equally many tokens as one group; time of the hooks before a layer where the number changes or that
    ranks."""
    layers = [1000 * times[f"layer {i}"].median for i in range(len(rows))]
    starts = [i for i, count in enumerate(rows) if i == 0 or count != rows[i - 1]]
    groups = []
    for first, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        groups.append({"layers": [first, end - 1], "rows": rows[first], "ms": sum(layers[first:end])})
    before = [1000 * times[f"hook {i}"].median for i in range(len(rows))]
    stages = [
        {"layer": i, "ms": ms, "of_a_layer": ms / layers[max(0, i - 1)]}
        for i, ms in enumerate(before)
        if i in starts[1:]
    ]
    return {"groups": groups, "t2v": stages, "before_layers_ms": before}
