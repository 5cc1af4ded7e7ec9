"""Train the tiny model from nothing: ``python -m duet_vlm.tiny.train --out DIR --seed 0``.

Stage A (tower) and stage B (decoder) run side by side, one core each; stage C joins them. Start the same command again after
a kill and it goes on from the last checkpoint. The schedule counts steps, never seconds.

``--finish-unguided`` instead takes the shipped model, undoes its attention supervision and goes on from answers alone
(``recipe/finish.py``).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

TOWER_STEPS, DECODER_STEPS, JOIN_STEPS, FINISH_STEPS = 7500, 4000, 1500, 900
DECODER_STOP = 0.75  # the decoder leaves its schedule here, still moving: it has to adapt to the tower next


def _single(stage: Callable, folder: Path, seed: int, steps: int, bf16: bool, stop: int) -> None:
    """Run a stage on one thread."""
    import torch

    torch.set_num_threads(1)
    stage(folder, seed, steps, bf16, stop)


def train_apart(folder: Path, seed: int, tower_steps: int, decoder_steps: int, bf16: bool) -> None:
    """Stages A and B as two processes."""
    from .recipe.decoder import train_decoder
    from .recipe.tower import train_tower

    context = multiprocessing.get_context("spawn")
    jobs = [
        context.Process(target=_single, args=(stage, folder, seed, steps, bf16, stop))
        for stage, steps, stop in (
            (train_tower, tower_steps, tower_steps),
            (train_decoder, decoder_steps, round(decoder_steps * DECODER_STOP)),
        )
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    if any(job.exitcode for job in jobs):
        raise RuntimeError(f"a stage failed (exit codes {[job.exitcode for job in jobs]}); run the same command again to resume")


def summary(folder: Path) -> dict[str, list[dict]]:
    """The curves of all stages, thinned out: validation lines and a dozen training lines per stage."""
    out = {}
    for stage in ("tower", "decoder", "projector", "join", "finish"):
        file = folder / f"{stage}.jsonl"
        if file.exists():
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            checks = [x for x in lines if any(k.startswith("val_") for k in x)]
            plain = [x for x in lines if x not in checks]
            kept = checks + plain[:: max(1, len(plain) // 12)]
            out[stage] = sorted(kept, key=lambda x: x["step"])
    return out


def export(folder: Path, target: Path, settings: dict, stage: str = "join") -> None:
    """Write the model that a stage left (float16), tokenizer, processor and the training log to ``target``."""
    import torch

    from .network import build_model
    from .text import save_processor

    model = build_model()
    model.model.load_state_dict(torch.load(folder / f"{stage}.pt", weights_only=True)["modules"]["model"])
    model.half().save_pretrained(target)
    save_processor(target)
    (target / "model.safetensors").chmod(0o644)
    log = {"settings": settings, "torch": torch.__version__, "curves": summary(folder)}
    (target / "training_log.json").write_text(json.dumps(log).replace("}, {", "},\n{") + "\n")


def _train(args: argparse.Namespace, stage: str) -> None:
    """Train what the command line asks for."""
    if stage == "join":
        train_apart(args.out, args.seed, args.tower_steps, args.decoder_steps, not args.fp32)
    import torch

    from .recipe.finish import train_finish
    from .recipe.join import train_join

    torch.set_num_threads(args.threads)
    if stage == "join":
        train_join(args.out, args.seed, args.join_steps, not args.fp32)
    else:
        train_finish(args.out, args.seed, args.finish_steps, not args.fp32, cuts=not args.whole)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m duet_vlm.tiny.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, logs and the finished model (weights/)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-steps", type=int, default=TOWER_STEPS)
    parser.add_argument("--decoder-steps", type=int, default=DECODER_STEPS)
    parser.add_argument("--join-steps", type=int, default=JOIN_STEPS)
    parser.add_argument("--finish-unguided", action="store_true", help="instead: undo the shipped model's attention supervision")
    parser.add_argument("--whole", action="store_true", help="with --finish-unguided: every picture with all its tokens")
    parser.add_argument("--finish-steps", type=int, default=FINISH_STEPS)
    parser.add_argument("--threads", type=int, default=2, help="threads of the joint stage (tower and decoder use one each)")
    parser.add_argument("--fp32", action="store_true", help="no bf16 matrix products (for cores without a bf16 unit)")
    parser.add_argument("--export-only", action="store_true", help="export the last checkpoint and stop")
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads cost more than they give on shared cores
    stage = "finish" if args.finish_unguided else "join"
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "export_only")}
    if not args.export_only:
        _train(args, stage)
    export(args.out, args.out / "weights", settings, stage)


if __name__ == "__main__":
    main()
