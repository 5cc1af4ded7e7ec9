"""Trained compressors beside methods that choose tokens: all trained alike from one start, at equal tokens, then asked
the same questions.

``python lab/studies/compressors.py [--methods pool,quecc] [--tokens 64,16] [--seeds 0,1] [--conversations 1600]``: one
model after the other, on one core; trained models land in out/compressors, rows in
lab/studies/results/compressors.json. A row that is there is not made again, so a run that was stopped goes on, and a
training that was stopped goes on from its checkpoint. Methods whose module begins at random are trained twice: as they
are, and after ``IMITATE`` steps in which the module learns to make means. ``--tokens 102 --methods
adsc,duet,duet_plus`` (40 %) is for ``adsc``, which has a floor of 64 and is trained with falling budgets.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import benchmark_path  # noqa: F401
import torch
from common import environment

ROOT = Path(__file__).resolve().parents[2]
OUT, FILE = ROOT / "out" / "compressors", Path(__file__).parent / "results" / "compressors.json"
METHODS = ("pool", "duet", "duet_plus", "quecc", "resampler", "vqtoken")
START, SOURCES = "lab/comparison/training/start", ("tiny", "tiny-crowded")
CONVERSATIONS, BATCH = 1600, 32  # of each source (usually); at once
QUESTIONS, STREAMS = 150, (0, 1)  # of each task and stream
IMITATE, RANDOM = 600, ("quecc", "resampler")  # steps of the first stage, and who begins at random
FALLS = ("adsc",)  # whose budget falls from all tokens while it is trained
SIDE = 16  # tokens of a picture, down and across
TRAINER = {
    "per_device_train_batch_size": BATCH, "num_train_epochs": 1, "learning_rate": 5e-4, "lr_scheduler_type": "cosine", "warmup_steps": 5,
    "weight_decay": 0.01, "bf16": True, "use_cpu": True, "save_steps": 25, "save_total_limit": 1, "eval_strategy": "no",
}  # fmt: skip


def chosen(method: str, tokens: int) -> dict[str, Any]:
    """Settings of a method beside its budget."""
    return {"kernel": round(SIDE / tokens**0.5)} if method == "quecc" else {}


def trained(
    method: str, tokens: int | None, seed: int, conversations: int, imitate: int, start: str, out: Path
) -> tuple[float | None, float]:
    """Train into ``out``: seconds of this process (None where it went on from a checkpoint), and the last loss that was
    logged."""
    from duet_vlm.train import resume
    from duet_vlm.train.run import train
    from duet_vlm.train.settings import TrainSettings

    own = chosen(method, tokens) if tokens else {}
    rest = {"settings": own, "imitate": imitate, "out": str(out), "trainer": TRAINER | {"seed": seed}}
    budget: dict[str, Any] = (
        {"budget": tokens / SIDE**2, "anneal_from": 1.0} if tokens and method in FALLS else {"budget": tokens}
    )
    begun, fresh = time.process_time(), not resume.checkpoints(out)
    train(TrainSettings(model=start, data=SOURCES, limit=conversations, method=method, **budget, **rest))
    return round(time.process_time() - begun, 1) if fresh else None, resume.state(out)["loss"]


def asked(folder: Path, method: str, tokens: int | None) -> dict[str, Any]:
    """Accuracy by task, and what a question costs."""
    from duet_vlm.api.loading import load
    from duet_vlm.evaluation.experiment import ExperimentCell
    from duet_vlm.evaluation.run_sample import answer
    from duet_vlm.evaluation.tasks import right, task
    from duet_vlm.reducers.compressor import BESIDE

    loaded = load(str(folder))
    weights = folder / BESIDE
    run = ExperimentCell(
        method,
        tokens,
        (chosen(method, tokens) if tokens else {}) | ({"weights": str(weights)} if weights.exists() else {}),
    )
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


def rows(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["rows"] if file.exists() else []


def write(file: Path, made: list[dict[str, Any]], **more: Any) -> None:
    said = more | {
        "start": START, "sources": SOURCES, "batch": BATCH, "trainer": TRAINER, "questions": QUESTIONS, "streams": STREAMS,
        "rows": made,
    }  # fmt: skip
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(said, indent=1) + "\n")
    unfinished.replace(file)


def one(method: str, tokens: int, seed: int, conversations: int, imitate: int, here: dict[str, Any]) -> None:
    """Make a row that is not there yet."""
    key = {
        "method": method,
        "tokens_asked": tokens,
        "seed": seed,
        "conversations": conversations * len(SOURCES),
        "imitate": imitate,
    }
    if any(key.items() <= ({"imitate": 0} | row).items() for row in rows(FILE)):
        return
    folder = OUT / f"{method}-{tokens}-{seed}-{conversations}-{imitate}"
    seconds, loss = trained(method, tokens, seed, conversations, imitate, START, folder)
    row = key | {"train_cpu_seconds": seconds, "loss": loss} | asked(folder, method, tokens) | {"environment": here}
    write(
        FILE,
        [*rows(FILE), row],
        what="methods trained alike from one start at equal tokens, and asked the same questions",
    )
    print(key, row["accuracy"], seconds, flush=True)


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
                for imitate in (0, IMITATE) if method in RANDOM else (0,):
                    one(method, tokens, seed, args.conversations, imitate, here)


if __name__ == "__main__":
    main()
