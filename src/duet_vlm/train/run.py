"""A run from its settings: model, data, reducer and transformers' Trainer put together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from duet_vlm import Handle, attach
from duet_vlm.loading import load
from duet_vlm.train.callbacks import BudgetCallback, ProgressCallback, RememberCallback
from duet_vlm.train.collate import Collator
from duet_vlm.train.data import conversations
from duet_vlm.train.settings import Settings

LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
DEFAULTS = {"report_to": "none", "logging_steps": 10, "save_total_limit": 2, "remove_unused_columns": False, "disable_tqdm": True}


def arguments(settings: Settings) -> TrainingArguments:
    """The Trainer's own arguments; ours are defaults under the user's.

    Raises
    ------
    ValueError
        A name that TrainingArguments does not know, or a value it refuses.
    """
    try:
        return TrainingArguments(**{**DEFAULTS, **settings.trainer, "output_dir": settings.out})
    except TypeError as error:
        raise ValueError(f"trainer: {error} (arguments of transformers.TrainingArguments)") from error


def tuned(model: nn.Module, settings: Settings) -> nn.Module:
    """Freeze what does not learn; with tune='lora' the adapters are added."""
    from duet_vlm.models.adapter import adapter_for

    adapter = adapter_for(model)
    projector = adapter.projector()
    model.requires_grad_(False)
    if settings.tune == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**{"target_modules": LORA_TARGETS, **settings.lora}))
    if settings.tune == "full":
        model.requires_grad_(True)
        if not settings.train_vision:
            adapter.tower().requires_grad_(False)
    projector.requires_grad_(True)
    return model


def build(settings: Settings) -> tuple[Trainer, Handle]:
    """The Trainer with the reduced model; detach the handle when done."""
    args = arguments(settings)
    if args.label_smoothing_factor:
        raise ValueError("trainer: label_smoothing_factor reads logits of dropped tokens, which do not exist: leave it out")
    loaded = load(settings.model)
    model = tuned(loaded.model, settings)
    budgets = settings.budgets
    handle = attach(model, settings.method, budget=budgets[-1] if budgets else None, processor=loaded.processor, **settings.settings)
    callbacks: list[Any] = [RememberCallback(handle), ProgressCallback()]
    if budgets:
        callbacks.append(BudgetCallback(handle, settings))
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=conversations(settings.data, settings.images, settings.limit, args.seed),
        data_collator=Collator(loaded.processor, settings.prompts, settings.max_length),
        processing_class=loaded.processor,
        callbacks=callbacks,
    )
    return trainer, handle


def train(settings: Settings) -> Path:
    """Train, going on from the last checkpoint in ``out`` if there is one; returns the folder of the finished model."""
    from transformers.trainer_utils import get_last_checkpoint

    trainer, handle = build(settings)
    out = Path(settings.out)
    with handle:
        trainer.train(resume_from_checkpoint=get_last_checkpoint(settings.out) if out.is_dir() else None)
        trainer.save_model(settings.out)
        trainer.save_state()
    return out
