"""``duet-vlm bench``: measure a model against itself: the full model, methods and baselines in turns, stage by
stage."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from duet_vlm.api.catalogue import check_settings
from duet_vlm.api.loading import check_model
from duet_vlm.cli.errors import folder_for, friendly
from duet_vlm.cli.options import (
    SEVERAL,
    AsJson,
    ChunkFrames,
    Debug,
    Device,
    Model,
    StillFrames,
    budgets_of,
    counts,
    method_of,
    pieces_of,
    several,
)

METHODS = ("duet", "visionzip", "fastv", "uniform", "random")
BUDGETS = ("0.33", "0.11")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # names in torch


def bench(
    model: Model = "tiny",
    config_only: Annotated[
        Path | None,
        typer.Option("--config-only", help="A config.json or a folder with one: random weights at that shape."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "--methods",
            help=f"{SEVERAL} 'all' takes every method, duet.json that of 'tune'. Default: {','.join(METHODS)}.",
        ),
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option("--budget", "--budgets", "-b", help=f"{SEVERAL} Default: {','.join(BUDGETS)}.")
    ] = None,
    batch: Annotated[list[str] | None, typer.Option("--batch", help=f"Rows at a time. {SEVERAL} Default: 1.")] = None,
    prompt_tokens: Annotated[
        list[str] | None, typer.Option("--prompt-tokens", help=f"Text tokens after the picture. {SEVERAL} Default: 32.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="Visual tokens, where the picture's size decides.")
    ] = None,
    frames: Annotated[int, typer.Option("--frames", min=0, help="Steps of time of a clip; 0 for an image.")] = 0,
    chunk_frames: ChunkFrames = None,
    still_frames: StillFrames = None,
    new: Annotated[int, typer.Option("--new", min=2, help="Tokens to write.")] = 8,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Measured rounds; every side runs once in each.")] = 7,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="fp32, bf16 or fp16; default: the checkpoint's, bf16 on CUDA else fp32."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write everything as JSON to this file.")] = None,
    plots: Annotated[
        Path | None, typer.Option("--plots", help="Write pictures to this folder (needs matplotlib).")
    ] = None,
    json_: AsJson = False,
    debug: Debug = False,
) -> None:
    """Time a model stage by stage, reduced and not, in turns on the same prompts; FLOPs, cache and peak memory beside
    it."""
    # torch's profiler, which counts memory, tells of its own doings otherwise
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with friendly(debug, json_):
        named, budgets = _methods(method), budgets_of(budget)
        batches, texts = counts("--batch", batch, 1), counts("--prompt-tokens", prompt_tokens, 32)
        chunk_settings = pieces_of(chunk_frames, still_frames, frames > 0, "give --frames")
        for method_name, _, settings in named:
            check_settings(method_name, dict(settings))
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
        if config_only is None:
            check_model(model)
        _writable(out, plots)
        from duet_vlm.evaluation.speed.paired import BenchPlan, BenchSide, result
        from duet_vlm.evaluation.speed.plots import draw

        usual = budgets or budgets_of(BUDGETS)
        reduced = [
            BenchSide(name, each, settings)
            for name, own, settings in named
            for each in ([own] if own and not budgets else usual)
        ]
        sides = (BenchSide(), *dict.fromkeys(reduced))
        loaded, where, name = _model(model, config_only, device, dtype)
        plan = BenchPlan(sides, batches, texts, tokens, frames, new, rounds, **chunk_settings)
        say = functools.partial(typer.echo, err=True)
        measured = result(name, loaded, plan, say)
        if out is not None:
            out.write_text(json.dumps(measured, indent=1) + "\n")
        files = draw(measured, plots) if plots is not None else []
        if json_:
            print(json.dumps(measured | {"files": [str(f) for f in files]}))
        else:
            _show(measured)


def _writable(out: Path | None, plots: Path | None) -> None:
    """Check now that the outputs can be written at the end."""
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out}: is a folder; give a file to write JSON to")
    if out is not None:
        folder_for("--out", out.parent)
    if plots is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError("--plots needs matplotlib: pip install '.[viz]'")
        folder_for("--plots", plots)


def _methods(given: list[str] | None) -> list[tuple[str, int | float | None, tuple[tuple[str, Any], ...]]]:
    """Methods, and where a file names one its own budget and settings."""
    names = several(given) or list(METHODS)
    if names == ["all"]:
        import duet_vlm

        names = [name for name in duet_vlm.list_methods() if name != "none"]
    named = [method_of(name) for name in names]
    return [(name, budget, tuple(settings.items())) for name, budget, settings in named]


def _model(name: str, config_only: Path | None, device: str | None, dtype: str | None) -> tuple[Any, str, str]:
    """The model to run, its device, and its name."""
    import torch

    from duet_vlm.api.loading import device_for, load
    from duet_vlm.evaluation.speed.random_model import random_model

    where, dtype_given = device_for(device), None if dtype is None else getattr(torch, DTYPES[dtype])
    if config_only is None:
        return load(name, device, dtype_given).model, where, name
    usual = torch.bfloat16 if where.startswith("cuda") else torch.float32
    return random_model(config_only, where, dtype_given or usual), where, str(config_only)


def _show(measured: dict[str, Any]) -> None:
    from duet_vlm.evaluation.console import console as screen

    console = screen()
    console.print(
        f"{measured['model']}, {measured['environment']['device']}, {measured['environment']['dtype']}, {measured['environment']['threads']} threads"
    )
    for key in sorted({(row["batch"], row["text"]) for row in measured["rows"] if "ms" in row}):
        rows = [row for row in measured["rows"] if "ms" in row and (row["batch"], row["text"]) == key]
        prompt = f"batch {key[0]}, {rows[0]['tokens']} visual and {key[1]} other tokens"
        console.print(
            f"\n{prompt}; ms, medians of {rows[0]['pairs']} rounds; speed-up of the first token by these medians"
        )
        head = (
            "",
            "tokens",
            "vision",
            "V2V",
            "prefill",
            "T2V",
            "step",
            "first token",
            "speed-up",
            "by FLOPs",
            "peak MiB",
        )
        table = Table(*head, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*_cells(row, rows[0]))
        console.print(table)
    for row in measured["rows"]:
        if "ms" not in row:
            console.print(
                f"{row['side']}: {row['status']}" + ("" if row["floor"] is None else f" (floor {row['floor']:.1f})")
            )


def _cells(row: dict[str, Any], full: dict[str, Any]) -> list[str]:
    def time(stage: str) -> str:
        return f"{row['ms'][stage]['median']:.3g}"

    peak = row["peak_bytes"]
    by_flops = full["flops_share"] / row["flops_share"]
    first, whole = row["ms"]["to first token"]["median"], full["ms"]["to first token"]["median"]
    return [
        row["side"], f"{row['mean_tokens']:.1f}", time("vision"), time("v2v"), time("prefill"),
        f"{sum(stage['ms'] for stage in row['t2v']):.3g}", time("decode step"), time("to first token"),
        f"{whole / first:.2f}", f"{by_flops:.2f}", "-" if peak is None else f"{peak / 2**20:.1f}",
    ]  # fmt: skip
