"""Memory of an attached model for clips whose frames go through the tower some at a time: ``python
lab/studies/pieces.py``.

Clips of 16, 64 and 256 frames of noise, read by ``tiny-video`` and by a random Qwen2.5-VL of embedded size, in one
piece and in pieces of 8 frames. The most bytes that tensors take beyond weights and inputs, counted in the allocator:
while the encoder runs and the method chooses, and up to the first logits. Results land in
lab/studies/results/pieces.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import benchmark_path  # noqa: F401
import torch
from common import environment
from shapes import Shape, build

import duet_vlm
from duet_vlm.api.loading import load
from duet_vlm.evaluation.speed.prompts import encode, prompt_for
from duet_vlm.models.lookup import adapter_for
from duet_vlm.profiling.flop_counter import memory_of

FRAMES, SIZE, BUDGET = (16, 64, 256), 8, 0.2
METHODS = ("evs", "duet")
STEP = 64  # visual tokens of two frames, where their size is free
QWEN = Shape(
    "qwen2_5_vl", layers=4, hidden=512, heads=8, kv_heads=2, mlp=1408, vision_layers=6, vision_hidden=256, vision_mlp=768, vocab=1000
)  # fmt: skip


def measured(model: Any, frames: int, methods: list[str]) -> list[dict[str, Any]]:
    """A row for each method, in one piece and in pieces."""
    adapter = adapter_for(model)
    steps = frames // adapter.temporal_patch_size()
    prompt = prompt_for(adapter, 1, 16, STEP * steps if adapter.mrope else None, steps)
    rows = []
    for method in methods:
        for chunk in (None, SIZE):
            with duet_vlm.attach(model, method, budget=BUDGET, chunk_frames=chunk), torch.inference_mode():
                most = {
                    "encoding": memory_of(lambda: encode(model, prompt.picture))[0],
                    "first logits": memory_of(
                        lambda: model(**prompt.text, **prompt.picture, logits_to_keep=1, use_cache=True)
                    )[0],
                }
            size = prompt.tokens * adapter.text_model.config.hidden_size * 4  # float32
            rows.append(
                {
                    "frames": frames,
                    "tokens": prompt.tokens,
                    "method": method,
                    "chunk_frames": chunk,
                    "rows": size,
                    **most,
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--frames", default=",".join(map(str, FRAMES)))
    parser.add_argument("--methods", default=",".join(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = {"tiny-video": load("tiny-video", "cpu").model, "qwen2_5_vl": build(QWEN)}
    methods, frames = args.methods.split(","), list(map(int, args.frames.split(",")))
    rows = [
        {"model": name, **row}
        for name, model in models.items()
        for count in frames
        for row in measured(model, count, methods)
    ]
    settings = {"chunk_frames": SIZE, "budget": BUDGET, "shape": QWEN.__dict__}
    args.out.mkdir(parents=True, exist_ok=True)
    made = {"environment": environment(), "settings": settings, "results": rows}
    (args.out / "pieces.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
