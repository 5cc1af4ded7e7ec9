"""A command that trains a model in one stage, from its options to the finished model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from duet_vlm_lab.recipe.command import parsed, parser, thinned, write
from duet_vlm_lab.recipe.stages import Stage, curve, fit, weights


@dataclass(frozen=True)
class OneStage:
    """``stage(seed, steps, bf16)`` learns for ``steps`` steps; ``build()`` makes the model whose ``.model`` it holds as
    ``core``, and ``processor()`` what reads clips or pictures for it. ``module`` is the command's, ``about`` its help.
    ``whole`` makes the weights of the model from those of ``core``, where the one has more than the other."""

    module: str
    about: str | None
    steps: int
    stage: Callable[[int, int, bool], Stage]
    build: Callable[[], PreTrainedModel]
    processor: Callable[[], ProcessorMixin]
    whole: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict

    def __call__(self, argv: list[str] | None = None) -> None:
        """The command line."""
        short = self.module.rpartition("train_")[2]
        options = parser(self.module, self.about, f"out/tiny-{short}")
        options.add_argument("--steps", type=int, default=self.steps)
        args, settings = parsed(options, argv)
        if not args.export_only:
            fit(self.stage(args.seed, args.steps, not args.fp32), args.out / short)
        self.export(args.out / short, args.out / "weights", settings)

    def export(self, folder: Path, target: Path, settings: dict[str, Any]) -> None:
        """Write the model that the stage left in ``folder``, its processor and the training log to ``target``."""
        model, trained = self.build(), weights(folder)
        core = {name.removeprefix("core."): value for name, value in trained.items() if name.startswith("core.")}
        model.model.load_state_dict(self.whole(core))
        write(model, self.processor(), target, settings=settings, curve=thinned(curve(folder)))
