"""Callbacks of the Trainer: set the step's budget, save the reduction, show progress."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from duet_vlm import Handle, save_to_config
from duet_vlm.models.lookup import core_of
from duet_vlm.planning.budget import Budget
from duet_vlm.train.settings import TrainSettings

SHOWN = {"loss": "loss", "lr": "learning_rate", "held-out loss": "eval_loss"}


def budget_at(settings: TrainSettings, step: int, steps: int, seed: int) -> Budget | None:
    """The budget of one optimiser step: a function of the step alone, so that all ranks agree and a resumed run
    continues alike."""
    budgets = settings.budgets
    if len(budgets) > 1:
        return random.Random(seed * 1_000_003 + step).choice(budgets)
    if settings.anneal_from is not None:
        (end,) = budgets
        done = min(1.0, step / max(1, settings.anneal_until * steps))
        return settings.anneal_from + (float(end) - settings.anneal_from) * done
    return budgets[0] if budgets else None


class BudgetCallback(TrainerCallback):
    """Sets the budget before every step, and the last one of the settings for evaluation and for good."""

    def __init__(self, handle: Handle, settings: TrainSettings) -> None:
        self.handle, self.settings = handle, settings

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.handle.set(budget=budget_at(self.settings, state.global_step, state.max_steps, args.seed))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.handle.set(budget=self.settings.budgets[-1] if self.settings.budgets else None)


class FrozenTowerCallback(TrainerCallback):
    """Leaves a frozen tower out of the backward pass.

    transformers lets the inputs of every checkpointed module require a gradient, which only re-entrant checkpointing
    needs; the tower would be differentiated without use.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
        if args.gradient_checkpointing and not reentrant:
            core_of(kwargs["model"]).disable_input_require_grads()


class RememberCallback(TrainerCallback):
    """Keeps the reduction with every checkpoint: in the model's config, and beside adapters, which have no config of
    their own."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        save_to_config(self.handle)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.keep(self.handle, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    @staticmethod
    def keep(handle: Handle, folder: Path) -> None:
        """The config beside adapters in ``folder``; a whole model has saved its own."""
        file = folder / "config.json"
        if not file.exists():
            # a kill must not leave half a config in a checkpoint that counts as whole
            unfinished = file.with_suffix(".part")
            handle.adapter.model.config.to_json_file(unfinished)
            unfinished.replace(file)


class ProgressCallback(TrainerCallback):
    """On the first process: one bar with loss and learning rate; a line for each log without a terminal."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.progress.console.is_terminal:
            self.progress.start()
            self.progress.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for task in self.progress.task_ids:
            self.progress.update(task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not (state.is_world_process_zero and logs and logs.keys() & {"loss", "eval_loss"}):
            return
        shown = ", ".join(f"{name} {float(logs[key]):.4g}" for name, key in SHOWN.items() if key in logs)
        for task in self.progress.task_ids:
            self.progress.update(task, description=shown)
        if not self.progress.console.is_terminal:
            print(f"step {state.global_step} of {state.max_steps}: {shown}", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back, also after an error."""
        if self.progress.live.is_started:
            self.progress.stop()
