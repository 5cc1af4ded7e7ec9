"""A small training set of every kind of sample, its batches, and the plain loop that the trainers are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from families import FAMILIES, IMAGE, ONE, PAD, TEXT, THREE, TWO, Inputs, Picture, Row, pictures_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import duet_vlm

RATE = 0.02


@dataclass(frozen=True)
class Sample:
    """A row and how many of its last tokens are supervised."""

    row: Row
    answer: int


# 1, 0, 3, 1 and 2 images, text of 5 to 9 tokens; the fourth sample supervises nothing
SAMPLES = (
    Sample(ONE, 3),
    Sample(TEXT, 2),
    Sample((*THREE, 28, 29), 3),
    Sample((1, Picture(11, 3, 5), 44, 45, 46), 0),
    Sample(TWO, 4),
    Sample((1, 33, 34, 41, 42, 43, 44, 45, 46), 3),
    Sample((1, Picture(12, 5, 4), 51, 52, 53, 54, 55, 56), 1),
    Sample((1, 61, Picture(13, 4, 4), 62, 63, 64), 2),
)


def collate(family: str, samples: Sequence[Sample], side: str = "right") -> Inputs:
    """A padded batch with labels; -100 on everything but the answers."""
    batch = FAMILIES[family].inputs([sample.row for sample in samples], side)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    from_end = mask.flip(1).cumsum(1).flip(1) * mask
    answer = torch.tensor([sample.answer for sample in samples])[:, None]
    return batch | {
        "labels": ids.masked_fill((from_end > answer) | (from_end == 0) | (ids == IMAGE) | (ids == PAD), -100)
    }


def batches(family: str, size: int) -> list[Inputs]:
    """The whole set in order, ``size`` samples at a time."""
    return [collate(family, SAMPLES[i : i + size]) for i in range(0, len(SAMPLES), size)]


def targets_in(batch: Inputs) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def loss_by_hand(logits: Tensor, slots: Tensor, labels: Tensor) -> Tensor:
    """Sum over the supervised labels; each surviving row predicts the label of the next surviving row."""
    terms = [logits.float().sum() * 0]
    for row, places, wanted in zip(logits, slots.tolist(), labels, strict=True):
        for j, slot in enumerate(places[1:]):
            if slot >= 0 and wanted[slot] != -100:
                terms.append(cross_entropy(row[j][None].float(), wanted[slot][None]))
    return torch.stack(terms).sum()


def slots_of(handle: duet_vlm.Handle | None, batch: Inputs) -> Tensor:
    """Which prompt slot each row of the logits is: the handle knows where tokens went, otherwise every slot has its
    row."""
    if handle is not None and "pixel_values" in batch:
        return handle.slots
    mask = batch["attention_mask"]
    return torch.arange(mask.shape[1]).expand_as(mask).masked_fill(mask == 0, -1)


@dataclass
class Curve:
    """Loss of every step; for every micro-batch with images the visual tokens per layer that were measured, mean over
    its samples."""

    losses: list[float]
    measured: list[float]


def plain_loop(
    model: nn.Module,
    handle: duet_vlm.Handle | None,
    steps: Sequence[Sequence[Inputs]],
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    rate: float = RATE,
    of_means: bool = False,
) -> Curve:
    """SGD written out: the loss by hand, one update per step, which is one or several micro-batches.

    ``of_means``: the mean of the micro-batches' mean losses, which is what the Trainer does for models that say
    ``accepts_loss_kwargs = False`` (Qwen2.5-VL), instead of the mean over all supervised labels of the step.
    """
    curve = Curve([], [])
    for step in steps:
        total = 0.0
        model.zero_grad()
        for batch in step:
            with context():
                logits = model(**batch).logits
            targets = targets_in(batch) * len(step) if of_means else sum(map(targets_in, step))
            loss = loss_by_hand(logits, slots_of(handle, batch), batch["labels"]) / targets
            loss.backward()
            total += loss.item()
            if handle is not None and "pixel_values" in batch:
                curve.measured.append(handle.report().measured_mean)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.grad is not None:
                    weight -= rate * weight.grad
        curve.losses.append(total)
    model.zero_grad()
    return curve


def tokens_wanted(family: str, batch_samples: Sequence[Sample], budget: float) -> float:
    """Visual tokens per layer, mean over the samples of a batch, that a fractional budget asks for."""
    spans = [FAMILIES[family].tokens(p) for sample in batch_samples for p in pictures_of([sample.row])]
    return sum(budget * n for n in spans) / len(batch_samples)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def farthest(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Largest difference of two updates of the same start, relative to the size of the whole expected update."""
    assert set(found) == set(expected)
    size = max(float((expected[name] - start[name]).norm()) for name in expected)
    return max(float((found[name] - expected[name]).norm()) for name in expected) / size
