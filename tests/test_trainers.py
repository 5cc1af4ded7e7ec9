"""Training with what people use (Trainer, TRL, PEFT, torch.compile): each run is compared with a loop written out by hand."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from stock_trainer import losses, trainer
from torch import nn
from training_data import SAMPLES, Curve, batches, collate, farthest, plain_loop, tokens_wanted, weights

import duet_vlm
from duet_vlm.methods.duet import Duet

pytestmark = pytest.mark.train

BUDGET = 0.4
TWO_FAMILIES = pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])


def attach(model: nn.Module, **settings: Any) -> duet_vlm.Handle:
    return duet_vlm.attach(model, "duet", budget=BUDGET, **settings)


@functools.lru_cache
def reference(family: str, size: int = 2, budget: float | None = BUDGET) -> tuple[Curve, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Curve, weights before and weights after the plain loop; ``budget`` None is the untouched model."""
    model = build(family).train()
    before = weights(model)
    handle = None if budget is None else duet_vlm.attach(model, "duet", budget=budget)
    curve = plain_loop(model, handle, [[batch] for batch in batches(family, size)])
    return curve, before, weights(model)


@TWO_FAMILIES
def test_the_loop_saves_tokens_and_is_another_curve_than_the_full_model(family: str) -> None:
    """What the other tests lean on: the reference really reduces, to the budget, and the untouched model learns along another curve."""
    curve, before, after = reference(family)
    full, _, after_full = reference(family, budget=None)
    wanted = [tokens_wanted(family, SAMPLES[i : i + 2], BUDGET) for i in range(0, len(SAMPLES), 2)]
    for measured, most in zip(curve.measured, wanted, strict=True):
        assert most - 1.5 <= measured <= most
    assert all(abs(a - b) > 1e-3 for a, b in zip(curve.losses, full.losses, strict=True))
    assert farthest(after, after_full, before) > 0.05


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "checkpointing, reentrant"])
@TWO_FAMILIES
def test_trainer_follows_the_loop(family: str, checkpointing: bool | None, tmp_path: Path) -> None:
    curve, before, after = reference(family)
    model = build(family)
    options = {} if checkpointing is None else {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    with attach(model) as handle:
        run = trainer(model, family, tmp_path, **options)
        run.train()
        assert handle.report().measured_mean == curve.measured[-1]
    assert losses(run) == pytest.approx(curve.losses, rel=1e-4)
    assert farthest(weights(model), after, before) < 1e-3


def grouped(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulated_micro_batches_equal_the_whole_batch(micro: int, tmp_path: Path) -> None:
    """4 samples at once, or in micro-batches of which some have no image and one has no label: one loss per supervised token."""
    curve, before, after = reference("llava", size=4)
    model = build("llava")
    with attach(model):
        run = trainer(model, "llava", tmp_path, per_device_train_batch_size=micro, gradient_accumulation_steps=4 // micro)
        run.train()
    assert losses(run) == pytest.approx(curve.losses, rel=1e-4)
    assert farthest(weights(model), after, before) < 1e-3


def test_accumulation_where_the_model_takes_no_token_count(tmp_path: Path) -> None:
    """The stock Trainer averages the means of Qwen2.5-VL's micro-batches; with a reducer it still does."""
    model = build("qwen2_5_vl").train()
    assert not model.accepts_loss_kwargs
    before = weights(model)
    with attach(model) as handle:
        curve = plain_loop(model, handle, grouped(batches("qwen2_5_vl", 2), 2), of_means=True)
    after = weights(model)
    assert curve.losses != pytest.approx(reference("qwen2_5_vl", size=4)[0].losses, rel=1e-3)
    model = build("qwen2_5_vl")
    with attach(model):
        run = trainer(model, "qwen2_5_vl", tmp_path, gradient_accumulation_steps=2)
        run.train()
    assert losses(run) == pytest.approx(curve.losses, rel=1e-4)
    assert farthest(weights(model), after, before) < 1e-3


@TWO_FAMILIES
def test_a_sample_without_labels_adds_nothing(family: str) -> None:
    """Its micro-batch alone gives a loss of zero and no gradient, and it does not change the loss of its neighbours."""
    alone = SAMPLES[3]
    assert alone.answer == 0
    model = build(family).train()
    with attach(model):
        batch = collate(family, [alone])
        loss = model(**batch, num_items_in_batch=torch.tensor(7)).loss
        loss.backward()
        assert float(loss) == 0 and all(not w.grad.any() for w in model.parameters() if w.grad is not None)
        with torch.no_grad():
            with_it, without = (model(**collate(family, samples)).loss for samples in (SAMPLES[2:5], (SAMPLES[2], SAMPLES[4])))
        torch.testing.assert_close(with_it, without)


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@TWO_FAMILIES
def test_bf16_autocast_follows_the_loop(family: str, tmp_path: Path) -> None:
    exact, before, after_exact = reference(family)
    model = build(family).train()
    with attach(model) as handle:
        curve = plain_loop(model, handle, [[batch] for batch in batches(family, 2)], bf16)
    after = weights(model)
    model = build(family)
    with attach(model) as handle:
        run = trainer(model, family, tmp_path, bf16=True)
        run.train()
        assert handle.report().measured_mean == exact.measured[-1]
    assert losses(run) == pytest.approx(curve.losses, rel=1e-4)
    assert farthest(weights(model), after, before) < 1e-3
    assert all(w.dtype == torch.float32 for w in model.parameters())
    first, first_exact = losses(run)[0], exact.losses[0]
    assert 1e-4 < abs(first - first_exact) / first_exact < 0.03  # it was on, and it is rounding


@TWO_FAMILIES
def test_ranking_under_autocast(family: str) -> None:
    """Scores are float32 whatever trains around them, and the weights of a layer that ranks keep their gradients."""
    model = build(family).train()
    batch = collate(family, SAMPLES[:3])
    dtypes, cached = [], []

    def watch(module: nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled():  # ranking, not the layer's own pass
            cached.append(torch.is_autocast_cache_enabled())

    @dataclass(frozen=True)
    class Watching(Duet):
        def t2v(self, view: duet_vlm.TextView) -> torch.Tensor:
            dtypes.append(view.scores.dtype)
            probe = torch.eye(2) @ torch.eye(2)
            dtypes.append(probe.dtype)
            return super().t2v(view)

        def v2v(self, view: duet_vlm.VisionView) -> duet_vlm.Selection:
            dtypes.extend((view.importance.dtype, view.keys.dtype, (torch.eye(2) @ torch.eye(2)).dtype))
            return super().v2v(view)

    for layer in model.model.language_model.layers:
        layer.self_attn.k_proj.register_forward_pre_hook(watch)
    with duet_vlm.attach(model, Watching(), budget=BUDGET), bf16():
        model(**batch).loss.backward()
    assert len(dtypes) == 5 and set(dtypes) == {torch.float32}
    assert cached == [False]  # one stage ranks, the last one drops all that is left
    assert all(layer.self_attn.k_proj.weight.grad.any() for layer in model.model.language_model.layers)


@TWO_FAMILIES
def test_evaluation(family: str, tmp_path: Path) -> None:
    """The loss of an evaluation is that of a loop which learns nothing; the Trainer weighs every batch by its samples."""
    model = build(family)
    with attach(model) as handle:
        expected = plain_loop(model, handle, [[batch] for batch in batches(family, 2)], rate=0.0)
        run = trainer(model, family, tmp_path, per_device_eval_batch_size=2)
        found = run.evaluate()["eval_loss"]
    assert found == pytest.approx(sum(expected.losses) / len(expected.losses), rel=1e-4)
    assert abs(run.evaluate()["eval_loss"] - found) > 1e-2


class Killed(Exception):
    pass


@TWO_FAMILIES
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(family: str, tmp_path: Path) -> None:
    """Adam this time, so that the state of the optimizer matters; the first run is killed in the middle of step 3."""
    options: dict[str, Any] = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random"}
    whole = build(family)
    with attach(whole):
        complete = trainer(whole, family, tmp_path / "whole", **options)
        complete.train()
    model = build(family)
    with attach(model):
        run = trainer(model, family, tmp_path / "cut", **options)
        step, calls = run.training_step, []

        def killed(*args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append(None)
            if len(calls) == 3:
                raise Killed
            return step(*args, **kwargs)

        run.training_step = killed  # type: ignore[method-assign]
        with pytest.raises(Killed):
            run.train()
    last = tmp_path / "cut" / "checkpoint-2"
    # the Trainer alone would go on from the start weights: it reads a checkpoint's names as they are, and save_pretrained writes those of
    # the hub's files (huggingface/transformers#43701)
    model = type(model).from_pretrained(last)
    with attach(model):
        run = trainer(model, family, tmp_path / "cut", **options)
        run.train(resume_from_checkpoint=str(last))
    assert losses(run) == losses(complete)
    assert all(torch.equal(w, weights(whole)[name]) for name, w in weights(model).items())
