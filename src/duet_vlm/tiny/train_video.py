"""Train the tiny video model from the shipped tiny model: ``python -m duet_vlm.tiny.train_video --out DIR --seed 0``.

One stage (``recipe/video.py``), under an hour on one core with bf16. Start the same command again after a kill and it goes on from the
last checkpoint, exactly. The schedule counts steps, never seconds.
"""

from __future__ import annotations

from pathlib import Path

from .recipe.command import parsed, parser, thinned, write
from .recipe.stages import curve, fit, weights
from .recipe.video import VideoStage
from .video_network import build_video_model

STEPS = 2200


def export(folder: Path, target: Path, settings: dict) -> None:
    """Write the model that the stage left in ``folder``, its processor and the training log to ``target``."""
    from .video_processor import build_video_processor

    model, trained = build_video_model(), weights(folder)
    model.model.load_state_dict({name.removeprefix("core."): value for name, value in trained.items() if name.startswith("core.")})
    write(model, build_video_processor(), target, settings=settings, curve=thinned(curve(folder)))


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    options = parser("duet_vlm.tiny.train_video", __doc__, "out/tiny-video")
    options.add_argument("--steps", type=int, default=STEPS)
    args, settings = parsed(options, argv)
    if not args.export_only:
        fit(VideoStage(args.seed, args.steps, not args.fp32), args.out / "video")
    export(args.out / "video", args.out / "weights", settings)


if __name__ == "__main__":
    main()
