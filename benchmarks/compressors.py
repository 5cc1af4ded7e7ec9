"""Trained compressors beside methods that choose tokens: all trained alike from one start, at equal tokens, then asked the same questions.

``python benchmarks/compressors.py [--methods pool,quecc] [--tokens 64,16] [--seeds 0,1] [--conversations 1600]``: one model after the other, on one
core; trained models land in out/compressors, rows in benchmarks/results/compressors.json. A row that is there is not made again, so a run that was
stopped goes on, and a training that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from common import environment

ROOT = Path(__file__).resolve().parents[1]
OUT, FILE = ROOT / "out" / "compressors", ROOT / "benchmarks" / "results" / "compressors.json"
METHODS = ("pool", "duet", "duet_plus", "quecc", "resampler", "vqtoken")
START, SOURCES = "comparison/training/start", ("tiny", "tiny-crowded")
CONVERSATIONS, BATCH = 1600, 32  # of each source (usually); at once
QUESTIONS, STREAMS = 150, (0, 1)  # of each task and stream
KERNEL = {64: 2, 16: 4}  # rows and columns of a window of 256 tokens
TRAINER = {
    "per_device_train_batch_size": BATCH, "num_train_epochs": 1, "learning_rate": 5e-4, "lr_scheduler_type": "cosine", "warmup_steps": 5,
    "weight_decay": 0.01, "bf16": True, "use_cpu": True, "save_steps": 25, "save_total_limit": 1, "eval_strategy": "no",
}  # fmt: skip


def chosen(method: str, tokens: int) -> dict[str, Any]:
    """Settings of a method beside its budget."""
    return {"kernel": KERNEL[tokens]} if method == "quecc" else {}


def trained(method: str, tokens: int, seed: int, conversations: int) -> tuple[Path, float | None, float]:
    """The trained model's folder, seconds of this process (None where it went on from a checkpoint), and the last loss that was logged."""
    from duet_vlm.train import resume
    from duet_vlm.train.run import train
    from duet_vlm.train.settings import Settings

    out = OUT / f"{method}-{tokens}-{seed}-{conversations}"
    rest = {"settings": chosen(method, tokens), "out": str(out), "trainer": TRAINER | {"seed": seed}}
    begun, fresh = time.process_time(), not resume.checkpoints(out)
    train(Settings(model=START, data=SOURCES, limit=conversations, method=method, budget=tokens, **rest))
    return out, round(time.process_time() - begun, 1) if fresh else None, resume.state(out)["loss"]


def asked(folder: Path, method: str, tokens: int) -> dict[str, Any]:
    """Accuracy by task, and what a question costs."""
    from duet_vlm.compressor import BESIDE
    from duet_vlm.evaluate.answer import answer
    from duet_vlm.evaluate.experiment import Run
    from duet_vlm.evaluate.tasks import right, task
    from duet_vlm.loading import load

    loaded = load(str(folder))
    weights = folder / BESIDE
    run = Run(method, tokens, chosen(method, tokens) | ({"weights": str(weights)} if weights.exists() else {}))
    found: dict[str, Any] = {"accuracy": {}, "tokens": 0.0, "gflops": 0.0, "full_gflops": 0.0}
    total = 0
    for name in SOURCES:
        source, hits = task(name), []
        questions = [source.ask(stream, index) for stream in STREAMS for index in range(QUESTIONS)]
        for some in (questions[i : i + 30] for i in range(0, len(questions), 30)):
            outcome = answer(loaded, [run], some, source.max_new_tokens)[run.id]
            hits += [right(question, said) for question, said in zip(some, outcome.answers, strict=True)]
            found["tokens"] += outcome.measured
            found["gflops"] += outcome.flops / 1e9
            found["full_gflops"] += outcome.full_flops / 1e9
            total += len(some)
        found["accuracy"][name] = sum(hits) / len(hits)
        found.setdefault("hits", {})[name] = "".join(str(int(hit)) for hit in hits)
    return found | {key: found[key] / total for key in ("tokens", "gflops", "full_gflops")}


def rows() -> list[dict[str, Any]]:
    return json.loads(FILE.read_text())["rows"] if FILE.exists() else []


def write(made: list[dict[str, Any]]) -> None:
    said = {
        "what": "methods trained alike from one start at equal tokens, and asked the same questions",
        "start": START, "sources": SOURCES, "batch": BATCH, "trainer": TRAINER, "questions": QUESTIONS, "streams": STREAMS,
        "rows": made,
    }  # fmt: skip
    unfinished = FILE.with_suffix(".part")
    unfinished.write_text(json.dumps(said, indent=1) + "\n")
    unfinished.replace(FILE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--tokens", default="64,16")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS, help="of each source")
    args, here = parser.parse_args(), environment()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    for seed in map(int, args.seeds.split(",")):
        for tokens in map(int, args.tokens.split(",")):
            for method in args.methods.split(","):
                key = {"method": method, "tokens_asked": tokens, "seed": seed, "conversations": args.conversations * len(SOURCES)}
                if any(key.items() <= row.items() for row in rows()):
                    continue
                folder, seconds, loss = trained(method, tokens, seed, args.conversations)
                write([*rows(), key | {"train_cpu_seconds": seconds, "loss": loss} | asked(folder, method, tokens) | {"environment": here}])
                print(key, rows()[-1]["accuracy"], seconds, flush=True)


if __name__ == "__main__":
    main()
