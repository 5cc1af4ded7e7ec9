"""Train ``tiny-chain`` from answers alone: ``python -m duet_vlm_lab.train_chain --out DIR --seed 0`` (``make
train-chain``).

One stage (``recipe/chain.py``) on one core. Start the same command again after a kill and it goes on from the last
checkpoint, exactly. The lessons are a function of the step alone, and the learning rate falls over the last steps only:
with more ``--steps`` the same run goes on where it was still at its full rate.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from duet_vlm.evaluation.tiny import load
from duet_vlm.evaluation.tiny.network import build_model
from duet_vlm.evaluation.tiny.text import build_processor
from duet_vlm_lab.networks.chain_network import CHAIN_TOKEN, DISTINCT, EMBEDDINGS, LAYERS
from duet_vlm_lab.recipe.chain import ChainStage, answers_seen
from duet_vlm_lab.recipe.command import parsed, parser, write
from duet_vlm_lab.recipe.stages import curve, fit, weights

STEPS = 18200


def export(folder: Path, target: Path, settings: dict) -> None:
    """Write the model that the stage left in ``folder``, its processor and the training log to ``target``."""
    model, trained = build_model(EMBEDDINGS, LAYERS), weights(folder)
    model.model.vision_tower.load_state_dict(load()[0].model.vision_tower.state_dict())
    for name, part in (("projector", model.model.multi_modal_projector), ("decoder", model.model.language_model)):
        part.load_state_dict(
            in_turns(
                {key.removeprefix(f"{name}."): value for key, value in trained.items() if key.startswith(f"{name}.")}
            )
        )
    lines = [{"answers": answers_seen(int(line["step"])), **line} for line in curve(folder) if "val_all" in line]
    write(model, build_processor(CHAIN_TOKEN), target, settings=settings, curve=lines)


def in_turns(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of ``LAYERS`` decoder layers from those of the ``DISTINCT`` ones."""
    found = {}
    for name, value in state.items():
        first, dot, rest = name.removeprefix("layers.").partition(".")
        numbers = range(int(first), LAYERS, DISTINCT) if name.startswith("layers.") else ()
        found |= {f"layers.{number}{dot}{rest}": value for number in numbers} or {name: value}
    return found


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    options = parser("duet_vlm_lab.train_chain", __doc__, "out/tiny-chain")
    options.add_argument("--steps", type=int, default=STEPS)
    options.add_argument(
        "--pictures", type=int, default=9000, help="pictures in the pool that questions are asked about"
    )
    args, settings = parsed(options, argv)
    if not args.export_only:
        fit(ChainStage(args.seed, args.steps, not args.fp32, args.pictures), args.out / "chain")
    export(args.out / "chain", args.out / "weights", settings)


if __name__ == "__main__":
    main()
