"""Train ``tiny-long`` from the shipped tiny video model: ``python -m duet_vlm.tiny.train_long --out DIR --seed 0`` (``make train-long``).

One stage (``recipe/long.py``), under an hour on one core with bf16. Start the same command again after a kill and it goes on from the
last checkpoint, exactly. The schedule counts steps, never seconds.
"""

from __future__ import annotations

from pathlib import Path

from .long_clips import LENGTHS, SIDE
from .long_network import LONG_WORDS, POSITIONS, build_long_model
from .recipe.command import parsed, parser, thinned, write
from .recipe.long import LongStage
from .recipe.stages import curve, fit, weights

STEPS = 1500


def export(folder: Path, target: Path, settings: dict) -> None:
    """Write the model that the stage left in ``folder``, its processor and the training log to ``target``."""
    from .video_processor import build_video_processor

    model, trained = build_long_model(), weights(folder)
    model.model.load_state_dict({name.removeprefix("core."): value for name, value in trained.items() if name.startswith("core.")})
    write(model, build_video_processor(SIDE, LONG_WORDS, LENGTHS[0], POSITIONS), target, settings=settings, curve=thinned(curve(folder)))


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    options = parser("duet_vlm.tiny.train_long", __doc__, "out/tiny-long")
    options.add_argument("--steps", type=int, default=STEPS)
    args, settings = parsed(options, argv)
    if not args.export_only:
        fit(LongStage(args.seed, args.steps, not args.fp32), args.out / "long")
    export(args.out / "long", args.out / "weights", settings)


if __name__ == "__main__":
    main()
