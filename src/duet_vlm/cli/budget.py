"""``duet-vlm budget``: what a budget means for a model, before anything runs. Reads the config only, never the weights."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from duet_vlm.attach import Handle
from duet_vlm.budget import SpanPlan
from duet_vlm.cli.options import Model, Reduction, reducing
from duet_vlm.loading import config_of, quiet
from duet_vlm.measure.report import Report, Sample, make_report
from duet_vlm.reducer import DecoderReducer


def skeleton(name: str) -> tuple[Any, int]:
    """The model without weights (meta device), and the bytes of one number of its cache."""
    import torch
    from transformers import AutoModelForImageTextToText

    config = config_of(name)
    with quiet(), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    dtype = torch.float32 if name == "tiny" else getattr(config, "dtype", None) or torch.float32
    return model, dtype.itemsize


def planned_report(handle: Handle, tokens: int, text: int, element_bytes: int) -> Report:
    """The report that one image of ``tokens`` and ``text`` further tokens would give."""
    plan, reducer = handle.plan(tokens), handle.reducer
    counts = (plan.entry, *plan.counts)
    drops = [i for i in range(len(plan.counts)) if counts[i + 1] != counts[i]]
    ranked = isinstance(reducer, DecoderReducer) and reducer.uses_text
    scored = [i - reducer.score_before for i in drops if plan.counts[i]] if isinstance(reducer, DecoderReducer) and ranked else []
    rows = tuple(text + count for count in plan.counts)
    queries = 1 if getattr(reducer, "text_query", "") == "last" else text
    return make_report(
        method=reducer.name,
        settings=reducer.settings(),
        budget=handle.budget,
        samples=[Sample(text, (tokens,), ((tokens,),), (plan,), queries, (plan.counts, rows))],
        scored_layers=scored,
        decoder=handle.adapter.decoder_shape(),
        vision=handle.adapter.vision_shape(),
        element_bytes=element_bytes,
        cache_bytes=None,
        decoded=0,
        projects_all=handle.projects_all,
    )


@reducing
def budget(
    reduction: Reduction,
    json_: bool,
    model: Model = "tiny",
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, help="Visual tokens of the image, where its size decides.")] = None,
    text: Annotated[int, typer.Option("--text", min=1, help="Text tokens of the prompt, for FLOPs and bytes.")] = 32,
) -> None:
    """Solve a budget: settings, tokens per layer, FLOPs, KV bytes and the FLOPs-bound speed-up. Needs no weights."""
    skeletal, element_bytes = skeleton(model)
    with reduction.attach(skeletal) as handle:
        fixed = handle.adapter.fixed_tokens
        if tokens is None and fixed is None:
            raise ValueError(f"--tokens: images of {handle.adapter.family} models differ in size; say how many visual tokens yours has")
        count = tokens or fixed or 0
        plan, report = handle.plan(count), planned_report(handle, count, text, element_bytes)
    if json_:
        print(json.dumps(_plain(model, plan, report, text)))
    else:
        _show(model, plan, report, text)


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
    asked = "its own settings" if report.budget is None else f"budget {report.budget}"
    console.print(f"[bold]{report.method}[/bold] on {model}, {asked}: an image of {plan.tokens} visual tokens, {text} text tokens")
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
        ("ranking", 0, less.ranking_flops, "GFLOPs", 1e9),
        ("KV cache", full.kv_bytes or 0, less.kv_bytes or 0, "MiB", 2**20),
    ):
        share = f"{after / before:.1%}" if before else "-"
        costs.add_row(name, f"{before / scale:.3f} {unit}", f"{after / scale:.3f} {unit}", share)
    console.print("\n", costs, sep="")
    console.print(f"\nFLOPs-bound speed-up of the decoder's prefill: {report.flops_bound:.2f}x")
