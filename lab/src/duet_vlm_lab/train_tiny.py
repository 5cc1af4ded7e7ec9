"""Train the tiny model from nothing: ``python -m duet_vlm_lab.train_tiny --out DIR --seed 0`` (``make train``).

Stage A (tower) and stage B (decoder) run side by side, one core each; stage C joins them. Start the same command again
after a kill and it goes on from the last checkpoint. The schedule counts steps, never seconds.

``--finish-unguided`` instead takes the shipped model, undoes its attention supervision and goes on from answers alone
(``recipe/finish.py``). Every stage is one ``recipe.stages.fit``: transformers' Trainer (extra ``train``).
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path

import torch

from duet_vlm.evaluation.tiny.network import build_model
from duet_vlm.evaluation.tiny.text import build_processor
from duet_vlm_lab.recipe.command import parsed, parser, thinned, write
from duet_vlm_lab.recipe.decoder import DecoderStage
from duet_vlm_lab.recipe.finish import FinishStage
from duet_vlm_lab.recipe.join import JoinStage, ProjectorStage
from duet_vlm_lab.recipe.stages import Stage, curve, fit, weights
from duet_vlm_lab.recipe.tower import TowerStage

TOWER_STEPS, DECODER_STEPS, PROJECTOR_STEPS, JOIN_STEPS, FINISH_STEPS = 7500, 4000, 1200, 1500, 900
DECODER_STOP = 0.75  # the decoder leaves its schedule here, still moving: it has to adapt to the tower next


def _apart(stage: type[Stage], args: argparse.Namespace, name: str, steps: int, stop: int) -> None:
    """Train a stage on one thread."""
    torch.set_num_threads(1)
    fit(stage(args.seed, steps, not args.fp32), args.out / name, stop, args.report_to)


def train_apart(args: argparse.Namespace) -> None:
    """Stages A and B as two processes."""
    context = multiprocessing.get_context("spawn")
    tower = (TowerStage, args, "tower", args.tower_steps, args.tower_steps)
    decoder = (DecoderStage, args, "decoder", args.decoder_steps, round(args.decoder_steps * DECODER_STOP))
    jobs = [context.Process(target=_apart, args=stage) for stage in (tower, decoder)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    if any(job.exitcode for job in jobs):
        raise RuntimeError(
            f"a stage failed (exit codes {[job.exitcode for job in jobs]}); run the same command again to resume"
        )


def train(args: argparse.Namespace) -> None:
    """Train what the command line asks for."""
    bf16 = not args.fp32
    if args.finish_unguided:
        fit(
            FinishStage(args.seed, args.finish_steps, bf16, not args.whole),
            args.out / "finish",
            report_to=args.report_to,
        )
        return
    train_apart(args)
    fitted = ProjectorStage(args.seed, args.projector_steps, bf16, args.out)
    fit(fitted, args.out / "projector", report_to=args.report_to)
    fit(JoinStage(args.seed, args.join_steps, bf16, fitted), args.out / "join", report_to=args.report_to)


def export(folder: Path, target: Path, settings: dict, stage: str = "join") -> None:
    """Write the model that a stage left, tokenizer, processor and the training log to ``target``."""
    model, trained = build_model(), weights(folder / stage)
    model.model.load_state_dict(
        {name.removeprefix("core."): value for name, value in trained.items() if name.startswith("core.")}
    )
    done = [name for name in ("tower", "decoder", "projector", "join", "finish") if (folder / name).exists()]
    write(
        model,
        build_processor(),
        target,
        settings=settings,
        curves={name: thinned(curve(folder / name)) for name in done},
    )


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    options = parser(
        "duet_vlm_lab.train_tiny",
        __doc__,
        "out/tiny-from-scratch",
        2,
        "of the joint stage (tower and decoder use one each)",
    )
    options.add_argument("--tower-steps", type=int, default=TOWER_STEPS)
    options.add_argument("--decoder-steps", type=int, default=DECODER_STEPS)
    options.add_argument("--projector-steps", type=int, default=PROJECTOR_STEPS)
    options.add_argument("--join-steps", type=int, default=JOIN_STEPS)
    options.add_argument(
        "--finish-unguided", action="store_true", help="instead: undo the shipped model's attention supervision"
    )
    options.add_argument(
        "--whole", action="store_true", help="with --finish-unguided: every picture with all its tokens"
    )
    options.add_argument("--finish-steps", type=int, default=FINISH_STEPS)
    options.add_argument("--report-to", default="none", help="as the Trainer's own argument: tensorboard, wandb, ...")
    args, settings = parsed(options, argv)
    if not args.export_only:
        train(args)
    export(args.out, args.out / "weights", settings, "finish" if args.finish_unguided else "join")


if __name__ == "__main__":
    main()
