"""Train the tiny video model from the shipped tiny model: ``python -m duet_vlm.tiny.train_video --out DIR --seed 0``.

One stage (``recipe/video.py``), under an hour on one core with bf16. Start the same command again after a kill and it goes on from the
last checkpoint, exactly. The schedule counts steps, never seconds.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from .recipe.stages import curve, fit, weights
from .recipe.video import VideoStage
from .video_network import build_video_model

STEPS = 2200


def summary(folder: Path) -> list[dict]:
    """The curve, thinned out: validation lines and a dozen training lines."""
    lines = curve(folder)
    plain = [x for x in lines if not any(k.startswith("val_") for k in x)]
    kept = plain[:: max(1, len(plain) // 12)]
    return [x for x in lines if x not in plain or x in kept]


def export(folder: Path, target: Path, settings: dict) -> None:
    """Write the model that the stage left in ``folder`` (float16), its processor and the training log to ``target``."""
    from .video_processor import build_video_processor

    model, trained = build_video_model(), weights(folder)
    model.model.load_state_dict({name.removeprefix("core."): value for name, value in trained.items() if name.startswith("core.")})
    model.half().save_pretrained(target)
    build_video_processor().save_pretrained(target)
    (target / "model.safetensors").chmod(0o644)
    log = {"settings": settings, "torch": torch.__version__, "curve": summary(folder)}
    (target / "training_log.json").write_text(json.dumps(log).replace("}, {", "},\n{") + "\n")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m duet_vlm.tiny.train_video", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/tiny-video"), help="folder for checkpoints and the finished model (weights/)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fp32", action="store_true", help="no bf16 matrix products (for cores without a bf16 unit)")
    parser.add_argument("--export-only", action="store_true", help="export the last checkpoint and stop")
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads cost more than they give on shared cores
    torch.set_num_threads(args.threads)
    if not args.export_only:
        fit(VideoStage(args.seed, args.steps, not args.fp32), args.out / "video")
    export(args.out / "video", args.out / "weights", {k: v for k, v in vars(args).items() if k not in ("out", "export_only")})


if __name__ == "__main__":
    main()
