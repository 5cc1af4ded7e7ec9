"""Training with what people use (Trainer, TRL, PEFT, torch.compile): each run is compared with a loop written out by
hand."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from stock_trainer import losses, trainer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from training_data import (
    RATE,
    SAMPLES,
    Curve,
    batches,
    collate,
    farthest,
    plain_loop,
    targets_in,
    tokens_wanted,
    weights,
)
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

import duet_vlm
from duet_vlm.evaluation import tiny
from duet_vlm.methods.two_stage.duet import Duet

pytestmark = pytest.mark.train

BUDGET = 0.4
TWO_FAMILIES = pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])


def attach(model: nn.Module, **settings: Any) -> duet_vlm.Handle:
    return duet_vlm.attach(model, "duet", **{"budget": BUDGET} | settings)


@functools.lru_cache
def reference(
    family: str, size: int = 2, budget: float | None = BUDGET
) -> tuple[Curve, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Curve, weights before and weights after the plain loop; ``budget`` None is the untouched model."""
    model = build(family).train()
    before = weights(model)
    handle = None if budget is None else duet_vlm.attach(model, "duet", budget=budget)
    curve = plain_loop(model, handle, [[batch] for batch in batches(family, size)])
    return curve, before, weights(model)


@TWO_FAMILIES
def test_the_loop_saves_tokens_and_is_another_curve_than_the_full_model(family: str) -> None:
    """What the other tests lean on: the reference really reduces, to the budget, and the untouched model learns along
    another curve."""
    curve, before, after = reference(family)
    full, _, after_full = reference(family, budget=None)
    wanted = [tokens_wanted(family, SAMPLES[i : i + 2], BUDGET) for i in range(0, len(SAMPLES), 2)]
    for measured, most in zip(curve.measured, wanted, strict=True):
        assert most - 1.5 <= measured <= most
    assert all(abs(a - b) > 1e-3 for a, b in zip(curve.losses, full.losses, strict=True))
    assert farthest(after, after_full, before) > 0.05


@pytest.mark.parametrize(
    "checkpointing", [None, False, True], ids=["plain", "checkpointing", "checkpointing, reentrant"]
)
@TWO_FAMILIES
def test_trainer_follows_the_loop(family: str, checkpointing: bool | None, tmp_path: Path) -> None:
    curve, before, after = reference(family)
    model = build(family)
    options = (
        {}
        if checkpointing is None
        else {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    )
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
    """4 samples at once, or in micro-batches of which some have no image and one has no label: one loss per supervised
    token."""
    curve, before, after = reference("llava", size=4)
    model = build("llava")
    with attach(model):
        run = trainer(
            model, "llava", tmp_path, per_device_train_batch_size=micro, gradient_accumulation_steps=4 // micro
        )
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
            with_it, without = (
                model(**collate(family, samples)).loss for samples in (SAMPLES[2:5], (SAMPLES[2], SAMPLES[4]))
            )
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
        def prune_tokens(self, view: duet_vlm.DecoderView) -> torch.Tensor:
            dtypes.append(view.scores.dtype)
            probe = torch.eye(2) @ torch.eye(2)
            dtypes.append(probe.dtype)
            return super().prune_tokens(view)

        def select_tokens(self, view: duet_vlm.EncoderView) -> duet_vlm.Selection:
            dtypes.extend((view.importance.dtype, view.keys.dtype, (torch.eye(2) @ torch.eye(2)).dtype))
            return super().select_tokens(view)

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


@TWO_FAMILIES
def test_metrics_line_up_with_labels(family: str, tmp_path: Path) -> None:
    """compute_metrics gets full-length labels: with ``align=True`` the logits fit them, and say what the surviving rows
    say."""

    def likelihood(prediction: Any) -> dict[str, float]:
        # LLaVA adds its features
        scores = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        logits, labels = torch.tensor(scores)[:, :-1], torch.tensor(prediction.label_ids)[:, 1:]
        return {"nll": float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))}

    model = build(family)
    # the Trainer of transformers 5.19 would gather the cache, too, and cannot
    model.config.text_config.use_cache = False
    with attach(model) as handle:
        sums = [
            [plain_loop(model, handle, [[batch]], rate=0.0).losses[0] * targets_in(batch), targets_in(batch)]
            for batch in batches(family, 2)
        ]
    expected = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
    run = trainer(model, family, tmp_path, per_device_eval_batch_size=2)
    run.compute_metrics = likelihood
    with attach(model, align=True):
        found = run.evaluate()["eval_nll"]
    assert found == pytest.approx(expected, rel=1e-4)
    assert abs(run.evaluate()["eval_nll"] - expected) > 1e-2  # the untouched model


class Killed(Exception):
    pass


@TWO_FAMILIES
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(family: str, tmp_path: Path) -> None:
    """Adam this time, so that the state of the optimizer matters; the first run is killed in the middle of step 3."""
    options: dict[str, Any] = {
        "optim": "adamw_torch",
        "save_strategy": "steps",
        "save_steps": 2,
        "train_sampling_strategy": "random",
    }
    whole = build(family)
    with attach(whole):
        complete = trainer(whole, family, tmp_path / "whole", **options)
        complete.train()
    model = build(family)
    with attach(model) as handle:
        duet_vlm.save_to_config(handle)
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
    # the Trainer alone would go on from the start weights: it reads a checkpoint's names as they are, and
    # save_pretrained writes those of the hub's files (huggingface/transformers#43701)
    model = type(model).from_pretrained(last)
    with duet_vlm.attach(model) as handle:  # as the checkpoint remembers
        assert (handle.reducer.name, handle.budget) == ("duet", BUDGET)
        run = trainer(model, family, tmp_path / "cut", **options)
        run.train(resume_from_checkpoint=str(last))
    assert losses(run) == losses(complete)
    assert all(torch.equal(w, weights(whole)[name]) for name, w in weights(model).items())


# ---- TRL


def vision_rows() -> list[dict[str, Any]]:
    """Prompt-completion chats with 1, 0 and 2 pictures and, so that there is something to learn, the next sample's
    answer."""
    drawn = tiny.samples("train", 5)
    rows = []
    for number, pictures in enumerate((1, 0, 2, 1)):
        images = [sample.image for sample in drawn[number : number + pictures]]
        rows.append(
            {
                "prompt": [{"role": "user", "content": drawn[number].question}],
                "completion": [{"role": "assistant", "content": drawn[number + 1].answer}],
                "images": images,
            }
        )
    return rows


def sft(model: nn.Module, processor: Any, folder: Path, **changes: Any) -> Any:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "use_cpu": True, "bf16": False, "report_to": [], "max_length": None,
        "optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential",
        "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    options = {key: changes.pop(key) for key in ("peft_config",) if key in changes}
    return trl.SFTTrainer(
        model=model, args=trl.SFTConfig(output_dir=str(folder), **(settings | changes)), train_dataset=datasets.Dataset.from_list(vision_rows()),
        processing_class=processor, **options,
    )  # fmt: skip


def test_sft_trainer_follows_the_loop(tmp_path: Path) -> None:
    """TRL's fused head lines hidden rows up with labels itself, so it needs ``align=True``; the loop works on surviving
    rows."""
    model, processor = tiny.load()
    before = weights(model)
    with duet_vlm.attach(model, "duet", budget=64, align=True) as handle:
        run = sft(model, processor, tmp_path)
        steps = [[dict(batch)] for batch in run.get_train_dataloader()]
        run.train()
        measured = handle.report().measured_mean
    found = weights(model)
    labels = [row[row != -100].tolist() for (batch,) in steps for row in batch["labels"]]
    assert labels == [
        processor.tokenizer(row["completion"][0]["content"] + "</s>", add_special_tokens=False).input_ids
        for row in vision_rows()
    ]

    model, _ = tiny.load()
    with duet_vlm.attach(model.train(), "duet", budget=64) as handle:
        curve = plain_loop(model, handle, steps)
    assert losses(run) == pytest.approx(curve.losses, rel=1e-4)
    assert farthest(found, weights(model), before) < 1e-3
    # two samples with three pictures
    assert measured == curve.measured[-1] and 3 * 64 / 2 - 3 <= measured <= 3 * 64 / 2
    model, _ = tiny.load()
    full = plain_loop(model.train(), None, steps)
    assert all(abs(a / b - 1) > 3e-4 for a, b in zip(losses(run), full.losses, strict=True))  # the bound above is 1e-4


# ---- PEFT

RANK, SCALE = 4, 2.0
PROJECTIONS = r".*language_model.*(q|k|v|o|gate|up|down)_proj"


def lora(model: nn.Module, **changes: Any) -> Any:
    """LoRA on all decoder projections; B is not zero, so that the adapters matter from the first step."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=SCALE * RANK, target_modules=PROJECTIONS, init_lora_weights=False, **changes
    )
    return peft.get_peft_model(model, config)


def with_lora(core: nn.Module, order: str, **changes: Any) -> tuple[Any, duet_vlm.Handle]:
    if order == "attach first":
        handle = attach(core)
        return lora(core, **changes), handle
    model = lora(core, **changes)
    return model, attach(model)


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: w.detach().clone() for name, w in model.named_parameters() if w.requires_grad}


def merged_by_hand(family: str, trained: dict[str, torch.Tensor]) -> nn.Module:
    """A plain model with W + scale * B A in place of every adapted weight."""
    model = build(family)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.default.weight" in trained:
                weight += SCALE * trained[f"{stem}.lora_B.default.weight"] @ trained[f"{stem}.lora_A.default.weight"]
    return model


ORDERS = pytest.mark.parametrize("order", ["lora first", "attach first"])


@ORDERS
@TWO_FAMILIES
def test_lora_gradients(family: str, order: str) -> None:
    """Loss and gradients of the adapters follow from those of a plain reduced model with the merged weights."""
    batch = collate(family, SAMPLES[:3])
    model, handle = with_lora(build(family), order)
    trained = adapters(model)
    loss = model.train()(**batch).loss
    loss.backward()
    kept = handle.trace
    handle.detach()
    plain = merged_by_hand(family, trained).train()
    with attach(plain) as handle:
        expected = plain(**batch).loss
        assert handle.trace == kept
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    outer = {name: w.grad for name, w in plain.named_parameters() if w.grad is not None}
    largest = max(float(grad.norm()) for grad in outer.values())
    found = dict(model.named_parameters())
    for name in [n for n in trained if "lora_A" in n]:
        other = name.replace("lora_A", "lora_B")
        grad = SCALE * outer[name.removeprefix("base_model.model.").replace(".lora_A.default", "")]
        for weight, wanted in ((found[name], trained[other].T @ grad), (found[other], grad @ trained[name].T)):
            assert float((weight.grad - wanted).norm()) <= 1e-3 * float(wanted.norm()) + 1e-6 * largest, name
    assert all(w.grad is None for name, w in found.items() if "lora" not in name)


@pytest.mark.parametrize("order", ["lora first", pytest.param("attach first", marks=pytest.mark.slow)])
def test_lora_through_the_trainer_is_saved_loaded_and_merged(order: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    core = build("llava")
    before = weights(core)
    model, handle = with_lora(core, order)
    start = adapters(model)
    run = trainer(model, "llava", tmp_path)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    after = adapters(model)
    batch = collate("llava", SAMPLES[:3])
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    handle.detach()

    twin = lora(build("llava")).train()
    with attach(twin) as handle:
        curve = plain_loop(twin, handle, [[batch] for batch in batches("llava", 2)])
    assert losses(run) == pytest.approx(curve.losses, rel=1e-4)
    assert farthest(after, adapters(twin), start) < 1e-3
    base = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): w
        for name, w in model.named_parameters()
        if "lora" not in name
    }
    assert all(torch.equal(base[name], w) for name, w in before.items())

    assert {path.name for path in (tmp_path / "saved").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = peft.PeftModel.from_pretrained(build("llava"), tmp_path / "saved").eval()
    merged, by_hand = model.merge_and_unload(), merged_by_hand("llava", after)
    for other, exact in ((loaded, True), (merged, False), (by_hand, False)):
        with attach(other.eval()), torch.no_grad():
            torch.testing.assert_close(
                other(**batch).logits, logits, **({"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 1e-3})
            )
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, by_hand(**batch).logits, rtol=1e-3, atol=1e-3)


def test_projector_trained_in_full_beside_lora() -> None:
    """modules_to_save copies the projector: attached afterwards the copy is reduced and trained; attached before, the
    copy is refused."""
    core = build("llava")
    model = lora(core, modules_to_save=["multi_modal_projector"]).train()
    batch = collate("llava", SAMPLES[:3])
    with attach(model) as handle:
        loss = model(**batch).loss
        loss.backward()
        kept = handle.report().measured_mean
    trained = [
        name
        for name, w in model.named_parameters()
        if "modules_to_save" in name and w.grad is not None and w.grad.any()
    ]
    assert len(trained) == 4
    plain = lora(build("llava")).train()
    with attach(plain) as handle:
        torch.testing.assert_close(plain(**batch).loss, loss)  # the copy starts as the original
        assert kept == handle.report().measured_mean
    with attach(core := build("llava")), pytest.raises(TypeError, match=r"detach\(\) first"):
        lora(core, modules_to_save=["multi_modal_projector"])


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_frozen_bf16_base(family: str, tmp_path: Path) -> None:
    """QLoRA's set-up without its 4-bit weights: a frozen base in bf16, adapters in float32, autocast, re-entrant
    checkpointing of layers whose inputs are made to require gradients. The same run without checkpointing is the
    reference, one at another budget the control."""
    results = []
    for checkpointing, budget in ((False, BUDGET), (True, BUDGET), (False, 0.2)):
        core = build(family, dtype=torch.bfloat16)
        before = weights(core)
        model = lora(core)
        start = adapters(model)
        assert {w.dtype for w in start.values()} == {torch.float32}
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        with attach(model.train(), budget=budget) as handle:
            if checkpointing:
                run = trainer(model, family, tmp_path, bf16=True)
                run.train()
                curve = Curve(losses(run), [handle.report().measured_mean])
            else:
                curve = plain_loop(model, handle, [[batch] for batch in batches(family, 2)], bf16)
        results.append((curve, adapters(model)))
        base = {
            name.replace("base_model.model.", "").replace(".base_layer", ""): w
            for name, w in model.named_parameters()
            if "lora" not in name
        }
        assert all(torch.equal(base[name], w) for name, w in before.items())
    (curve, after), (checkpointed, after_checkpointed), (_, other) = results
    assert checkpointed.losses == pytest.approx(curve.losses, rel=5e-3)  # bf16 rounds differently in a recomputed layer
    assert checkpointed.measured[-1] == curve.measured[-1]
    # bf16 kernels differ from processor to processor
    assert farthest(after_checkpointed, after, start) < 0.3 < farthest(other, after, start)


def test_qlora_with_four_bit_weights(tmp_path: Path) -> None:
    """NF4 weights by bitsandbytes, PEFT's own preparation; the reference is a plain model with the dequantised weights,
    merged by hand."""
    bitsandbytes, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    build("llava").save_pretrained(tmp_path)
    quantized = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        dtype=torch.float32, device_map="cpu",
    )  # fmt: skip
    model = lora(peft.prepare_model_for_kbit_training(quantized, use_gradient_checkpointing=True)).train()
    batch = collate("llava", SAMPLES[:3])
    with attach(model) as handle:
        loss = model(**batch).loss
        loss.backward()
        kept = handle.trace
    plain = merged_by_hand("llava", adapters(model))
    exact = build("llava")
    count = 0
    with torch.no_grad():
        for name, module in model.get_base_model().named_modules():
            layer = getattr(module, "base_layer", module)
            if isinstance(layer, bitsandbytes.nn.Linear4bit) and not name.endswith("base_layer"):
                was = exact.get_submodule(name).weight
                plain.get_submodule(name).weight += (
                    bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state) - was
                )
                count += 1
    assert count > 50
    with attach(plain.train()) as handle, torch.no_grad():
        torch.testing.assert_close(loss, plain(**batch).loss, rtol=1e-4, atol=1e-5)
        assert handle.trace == kept
    assert all(
        w.grad is not None and w.grad.any()
        for name, w in model.named_parameters()
        if "lora" in name and "layers.7.self_attn.q" not in name
    )


# ---- torch.compile


def compiled_layers(family: str, backend: str, order: str) -> None:
    """Decoder layers compiled one by one, ``layer.forward = torch.compile(layer.forward)``: hooks stay outside of the
    graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    steps = [[batch] for batch in batches(family, 2)]
    curve, before, after = reference(family)
    model = build(family).train()
    model.config.text_config.use_cache = False  # a cache knows layers by number: a graph for each, in stock models too
    handle = attach(model) if order == "attach first" else None
    for layer in model.model.language_model.layers:
        # a graph break or too many graphs would raise
        layer.forward = torch.compile(layer.forward, backend=counter, fullgraph=True)
    handle = handle or attach(model)
    found = plain_loop(model, handle, steps[:1])
    graphs = counter.frame_count
    rest = plain_loop(model, handle, steps[1:])
    assert found.losses + rest.losses == pytest.approx(curve.losses, rel=1e-4)
    assert farthest(weights(model), after, before) < 1e-3
    assert (found.measured + rest.measured) == curve.measured
    # rows differ from layer to layer and from batch to batch: sizes are symbols
    assert 1 <= graphs <= 4 and counter.frame_count == graphs
    with torch.no_grad():  # where layers that rank would hand their keys on, were they not compiled
        model.eval()
        compiled = model(**steps[0][0]).logits
        graphs = counter.frame_count - graphs
        for layer in model.model.language_model.layers:
            del layer.forward
        torch.testing.assert_close(compiled, model(**steps[0][0]).logits, rtol=1e-4, atol=1e-4)
    assert graphs <= 4
    handle.detach()
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_layers() -> None:
    compiled_layers("llava", "aot_eager", "attach first")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("order", ["attach first", "compile first"])
@TWO_FAMILIES
def test_compiled_layers_in_every_way(family: str, backend: str, order: str) -> None:
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    compiled_layers(family, backend, order)
