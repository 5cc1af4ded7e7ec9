"""Train ``tiny-chain`` from answers alone: ``python -m duet_vlm.tiny.train_chain --out DIR --seed 0`` (``make train-chain``).

One stage (``recipe/chain.py``) on one core. Start the same command again after a kill and it goes on from the last checkpoint, exactly.
The lessons are a function of the step alone, and the learning rate falls over the last steps only: with more ``--steps`` the same run goes
on where it was still at its full rate.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from duet_vlm.tiny.recipe.stages import curve, fit, weights

from . import load
from .chain_network import CHAIN_TOKEN
from .network import build_model
from .recipe.chain import ChainStage, answers_seen
from .text import build_processor

STEPS = 14000


def export(folder: Path, target: Path, settings: dict) -> None:
    """Write the model that the stage left in ``folder`` (float16), its processor and the training log to ``target``."""
    model, trained = build_model(), weights(folder)
    model.model.vision_tower.load_state_dict(load()[0].model.vision_tower.state_dict())
    for name, part in (("projector", model.model.multi_modal_projector), ("decoder", model.model.language_model)):
        part.load_state_dict({key.removeprefix(f"{name}."): value for key, value in trained.items() if key.startswith(f"{name}.")})
    model.half().save_pretrained(target)
    build_processor(CHAIN_TOKEN).save_pretrained(target)
    (target / "model.safetensors").chmod(0o644)
    lines = [{"answers": answers_seen(int(line["step"])), **line} for line in curve(folder) if "val_all" in line]
    log = {"settings": settings, "torch": torch.__version__, "curve": lines}
    (target / "training_log.json").write_text(json.dumps(log).replace("}, {", "},\n{") + "\n")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m duet_vlm.tiny.train_chain", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/tiny-chain"), help="folder for checkpoints and the finished model (weights/)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--pictures", type=int, default=9000, help="pictures in the pool that questions are asked about")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fp32", action="store_true", help="no bf16 matrix products (for cores without a bf16 unit)")
    parser.add_argument("--export-only", action="store_true", help="export the last checkpoint and stop")
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads cost more than they give on shared cores
    torch.set_num_threads(args.threads)
    if not args.export_only:
        fit(ChainStage(args.seed, args.steps, not args.fp32, args.pictures), args.out / "chain")
    export(args.out / "chain", args.out / "weights", {k: v for k, v in vars(args).items() if k not in ("out", "export_only")})


if __name__ == "__main__":
    main()
