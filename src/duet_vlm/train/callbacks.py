"""What the Trainer is asked to do beside its own work: set the step's budget, remember the reduction, show progress."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from duet_vlm import Handle, remember
from duet_vlm.budget import Budget
from duet_vlm.train.settings import Settings


def budget_at(settings: Settings, step: int, steps: int, seed: int) -> Budget | None:
    """The budget of one optimiser step: a function of the step alone, so that all ranks agree and a resumed run goes on alike."""
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

    def __init__(self, handle: Handle, settings: Settings) -> None:
        self.handle, self.settings = handle, settings

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.handle.set(budget=budget_at(self.settings, state.global_step, state.max_steps, args.seed))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.handle.set(budget=self.settings.budgets[-1])


class RememberCallback(TrainerCallback):
    """Keeps the reduction with every checkpoint: in the model's config, and beside adapters, which have no config of their own."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        remember(self.handle)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and not (folder / "config.json").exists():
            self.handle.adapter.model.config.save_pretrained(folder)


class ProgressCallback(TrainerCallback):
    """One bar with loss and learning rate."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress.start()
            self.bar = self.progress.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress.update(self.bar, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            self.progress.update(self.bar, description=f"loss {float(logs['loss']):.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()
