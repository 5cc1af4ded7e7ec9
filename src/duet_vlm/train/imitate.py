"""A first stage for a method's own module: before any learning from answers, the new module alone learns to make means
of tokens.

A decoder that understands a model's visual tokens understands means of them, and not the output of random weights.
Papers bridge that with hundreds of thousands of captions; a few hundred steps of regression, in which the decoder
learns nothing, do it where there are only questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments

from duet_vlm import EncoderReducer, EncoderView, Selection, attach
from duet_vlm.reducers.compressor import compressor_of
from duet_vlm.train.collate import Collator
from duet_vlm.train.settings import TrainSettings

RATE = 3e-3
SHOWN = 10  # lines of progress


def imitate(
    model: nn.Module, settings: TrainSettings, args: TrainingArguments, data: Dataset[Any], collator: Collator
) -> dict[str, Tensor]:
    """The weights that the method's module has after ``settings.imitate`` steps on the images and questions of
    ``data``; the model stays as it is.

    The error is the squared difference to what ``Compressor.imitation_target`` says, over the variance of that. Every
    process of a launch takes the same steps.

    Raises
    ------
    ValueError
        The method has no module, or one without weights.
    """
    wrong: list[Tensor] = []
    budget = settings.budgets[-1] if settings.budgets else None
    with attach(model, settings.method, budget=budget, **settings.settings) as handle:
        method = handle.reducer
        compressor = compressor_of(method)
    if compressor is None:
        raise ValueError(f"imitate: {settings.imitate}: {method.name} has no module that could learn; leave it out")
    with attach(model, imitating(compressor, wrong), budget=budget) as handle:
        assert handle.module is not None  # as there is a compressor
        model.to(args.device)
        weights = list(handle.module.parameters())
        if not weights:
            raise ValueError(
                f"imitate: {settings.imitate}: the module of {method.name} has no weights in this form; leave it out"
            )
        optimizer = torch.optim.AdamW(weights, RATE)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=settings.imitate)
        seen = batches(data, collator, args)
        for step in range(1, settings.imitate + 1):
            # labels too: answers are no part of the question
            inputs = {name: value.to(args.device) for name, value in next(seen).items()}
            with torch.no_grad(), torch.autocast(args.device.type, torch.bfloat16, args.bf16, cache_enabled=False):
                model(**inputs)
            if not wrong:
                continue  # no picture in the batch
            loss = torch.stack(wrong).mean()
            wrong.clear()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            rate.step()
            if args.process_index == 0 and step % max(1, settings.imitate // SHOWN) == 0:
                print(
                    f"imitating, step {step} of {settings.imitate}: {loss.item():.3f} of the variance left", flush=True
                )
        return {name: weight.detach().cpu().clone() for name, weight in handle.module.state_dict().items()}


def batches(data: Dataset, collator: Collator, args: TrainingArguments) -> Iterator[dict[str, Any]]:
    """Batches without end, each round in an order of its own."""
    for turn in count():
        order = torch.Generator().manual_seed(args.seed + turn)
        yield from DataLoader(
            data, args.per_device_train_batch_size, shuffle=True, generator=order, collate_fn=collator
        )


def imitating(reducer: EncoderReducer, wrong: list[Tensor]) -> EncoderReducer:
    """The same method, which records the difference of its rows from their targets; a gradient reaches its module and
    nothing else."""
    kind = type(reducer)

    def select_tokens(self: Any, view: EncoderView) -> Selection:
        with torch.enable_grad():
            selection = kind.select_tokens(self, view)
            assert selection.custom_rows is not None  # as there is a module
            there = selection.valid[:, : selection.custom_rows.shape[1]]
            target = self.imitation_target(view, selection)[:, : selection.custom_rows.shape[1]].float()[there].detach()
            wrong.append(
                (selection.custom_rows.float()[there] - target).square().mean()
                / target.var(0, unbiased=False).mean().clamp(min=1e-6)
            )
        return selection

    return type(kind.__name__, (kind,), {"select_tokens": select_tokens})(
        **{each.name: getattr(reducer, each.name) for each in fields(reducer)}
    )
