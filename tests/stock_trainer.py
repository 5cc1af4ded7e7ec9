"""The stock Trainer over the small training set, set up so that a loop of a few lines must follow it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import nn
from training_data import RATE, SAMPLES, collate
from transformers import Trainer, TrainingArguments


def trainer(model: nn.Module, family: str, folder: Path, optimizer: Any = None, **changes: Any) -> Trainer:
    """The stock Trainer with plain SGD, so that its weights can be compared with those of a loop of five lines."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2, "num_train_epochs": 1, "logging_steps": 1, "optim": "sgd", "learning_rate": RATE,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "save_strategy": "no", "use_cpu": True,
        "report_to": [], "remove_unused_columns": False, "disable_tqdm": True,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **(settings | changes))
    collator = functools.partial(collate, family)
    return Trainer(
        model=model, args=arguments, train_dataset=SAMPLES, eval_dataset=SAMPLES, data_collator=collator, optimizer_cls_and_kwargs=optimizer
    )  # type: ignore[arg-type]  # fmt: skip


def losses(done: Trainer) -> list[float]:
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]
