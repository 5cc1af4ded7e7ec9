"""``duet-vlm budget``: the plan of a budget for a model, before anything runs. Reads the config only, never the
weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from duet_vlm.cli.options import Model, Reduction, reducing, warn_of_more

if TYPE_CHECKING:
    from duet_vlm import Report, SpanPlan

PREDICTS = "python -m duet_vlm_lab.fleet, with the same options (pip install -e lab in your clone of duet-vlm)"


@reducing
def budget(
    reductions: list[Reduction],
    json_: bool,
    model: Model = "tiny",
    config_only: Annotated[
        Path | None,
        typer.Option(
            "--config-only", help="A config.json, or a folder with one: nothing else of the model is looked for."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="Visual tokens of the image, where its size decides.")
    ] = None,
    parts: Annotated[
        int, typer.Option("--parts", min=1, help="Crops or frames that the vision tower looks at one by one.")
    ] = 1,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, help="Text tokens of the prompt, for FLOPs and bytes.")
    ] = 32,
    device: Annotated[str | None, typer.Option("--device", hidden=True)] = None,
) -> None:
    """Solve a budget: settings, tokens per layer, FLOPs, KV bytes and the FLOPs-bound speed-up. Needs no weights.

    Several budgets are shown one after the other.
    """
    if device is not None:
        raise ValueError(f"--device {device}: seconds on a device that is not here are predicted by {PREDICTS}")
    if config_only is None:
        for reduction in reductions:
            reduction.check_budget(model)
    from duet_vlm.evaluation.speed.random_model import skeleton

    name = model if config_only is None else (f"{model} ({config_only})" if model != "tiny" else str(config_only))
    skeletal, element_bytes = skeleton(model, config_only)
    plans = [
        (name, *_planned(reduction, skeletal, element_bytes, tokens, parts, prompt_tokens), prompt_tokens)
        for reduction in reductions
    ]
    for reduction, (_, whole, _, _) in zip(reductions, plans, strict=True):
        warn_of_more(reduction.budget, [whole.tokens])
    if json_:
        plain = [_plain(*plan) for plan in plans]
        print(json.dumps(plain if len(plain) > 1 else plain[0]))
        return
    for number, plan in enumerate(plans):
        print("\n" if number else "", end="")
        _show(*plan)


def _planned(
    reduction: Reduction, model: Any, element_bytes: int, tokens: int | None, parts: int, text: int
) -> tuple[SpanPlan, Report]:
    from duet_vlm.evaluation.planned_prompt import equal_parts, plan_prompt, planned_report, whole_of

    with reduction.attach(model) as handle:
        fixed = handle.adapter.fixed_tokens
        if tokens is None and fixed is None:
            raise ValueError(
                f"--tokens: images of {handle.adapter.family} models differ in size; say how many visual tokens yours has"
            )
        planned = plan_prompt(handle, equal_parts(handle.adapter, tokens or (fixed or 0) * parts, parts), text)
        return whole_of(planned.sample), planned_report(handle, planned, element_bytes)


def _plain(model: str, plan: SpanPlan, report: Report, text: int) -> dict[str, Any]:
    return {
        "model": model,
        "method": report.method,
        "budget": report.budget,
        "settings": report.settings,
        "plan": dataclasses.asdict(plan),
        "mean_tokens": plan.mean,
        "text_tokens": text,
        "full": dataclasses.asdict(report.full),
        "planned": dataclasses.asdict(report.predicted),
        "flops_bound": report.flops_bound,
    }


def _show(model: str, plan: SpanPlan, report: Report, text: int) -> None:
    console = Console(highlight=False)
    budget_text = "its own settings" if report.budget is None else f"budget {report.budget}"
    console.print(
        f"[bold]{report.method}[/bold] on {model}, {budget_text}: an image of {plan.tokens} visual tokens, {text} text tokens"
    )
    entering = f"{plan.dominant} kept + {plan.contextual} merged" if plan.contextual else f"{plan.dominant} kept"
    console.print(f"entering the decoder: {plan.entry} tokens ({entering})\n")
    layers = Table("decoder layers", "visual tokens", box=None, pad_edge=False)
    start = 0
    for layer in range(1, len(plan.counts) + 1):
        if layer == len(plan.counts) or plan.counts[layer] != plan.counts[start]:
            layers.add_row(f"{start}-{layer - 1}" if layer - 1 > start else str(start), str(plan.counts[start]))
            start = layer
    layers.add_row("mean", f"{plan.mean:.2f}")
    console.print(layers)
    costs = Table("", "full", "planned", "of full", box=None, pad_edge=False)
    full, less = report.full, report.predicted
    for name, before, after, unit, scale in (
        ("vision", full.vision_flops, less.vision_flops, "GFLOPs", 1e9),
        ("decoder prefill", full.decoder_flops, less.decoder_flops, "GFLOPs", 1e9),
        ("selection", 0, less.selection_flops, "GFLOPs", 1e9),
        ("ranking", 0, less.ranking_flops, "GFLOPs", 1e9),
        ("KV cache", full.kv_bytes or 0, less.kv_bytes or 0, "MiB", 2**20),
    ):
        share = f"{after / before:.1%}" if before else "-"
        costs.add_row(name, f"{before / scale:.3f} {unit}", f"{after / scale:.3f} {unit}", share)
    console.print("\n", costs, sep="")
    console.print(f"\nFLOPs-bound speed-up of the decoder's prefill: {report.flops_bound:.2f}x")
