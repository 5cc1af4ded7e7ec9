"""Recipes of several stages: parts of a model trained by transformers' Trainer on data that are a function of the step.

A kill costs the steps since the last checkpoint and nothing else: what comes after a resume is bit for bit what would
have come.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

LOG, CHECK, SAVE = 50, 400, 200  # steps


class Stage(nn.Module, ABC):
    """Everything that learns in one part of a recipe, what it sees, and how it moves.

    ``forward(**batch)`` returns ``loss`` (a scalar tensor) and numbers for the log. Building a stage seeds torch.
    """

    def __init__(self, seed: int, steps: int, bf16: bool) -> None:
        super().__init__()
        self.seed, self.steps, self.bf16 = seed, steps, bf16
        torch.manual_seed(seed)

    @abstractmethod
    def batch(self, step: int) -> dict[str, Any]:
        """Input of ``forward`` at ``step``: a function of nothing else."""

    @abstractmethod
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Optimisers at their full learning rates."""

    @abstractmethod
    def rate(self, step: int) -> float:
        """Factor of the learning rates at ``step``; the Trainer asks once more after the last."""

    def validate(self) -> dict[str, float]:
        """Numbers of held-out data."""
        return {}

    def autocast(self) -> torch.autocast:
        """Context in which matrix products run in bf16, if the settings say so."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)


class _JointOptimizer(torch.optim.Optimizer):
    """The optimisers of a stage as the single one that the Trainer steps, saves and restores."""

    def __init__(self, stage: Stage) -> None:
        self.parts, self.autocast = stage.optimizers(), stage.autocast

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        with self.autocast():
            for part in self.parts:
                part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for part, saved in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(saved)


class _StageTrainer(Trainer):
    """The Trainer, which also logs a stage's own numbers and lets the stage validate itself."""

    since = 0.0
    control: Any

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self.numbers = model(**inputs)
        return self.numbers.pop("loss")

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found = {f"val_{name}": value for name, value in self.model.validate().items()}
        if found:
            self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """``seconds`` counts earlier starts."""
        history, now = self.state.log_history, time.time()
        seconds = (history[-1]["seconds"] if history else 0.0) + now - self.since
        self.since = now
        super().log({**logs, **(self.numbers if "loss" in logs else {}), "seconds": round(seconds, 1)}, start_time)


class _PeriodicCheck(TrainerCallback):
    """Checks the stage now and then and where it ends, which may be before its schedule does."""

    def __init__(self, end: int) -> None:
        self.end = end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ended = state.global_step == self.end
        control.should_evaluate = ended or state.global_step % CHECK == 0
        control.should_save |= ended
        control.should_training_stop |= ended


def fit(stage: Stage, folder: Path, stop: int | None = None, report_to: str = "none") -> None:
    """Train ``stage`` to its last step, or to ``stop``; checkpoints in ``folder``, from the last of which it goes on."""
    end, last = min(stage.steps, stop or stage.steps), last_checkpoint(folder)
    if last is not None and _step(last) >= end:
        stage.load_state_dict(weights(folder))
        return
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        dataloader_pin_memory=False,
        num_train_epochs=1,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        max_grad_norm=1.0,
        remove_unused_columns=False,
        logging_steps=LOG,
        save_steps=SAVE,
        save_total_limit=2,
        eval_on_start=last is None,
        report_to=report_to,
        disable_tqdm=parent_process() is not None,  # bars of two processes would collide
    )
    optimizer = _JointOptimizer(stage)
    trainer = _StageTrainer(
        model=stage,
        args=args,
        train_dataset=range(stage.steps),
        data_collator=lambda steps: stage.batch(steps[0]),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, stage.rate)),
        callbacks=[_PeriodicCheck(end)],
    )
    trainer.since = time.time()
    trainer.train(resume_from_checkpoint=last and str(last))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end: the Trainer's state comes last."""
    return max((file.parent for file in folder.glob("checkpoint-*/trainer_state.json")), key=_step, default=None)


def weights(folder: Path) -> dict[str, Tensor]:
    """State dict of the stage that was trained in ``folder``."""
    last = last_checkpoint(folder)
    if last is None:
        raise ValueError(f"{folder}: no checkpoint of a stage: train that stage first")
    return load_file(last / "model.safetensors")


def curve(folder: Path) -> list[dict[str, float]]:
    """Log of the training, line by line, up to the last checkpoint in ``folder``; nothing before the first."""
    last = last_checkpoint(folder)
    return json.loads((last / "trainer_state.json").read_text())["log_history"] if last else []


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])
