"""Prefill, decode, end to end and memory on one GPU, reduced and not, at the shapes of 7B models; random weights, no
network, under 8 minutes.

``python benchmarks/gpu/run.py`` writes benchmarks/results/gpu.json; ``--device cpu --shape tiny`` shows in seconds that
it works.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from models import CONFIGS, five_crops
from transformers.utils import is_flash_attn_2_available

import duet_vlm
from duet_vlm.evaluation.speed.paired import BenchPlan, BenchSide, result, sides_of
from duet_vlm.evaluation.speed.prompts import prompt_for
from duet_vlm.evaluation.speed.random_model import random_model
from duet_vlm.models.lookup import adapter_for

RESULTS = Path(__file__).parents[1] / "results"
BUDGETS = (0.33, 0.22, 0.111)
ANCHORS = [  # published by others on other hardware and software: a scale to read ours by, no comparison
    {"who": "SIEVE", "model": "LLaVA-NeXT", "budget": "11.1 %", "prefill": 3.62, "end_to_end": 2.49, "kv_cache": 6.0},
    {"who": "TRIO", "prefill": 2.67, "end_to_end": 2.11},
    {"who": "VScan", "prefill": 2.91},
]


@dataclass(frozen=True)
class Case:
    """One model with one kind of picture. ``ends``: generate() is timed, too; ``fits``: the largest batch is looked
    for."""

    model: str
    tokens: int | None = None
    frames: int = 0
    batches: tuple[int, ...] = (1,)
    ends: bool = False
    fits: bool = False

    def __str__(self) -> str:
        what = f", {self.frames} frames" if self.frames else f", {self.tokens} tokens" if self.tokens else ""
        return f"{self.model}{what}"


CASES = (  # by model, so that each is built once
    Case("llava-1.5-7b", ends=True, fits=True),
    Case("llava-1.5-7b", batches=(8, 32)),
    Case("llava-next-7b", ends=True, fits=True),
    Case("llava-next-7b", batches=(8,)),
    Case("qwen2.5-vl-7b", tokens=1296, ends=True, fits=True),
    Case("qwen2.5-vl-7b", tokens=1296, batches=(8,)),
    Case("qwen2.5-vl-7b", tokens=2500),
    Case("qwen2.5-vl-7b", tokens=4000),
    # 256 tokens per two frames
    *(Case("qwen2.5-vl-7b", tokens=128 * frames, frames=frames) for frames in (8, 16, 32, 64)),
)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which models (default: all): {', '.join(CONFIGS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=("full", "tiny"), default="full")
    parser.add_argument("--minutes", type=float, default=6.5, help="start no further case after so many")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    given = parser.parse_args(words)
    unknown = sorted(set(given.names) - set(CONFIGS))
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}; choose from {', '.join(CONFIGS)}")
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --shape tiny shows that the scripts work")
    end = time.monotonic() + 60 * given.minutes
    found = [case for case in CASES if not given.names or case.model in given.names]
    rows = [
        row
        for name in dict.fromkeys(case.model for case in found)
        for row in _model(name, [c for c in found if c.model == name], given, end)
    ]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(
        json.dumps({"benchmark": "gpu", "shape": given.shape, "anchors": ANCHORS, "cases": rows}, indent=1) + "\n"
    )
    show(rows)
    print(f"written to {given.out}", file=sys.stderr)


def attentions(device: str) -> list[str]:
    """sdpa, and FlashAttention where it is installed; eager never."""
    return ["sdpa", "flash_attention_2"] if device.startswith("cuda") and is_flash_attn_2_available() else ["sdpa"]


def _model(name: str, cases: list[Case], given: argparse.Namespace, end: float) -> list[dict[str, Any]]:
    tiny = given.shape == "tiny"
    if time.monotonic() > end:
        return [{"case": str(case), "status": "skipped: out of time"} for case in cases]
    dtype = torch.bfloat16 if given.device.startswith("cuda") else torch.float32
    model = random_model(CONFIGS[name](tiny), given.device, dtype)
    rows = []
    for attention in attentions(given.device):
        model.set_attn_implementation(attention)
        for case in cases if attention == "sdpa" else cases[:1]:
            if time.monotonic() > end:
                rows.append({"case": str(case), "attention": attention, "status": "skipped: out of time"})
                continue
            start = time.monotonic()
            row = {"case": str(case), "attention": attention} | _case(model, case, tiny, given.device)
            rows.append(row | {"seconds": time.monotonic() - start})
    del model
    gc.collect()
    if given.device.startswith("cuda"):
        torch.cuda.empty_cache()
    return rows


def _case(model: nn.Module, case: Case, tiny: bool, device: str) -> dict[str, Any]:
    tokens = case.tokens if case.tokens is None or not tiny else max(16 * max(1, case.frames // 2), case.tokens // 64)
    picture = five_crops(model.config) if case.model == "llava-next-7b" else None
    plan = BenchPlan(
        (*sides_of(["duet"], BUDGETS), BenchSide("visionzip", 0.111), BenchSide("uniform", 0.111)), case.batches[:1] if tiny else case.batches, (60,), tokens,
        case.frames // 2, 4 if tiny else 128, 1 if tiny else 5, 0 if tiny else 2, steps=2 if tiny else 8, generate_rounds=1 * case.ends,
    )  # fmt: skip
    found = result(
        str(case),
        model,
        plan,
        lambda line: print(f"{case}: {line}", file=sys.stderr),
        picture,
    )
    if case.fits:
        found["largest_batch"] = {
            str(side): largest_batch(model, side, plan, picture, 2 if tiny else 512) for side in plan.sides[:4]
        }
    return found


def largest_batch(model: nn.Module, side: BenchSide, plan: BenchPlan, picture: Any, most: int) -> int:
    """The largest power of two that reads its prompts and writes a token without running out of memory, up to ``most``."""
    adapter, fits, batch = adapter_for(model), 0, 1
    while batch <= most:
        try:
            prompt = prompt_for(adapter, batch, plan.texts[0], plan.tokens, plan.frames, picture)
            with torch.inference_mode(), duet_vlm.attach(model, side.method or "none", budget=side.budget):
                model.generate(**prompt.text, **prompt.picture, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        except torch.OutOfMemoryError:
            break
        finally:
            prompt = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        fits, batch = batch, 2 * batch
    return fits


def show(cases: list[dict[str, Any]]) -> None:
    print(
        f"{'case':<34}{'batch':>6}  {'side':<22}{'tokens':>8}{'prefill':>10}{'to first':>10}{'end to end':>11}{'KV':>7}{'MiB':>9}"
    )
    for case in cases:
        if "rows" not in case:
            print(f"{case['case']:<34}{case['status']}")
            continue
        full = {row["batch"]: row for row in case["rows"] if row["side"] == "full"}
        for row in case["rows"]:
            if "ms" not in row:
                print(f"{case['case']:<34}{row['batch']:>6}  {row['side']:<22}{row['status']}")
                continue
            speed = {name: f"{found['median']:.2f}x" for name, found in row["speed_up"].items()}
            cache = full[row["batch"]]["kv_bytes"] / row["kv_bytes"]
            print(
                f"{case['case']:<34}{row['batch']:>6}  {row['side']:<22}{row['mean_tokens']:>8.1f}{speed['prefill']:>10}"
                f"{speed['to first token']:>10}{speed.get('end to end', '-'):>11}{cache:>6.1f}x{row['peak_bytes'] / 2**20:>9.0f}"
            )
        if "largest_batch" in case:
            print(f"  largest batch: {', '.join(f'{side}: {n}' for side, n in case['largest_batch'].items())}")
    print("published by others, on other hardware and software (not a comparison):")
    for anchor in ANCHORS:
        print(
            "  " + ", ".join(f"{key} {value}{'x' if isinstance(value, float) else ''}" for key, value in anchor.items())
        )


if __name__ == "__main__":
    main()
