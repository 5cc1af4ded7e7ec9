"""Ours beside others' tools: ``python benchmarks/neighbours.py [pressing] [decoding]``, results/neighbours.json.

Decoding behind a prompt that ``duet`` reduced to 22 %: a dynamic cache and a static one sized by the plan, layers as
they are and compiled. And answers of the embedded model with a reduced prompt, with a compressed cache (``press.py``),
and with both.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from common import HERE, environment
from press import pressed
from shapes import LLAVA, build, picture, prompt, twin
from torch import Tensor, nn

import duet_vlm
from duet_vlm.evaluation import tiny
from duet_vlm.profiling.timing import ratio, time_paired

STEPS, WARMUP, BUDGET = 30, 4, 0.22
QUESTIONS, SHARES, METHODS = 100, (1.0, 0.75, 0.5), ("", "duet")


def stepper(model: nn.Module, cache: Any, real: Tensor) -> Callable[[], Tensor]:
    """One greedy-sized step after the other on ``cache``."""
    token, done = torch.full((len(real), 1), 5), 0

    def step() -> Tensor:
        nonlocal done
        done += 1
        mask = torch.cat([real, real.new_ones(len(real), done)], 1)
        return model(
            input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits

    return step


def decoding() -> list[dict[str, Any]]:
    """Time of a step over that with the dynamic cache and layers as they are, pair by pair."""
    torch._dynamo.config.recompile_limit = 64
    plain, sides, widths = build(LLAVA), {}, []
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        for name in ("dynamic", "static", "dynamic, compiled", "static, compiled"):
            model = twin(plain)
            handle = stack.enter_context(duet_vlm.attach(model, "duet", budget=BUDGET))
            inputs = prompt(LLAVA)
            cache = model(**inputs, **picture(LLAVA), logits_to_keep=1).past_key_values
            widths = [layer.keys.shape[2] for layer in cache.layers]
            cache = handle.static_cache(cache, STEPS + WARMUP + 4) if name.startswith("static") else cache
            if name.endswith("compiled"):
                for layer in model.model.language_model.layers:
                    layer.forward = torch.compile(layer.forward)
            sides[name] = stepper(model, cache, inputs["attention_mask"])
        times = time_paired(sides, STEPS, warmup=WARMUP)
    rows = []
    for name, timing in times.items():
        found = ratio(timing, times["dynamic"])
        rows.append(
            {
                "side": name,
                "milliseconds": 1000 * timing.median,
                "ratio": found.median,
                "interval": [found.low, found.high],
                "rows": widths,
            }
        )
    return rows


def pressing() -> list[dict[str, Any]]:
    """Right answers of the embedded model, one prompt at a time, and the keys that a layer holds behind it (mean)."""
    model, processor = tiny.load()
    rows = []
    for method in METHODS:
        for share in SHARES:
            right, keys = 0, 0.0
            with contextlib.ExitStack() as stack:
                if method:
                    stack.enter_context(duet_vlm.attach(model, method, budget=0.33))
                if share < 1:
                    stack.enter_context(pressed(model, share))
                for item in tiny.samples("test", QUESTIONS):
                    inputs = processor(images=item.image, text=tiny.prompt(item.question), return_tensors="pt")
                    out = model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True)
                    said = processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                    right += said == item.answer
                    keys += sum(layer.keys.shape[2] for layer in out.past_key_values.layers) / len(
                        out.past_key_values.layers
                    )
            rows.append(
                {"method": method or "none", "share": share, "accuracy": right / QUESTIONS, "keys": keys / QUESTIONS}
            )
    return rows


PARTS = {"pressing": pressing, "decoding": decoding}


def main(names: list[str]) -> None:
    """Measure what is named, or both, and put it into the file."""
    torch.set_num_threads(1)
    path = HERE / "results" / "neighbours.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found |= {
        "benchmark": "neighbours",
        "environment": environment(),
        "questions": QUESTIONS,
        "steps": STEPS,
        "budget": BUDGET,
    }
    for name in names or PARTS:
        found[name] = PARTS[name]()
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
