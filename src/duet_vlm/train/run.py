"""A run from its settings: model, data, reducer and transformers' Trainer put together."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput

from duet_vlm import Handle, NewWeights, attach
from duet_vlm.api.loading import base_of, load, quiet
from duet_vlm.models.lookup import adapter_for
from duet_vlm.train import resume
from duet_vlm.train.callbacks import BudgetCallback, FrozenTowerCallback, ProgressCallback, RememberCallback
from duet_vlm.train.collate import IGNORED, Collator
from duet_vlm.train.data import conversations
from duet_vlm.train.imitate import imitate
from duet_vlm.train.settings import TrainSettings
from duet_vlm.utils.suggest import did_you_mean

LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
DEFAULTS = {
    "report_to": "none", "logging_steps": 10, "save_total_limit": 2, "remove_unused_columns": False, "disable_tqdm": True,
    "prediction_loss_only": True, "log_level_replica": "error",
}  # fmt: skip


class ConversationTrainer(Trainer):
    """The Trainer for conversations.

    A batch without any answer has no loss (a mean over no label is no number). The held-out loss is the mean over all
    answer tokens. The projector may have its own rate, and a method's own weights are saved beside the model's.
    """

    projector_lr: float | None = None
    handle: Handle
    held_out: list[tuple[Tensor, Tensor]]  # of this evaluation: for each row the loss of its batch, its answer tokens

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.handle.module is not None and self.args.should_save:  # every process comes by here
            self.handle.save_weights(Path(output_dir or self.args.output_dir))

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint.

        The Trainer's own way does not load a whole model (its names are others than the file's, transformers issue
        43701), and does not know a module of the method's own.
        """
        best = Path(self.state.best_model_checkpoint)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or hasattr(self.model, "peft_config"):
            super()._load_best_model()
        else:
            self.model.load_state_dict(load(str(best), "cpu", torch.float32).model.state_dict())
        if self.handle.module is not None:
            self.handle.load_weights(best)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Log as loss the mean over the answer tokens of all rows, whatever batches they come in.

        Raises
        ------
        ValueError
            No row has an answer.
        """
        self.held_out = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        losses, tokens = (torch.cat(some).double() for some in zip(*self.held_out, strict=True))
        if not bool(tokens.any()):
            raise ValueError(
                "eval_data: no row has an answer, so there is no held-out loss: give some, or leave it out"
            )
        output.metrics[f"{metric_key_prefix}_loss"] = float((losses * tokens)[tokens > 0].sum() / tokens.sum())
        return output

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss, *more = super().prediction_step(model, inputs, *args, **kwargs)
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum(1).to(loss.device)
        # of all processes, without the rows that fill up their last batch
        losses, tokens = (self.gather_function(rows) for rows in (loss.repeat(len(tokens)), tokens))
        self.held_out.append((losses.cpu(), tokens.cpu()))
        return (loss, *more)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if bool((inputs["labels"][:, 1:] != IGNORED).any()):
            if not model.training:
                kwargs.pop("num_items_in_batch", None)  # of all processes: the mean over this one's tokens is wanted
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        nothing = outputs.logits.float().sum() * 0  # runs backward as on every other rank
        return (nothing, {"loss": nothing}) if return_outputs else nothing

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.projector_lr is not None:
            apart = {id(weight) for weight in adapter_for(self.model).projector().parameters()}
            for group in list(optimizer.param_groups):
                mine = [weight for weight in group["params"] if id(weight) in apart]
                group["params"] = [weight for weight in group["params"] if id(weight) not in apart]
                if mine:
                    optimizer.add_param_group({**group, "params": mine, "lr": self.projector_lr})
        return optimizer


def arguments(settings: TrainSettings) -> TrainingArguments:
    """The Trainer's own arguments; ours are defaults under the user's.

    Raises
    ------
    ValueError
        A name that TrainingArguments does not know, or a value it refuses.
    """
    here = {
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "eval_strategy": "epoch" if settings.eval_data else "no",
    }
    usual = {each.name: each.default for each in dataclasses.fields(TrainingArguments)}
    for name, value in settings.trainer.items():
        if name not in usual:
            near = did_you_mean(name, usual)
            raise ValueError(
                f"trainer: {name}: unknown{near}; these are the arguments of transformers.TrainingArguments"
            )
        if isinstance(value, str) and isinstance(usual[name], int | float):
            raise ValueError(
                f"trainer: {name}: {value!r}: give a {'truth value' if isinstance(usual[name], bool) else 'number'}"
            )
    compiling = [
        name for name in ("torch_compile", "torch_compile_backend", "torch_compile_mode") if settings.trainer.get(name)
    ]
    if compiling:  # before the arguments are made: they tell the whole process
        why = "it compiles the model as a whole, and a reducer's hooks cannot be part of a graph"
        raise ValueError(f"trainer: {compiling[0]}={settings.trainer[compiling[0]]}: {why}: leave it out")
    try:
        args = TrainingArguments(**{**DEFAULTS, **here, **settings.trainer, "output_dir": settings.out})
    except TypeError as error:
        raise ValueError(f"trainer: {error} (arguments of transformers.TrainingArguments)") from error
    if args.label_smoothing_factor:
        raise ValueError(
            "trainer: label_smoothing_factor: the Trainer's smoothing does not shift labels for these models: leave it out"
        )
    return args


def tuned(model: nn.Module, settings: TrainSettings) -> nn.Module:
    """Freeze all weights that do not learn, in ``frozen_dtype``; with tune='lora' the adapters are added, and the
    projector is saved beside them."""
    adapter = adapter_for(model)
    projector = adapter.projector()
    model.requires_grad_(False)
    if settings.tune == "lora":
        from peft import LoraConfig, get_peft_model

        (name,) = (name for name, module in model.named_modules() if module is projector)
        model = get_peft_model(
            model, LoraConfig(**{"target_modules": LORA_TARGETS, "modules_to_save": [name], **settings.lora})
        )
    else:
        if settings.tune == "full":
            model.requires_grad_(True)
            adapter.tower().requires_grad_(settings.train_vision)
        projector.requires_grad_(True)
    for weight in model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(getattr(torch, settings.frozen_dtype))
    return model


def build(settings: TrainSettings, checkpoint: Path | None = None) -> tuple[Trainer, Handle]:
    """The Trainer with the reduced model; detach the handle when done.

    To continue from a ``checkpoint`` of a whole model it is loaded like any model: the Trainer's own loading ignores
    the key names that ``save_pretrained`` writes for these families (transformers issue 43701) and would begin anew.
    Adapters it does load.
    """
    args = arguments(settings)
    if settings.tune == "lora" and base_of(settings.model) is not None:
        raise ValueError(
            f"model: {settings.model} holds adapters; new ones need a whole model under them: save it merged first"
        )
    data = conversations(settings.data, settings.images, settings.limit, args.seed)
    held_out = (
        conversations(settings.eval_data, settings.images, settings.eval_limit, args.seed, "validation")
        if settings.eval_data
        else None
    )
    set_seed(args.seed)  # adapters begin with random weights
    source = settings.model if checkpoint is None or settings.tune == "lora" else str(checkpoint)
    loaded = load(source, "cpu", torch.float32)  # the Trainer moves it to this process's device
    model = tuned(loaded.model, settings)
    budget = settings.budgets[-1] if settings.budgets else None
    collator = Collator(loaded.processor, settings.prompts, settings.max_length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NewWeights)  # they are about to learn
        begins = imitate(model, settings, args, data, collator) if settings.imitate and checkpoint is None else None
        handle = attach(model, settings.method, budget=budget, processor=loaded.processor, **settings.settings)
    try:
        if checkpoint is not None and handle.module is not None:
            handle.load_weights(checkpoint)
        elif begins is not None and handle.module is not None:
            handle.module.load_state_dict(begins)
        trainer = ConversationTrainer(
            model=model,
            args=args,
            train_dataset=data,
            eval_dataset=held_out,
            data_collator=collator,
            processing_class=loaded.processor,
            callbacks=[
                RememberCallback(handle),
                FrozenTowerCallback(),
                ProgressCallback(),
                BudgetCallback(handle, settings),
            ],
        )
    except BaseException:
        handle.detach()
        raise
    trainer.projector_lr, trainer.handle, trainer.held_out = settings.projector_lr, handle, []
    trainer.remove_callback(PrinterCallback)
    return trainer, handle


def train(settings: TrainSettings, restart: bool = False) -> Path:
    """Train, continuing from the last whole checkpoint in ``out`` if there is one; returns the folder of the finished
    model.

    A finished run is not changed. ``restart`` deletes the files of an earlier run in ``out``.

    Raises
    ------
    ValueError
        Settings or data that cannot be right, ``out`` holds a run with other settings, an image that is broken.
    """
    out = Path(settings.out)
    args = arguments(settings)  # joins the other processes, if there are any
    with args.main_process_first(local=False):
        if args.process_index == 0:
            resume.begin(settings, restart)
    if resume.finished(out):
        return out
    last = resume.last_whole(out)
    trainer, handle = build(settings, last)
    with handle, quiet():
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except ValueError as error:  # from a data worker it comes wrapped in that worker's traceback
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
        finally:
            trainer.pop_callback(ProgressCallback).stop()
        trainer.save_model(settings.out)
        if trainer.is_world_process_zero():
            RememberCallback.keep(handle, out)
        trainer.save_state()
    return out
