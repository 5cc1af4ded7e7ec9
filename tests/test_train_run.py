"""Training runs from settings: what learns, what is saved, what a kill costs. On a small random LLaVA with real files."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import llava, randomise
from PIL import Image
from safetensors.torch import load_file
from test_train_data import ID, IMAGE, LLAVA, chat, text, tokenizer
from torch import Tensor
from transformers import CLIPImageProcessor, LlavaProcessor, TrainerCallback
from typer.testing import CliRunner

import duet_vlm
from duet_vlm.api.loading import load
from duet_vlm.cli.main import app
from duet_vlm.reducers.compressor import BESIDE
from duet_vlm.train import resume
from duet_vlm.train.callbacks import budget_at
from duet_vlm.train.run import build, train
from duet_vlm.train.settings import TrainSettings

QUESTIONS = ("what is it ?", "and then ?", "what ?", "is it a cat ?")
ANSWERS = ("a red cat", "blue", "it is red and blue", ".")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random LLaVA (16 visual tokens per image), and beside it data.json and its pictures."""
    home = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)  # the same model whichever tests came before
    model = llava(4, 4)
    model.config.image_token_id = model.config.image_token_index = ID["<image>"]
    model.config.text_config.pad_token_id, model.generation_config.eos_token_id = ID["<pad>"], ID["<eos>"]
    randomise(model).save_pretrained(home / "model")
    images = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    words = tokenizer("<eos>", "<image>")
    processor = LlavaProcessor(images, words, patch_size=14, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, chat_template=LLAVA)  # fmt: skip
    processor.save_pretrained(home / "model")
    draw = random.Random(0)
    rows = []
    for number in range(24):
        Image.effect_noise((56, 56), draw.uniform(20, 90)).convert("RGB").save(home / f"{number}.png")
        turns: list[tuple[str, Any]] = [
            ("user", [IMAGE, text(draw.choice(QUESTIONS))]),
            ("assistant", draw.choice(ANSWERS)),
        ]
        if number % 4 == 1:
            turns += [("user", draw.choice(QUESTIONS)), ("assistant", draw.choice(ANSWERS))]
        if number % 6 == 2:  # no image
            turns[0] = ("user", draw.choice(QUESTIONS))
        rows.append(chat(*turns) | ({} if number % 6 == 2 else {"images": [f"{number}.png"]}))
    rows[5] = chat(("user", [IMAGE, text("what ?")]), images=["5.png"])  # no answer
    (home / "data.json").write_text(json.dumps(rows))
    return home


def settings(start: Path, out: Path, **changes: Any) -> TrainSettings:
    trainer = {
        "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 1e-3, "use_cpu": True, "logging_steps": 1, "save_steps": 2,
    } | changes.pop("trainer", {})  # fmt: skip
    defaults = {"model": str(start / "model"), "data": (str(start / "data.json"),), "method": "duet", "budget": 0.5}
    return TrainSettings(**{**defaults, **changes, "out": str(out), "trainer": trainer})


def log(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "trainer_state.json").read_text())["log_history"]


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """The parts of a LLaVA whose weights are others."""
    assert before.keys() == after.keys()
    parts = ("vision_tower", "multi_modal_projector", "language_model", "lm_head")
    names = [name for name in before if not torch.equal(before[name], after[name])]
    return {part for name in names for part in parts if part in name}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


# ---- what learns and what is saved


@pytest.mark.parametrize(
    ("choice", "learned"),
    [
        ({"tune": "full"}, {"multi_modal_projector", "language_model", "lm_head"}),
        (
            {"tune": "full", "train_vision": True},
            {"vision_tower", "multi_modal_projector", "language_model", "lm_head"},
        ),
        ({"tune": "projector", "prompts": "plain"}, {"multi_modal_projector"}),
    ],
)
def test_what_learns_is_saved_with_processor_and_reduction(
    choice: dict[str, Any], learned: set[str], start: Path, tmp_path: Path
) -> None:
    out = train(settings(start, tmp_path, settings={"schedule": ((2, 0.5), (5, 0.25))}, budget=None, **choice))
    assert changed(weights(start / "model"), weights(out)) == learned
    loaded = load(str(out))
    assert all(weight.dtype == torch.float32 for weight in loaded.model.parameters())
    assert duet_vlm.load_from_config(out) == {
        "method": "duet",
        "budget": None,
        "settings": {"schedule": ((2, 0.5), (5, 0.25))},
    }
    with duet_vlm.attach(loaded.model) as handle:  # no method named
        assert handle.reducer == duet_vlm.get_method("duet")(schedule=((2, 0.5), (5, 0.25)))
    inputs = loaded.inputs([Image.open(start / "0.png")], "what is it ?")
    assert int((inputs["input_ids"] == ID["<image>"]).sum()) == 16
    losses = [entry["loss"] for entry in log(out) if "loss" in entry]
    assert len(losses) == 6 and all(0 < loss < 20 for loss in losses)


FRESH = """
import sys, torch
from PIL import Image
from duet_vlm.api.loading import load
picture, out, *folders = sys.argv[1:]
found = []
for folder in folders:
    loaded = load(folder)
    inputs = loaded.inputs([Image.open(picture)], "what is it ?")
    with torch.no_grad():
        found.append({"logits": loaded.model(**inputs).logits, "reduction": loaded.model.config.duet_vlm})
torch.save(found, out)
"""


@pytest.mark.slow
def test_adapters_and_projector_come_back_in_another_process(start: Path, tmp_path: Path) -> None:
    chosen = settings(start, tmp_path / "out", tune="lora", lora={"r": 4, "lora_alpha": 16}, projector_lr=1e-2)
    resume.begin(chosen, restart=False)  # as train() does
    trainer, handle = build(chosen)
    projector = handle.adapter.projector().modules_to_save.default
    rates = {id(weight): group["lr"] for group in trainer.create_optimizer().param_groups for weight in group["params"]}
    ours = {id(weight) for weight in projector.parameters()}
    assert {rates[i] for i in ours} == {1e-2} and {rate for i, rate in rates.items() if i not in ours} == {1e-3}
    assert set(rates) == {id(weight) for weight in trainer.model.parameters() if weight.requires_grad}
    before = {name: weight.clone() for name, weight in projector.named_parameters()}
    with handle:
        trainer.train()
        assert all(
            not torch.equal(before[name], weight) for name, weight in projector.named_parameters() if "weight" in name
        )
        loaded = load(chosen.model)
        inputs = loaded.inputs([Image.open(start / "0.png")], "what is it ?")
        with handle.paused(), torch.no_grad():
            expected = trainer.model.eval()(**inputs).logits
        with torch.no_grad():
            assert not torch.allclose(loaded.model(**inputs).logits, expected, atol=1e-2)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    folders = (tmp_path / "out" / "checkpoint-6", folder := train(chosen))  # train: the last checkpoint is the end
    subprocess.run([sys.executable, "-c", FRESH, start / "0.png", tmp_path / "logits", *folders], check=True)
    for found in torch.load(tmp_path / "logits"):
        assert torch.allclose(found["logits"], expected, atol=1e-4)
        assert found["reduction"] == {"method": "duet", "budget": 0.5, "settings": {}}
    (folder / "config.json").unlink()  # adapters as PEFT alone saves them
    (folder / "tokenizer_config.json").unlink()
    assert load(str(folder)).model.config.model_type == "llava"
    with pytest.raises(ValueError, match="model: .* holds adapters; new ones need a whole model under them"):
        build(settings(start, tmp_path / "again", model=str(folder), tune="lora"))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(
        ValueError, match="cannot be loaded from this folder: adapters are read from adapter_model.safetensors only"
    ):
        load(str(folder))


def test_frozen_weights_in_bfloat16_compute_what_float32_does(start: Path, tmp_path: Path) -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        out = tmp_path / precision
        chosen = settings(
            start,
            out,
            tune="projector",
            frozen_dtype=precision,
            trainer={"bf16": True, "max_steps": 2, "learning_rate": 1e-4},
        )
        trainer, handle = build(chosen)
        handle.detach()
        kinds = {weight.requires_grad: weight.dtype for weight in trainer.model.parameters()}
        assert kinds == {True: torch.float32, False: getattr(torch, precision)}
        train(chosen)
        losses.append([entry["loss"] for entry in log(out) if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=0.04)  # random weights are large, and so is their rounding


# ---- kills


class Killed(TrainerCallback):
    """Stands for a kill after a step: nothing after it happens."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def killed_after(step: int, chosen: TrainSettings) -> None:
    resume.begin(chosen, restart=False)  # as train() does
    trainer, handle = build(chosen)
    trainer.add_callback(Killed(step))
    with handle, pytest.raises(KeyboardInterrupt):
        trainer.train()


# dropout, data order and budgets draw
MIXED = {"tune": "lora", "lora": {"r": 4, "lora_dropout": 0.2}, "budget": (0.9, 0.25, 0.5)}


@pytest.fixture(scope="module")
def uninterrupted(start: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = train(settings(start, tmp_path_factory.mktemp("whole"), **MIXED))
    return (out / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.train
def test_a_real_kill_costs_nothing_but_time(start: Path, uninterrupted: bytes, tmp_path: Path) -> None:
    chosen = settings(start, tmp_path / "out", **MIXED)
    (tmp_path / "run.yaml").write_text(json.dumps(chosen.to_dict()))
    slow = "import time, torch\nstep = torch.optim.AdamW.step\ntorch.optim.AdamW.step = lambda *a, **k: (time.sleep(.5), step(*a, **k))[1]\n"
    slow += "from duet_vlm.cli.main import app\napp()"  # slow, so that the kill comes in the middle
    command = [sys.executable, "-c", slow, "train", "--config", str(tmp_path / "run.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").exists():
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL and not resume.finished(tmp_path / "out")
    second = CliRunner().invoke(app, command[3:])
    assert second.exit_code == 0, second.stderr
    assert (
        f"trained: {tmp_path / 'out'}" in second.stdout
        and "step 1 of 6" not in second.stdout
        and "step 6 of 6" in second.stdout
    )
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == uninterrupted


@pytest.mark.parametrize("tune", ["full", "projector"])
def test_a_whole_model_goes_on_from_its_checkpoint(start: Path, tmp_path: Path, tune: str) -> None:
    """The stock Trainer would go on from the weights it was given: it does not know the key names that it saved."""
    chosen = {
        name: settings(start, tmp_path / name, tune=tune, budget=(0.9, 0.25, 0.5)) for name in ("whole", "killed")
    }
    train(chosen["whole"])
    killed_after(5, chosen["killed"])
    train(chosen["killed"])
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in chosen)
    assert whole.keys() == killed.keys() and all(torch.equal(whole[key], killed[key]) for key in whole)


WITH_WEIGHTS = ("quecc", "resampler", "vqtoken")


OTHERS_TUNED = [
    pytest.param(*cell, marks=pytest.mark.slow)
    for cell in (("quecc", "full"), ("vqtoken", "full"), ("quecc", "projector"))
]


@pytest.mark.parametrize(("method", "tune"), [("resampler", "full"), ("resampler", "lora"), *OTHERS_TUNED])
def test_a_methods_own_weights_learn_and_stay_beside_the_model(
    method: str, tune: str, start: Path, tmp_path: Path
) -> None:
    """And a run that was killed goes on with them: the same files as without the kill."""
    more: dict[str, Any] = {
        "tune": tune,
        "method": method,
        "budget": (0.9, 0.25, 0.5),
        "lora": {"r": 4} if tune == "lora" else {},
    }
    chosen = {name: settings(start, tmp_path / name, **more) for name in ("whole", "killed")}
    out = train(chosen["whole"])
    killed_after(5, chosen["killed"])
    train(chosen["killed"])
    learned = load_file(out / BESIDE)
    assert (out / BESIDE).read_bytes() == (tmp_path / "killed" / BESIDE).read_bytes()
    loaded = load(str(out))
    with duet_vlm.attach(loaded.model, method, budget=0.5) as handle:
        new = handle.module.state_dict()  # type: ignore[union-attr]
    assert (
        learned.keys() == new.keys()
        and sum(not torch.equal(learned[name], new[name]) for name in new) > 0.9 * len(new) - 2
    )
    assert duet_vlm.load_from_config(out) == {
        "method": method,
        "budget": 0.5,
        "settings": {"weights": str(out / BESIDE)},
    }
    with duet_vlm.attach(loaded.model) as handle:  # no method named
        assert all(torch.equal(weight, learned[name]) for name, weight in handle.module.state_dict().items())  # type: ignore[union-attr]
    assert (
        duet_vlm.attach(
            loaded.model, method, budget=0.5, weights=str(tmp_path / "killed" / "checkpoint-6" / BESIDE)
        ).module
        is not None
    )
    assert not [key for file in out.glob("*model*.safetensors") for key in load_file(file) if "duet_vlm" in key]


@pytest.mark.parametrize(
    "method", ["quecc", *(pytest.param(method, marks=pytest.mark.slow) for method in ("resampler", "vqtoken"))]
)
def test_a_new_module_imitates_means_first(method: str, start: Path, tmp_path: Path) -> None:
    """Nothing else learns meanwhile, and a run that goes on from a checkpoint does not begin so again."""
    more: dict[str, Any] = {
        "method": method,
        "budget": 4,
        "settings": {"form": "code", "heads": 4} if method == "vqtoken" else {},
    }
    rows: dict[int, Tensor] = {}
    for steps in (0, 40):
        chosen = settings(start, tmp_path / str(steps), imitate=steps, tune="projector", **more)
        trainer, handle = build(chosen)
        batch = {
            name: value
            for name, value in next(iter(trainer.get_eval_dataloader(trainer.train_dataset))).items()
            if name != "labels"
        }
        with handle, torch.no_grad():
            made = []
            handle.module.register_forward_hook(
                lambda module, args, out, made=made: made.append((args[0].float(), out.float()))
            )  # type: ignore[union-attr]
            trainer.model(**batch)
            plain = {key: weight for key, weight in trainer.model.state_dict().items()}
        assert all(
            torch.equal(weight, plain[key]) for key, weight in load(str(start / "model")).model.state_dict().items()
        )
        assert all(weight.grad is None for weight in trainer.model.parameters())
        (features, out), _ = made[0], rows.setdefault(steps, made[0][1])
        if method != "vqtoken":  # 4 x 4 tokens in windows of 2 x 2
            mean = features.view(-1, 2, 2, 2, 2, features.shape[-1]).mean((2, 4)).flatten(1, 2)
            rows[steps] = (out - mean).square().mean() / mean.var((0, 1)).mean()
    if method == "vqtoken":
        assert not torch.equal(rows[0], rows[40])
    else:
        assert rows[40] < 0.5 * rows[0]
    killed_after(5, chosen)
    first = load_file(tmp_path / "40" / "checkpoint-4" / BESIDE)
    _, handle = build(chosen, tmp_path / "40" / "checkpoint-4")
    with handle:
        assert all(torch.equal(weight, first[name]) for name, weight in handle.module.state_dict().items())  # type: ignore[union-attr]


def test_who_cannot_imitate_is_told(start: Path, tmp_path: Path) -> None:
    for changes, said in (
        ({"method": "duet"}, "imitate: 3: duet has no module"),
        ({"method": "vqtoken", "settings": {"form": "codebook"}}, "imitate: 3: the module of vqtoken has no weights"),
        ({"method": "quecc", "settings": {"weights": "some.safetensors"}}, "leave one of them out"),
        ({"method": "quecc", "imitate": -1}, "imitate: -1: a whole number of steps"),
    ):
        with pytest.raises(ValueError, match=said):
            build(settings(start, tmp_path, **{"imitate": 3, **changes}))


@pytest.mark.parametrize(
    "method",
    ["vqtoken", "adsc", *(pytest.param(method, marks=pytest.mark.slow) for method in ("quecc", "resampler", "pool"))],
)
def test_budgets_fall_and_mix_for_methods_that_are_trained(method: str, start: Path, tmp_path: Path) -> None:
    """One module serves every number of rows; ADSC's strides follow the budget."""
    trainer, handle = build(
        settings(
            start,
            tmp_path / "falls",
            method=method,
            budget=0.5,
            anneal_from=1.0,
            anneal_until=0.5,
            limit=2,
            trainer={"max_steps": 8},
        )
    )
    watch = Watch(handle)
    trainer.add_callback(watch)
    with handle:
        trainer.train()
    assert [budget for budget, _ in watch.steps] == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5, 0.5, 0.5, 0.5])
    assert [mean for _, mean in watch.steps] == pytest.approx([16, 14, 12, 10, 8, 8, 8, 8], abs=1)
    assert all(0 < entry["loss"] < 20 for entry in trainer.state.log_history if "loss" in entry)
    mixed = (1.0, 0.4, 0.75)
    trainer, handle = build(
        settings(start, tmp_path / "mixes", method=method, budget=mixed, limit=2, trainer={"max_steps": 8})
    )
    trainer.add_callback(watch := Watch(handle))
    with handle:
        trainer.train()
    assert {budget for budget, _ in watch.steps} == set(mixed)
    assert all(budget * 16 - 1 < mean <= budget * 16 + 1e-9 for budget, mean in watch.steps)


def test_a_damaged_checkpoint_is_passed_over(start: Path, uninterrupted: bytes, tmp_path: Path) -> None:
    chosen = settings(start, tmp_path, **MIXED)
    killed_after(5, chosen)
    assert resume.last_whole(tmp_path) == tmp_path / "checkpoint-4"
    for name in ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"):
        file = tmp_path / "checkpoint-4" / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.warns(UserWarning, match=f"checkpoint-4 is damaged .*{name}.*going on from what was there"):
            assert resume.last_whole(tmp_path) == tmp_path / "checkpoint-2"
        file.write_bytes(whole)
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()  # killed while it was written
    with pytest.warns(UserWarning, match="checkpoint-4 is damaged"):
        train(chosen)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == uninterrupted


def test_no_readable_checkpoint_is_an_error(start: Path, tmp_path: Path) -> None:
    resume.begin(settings(start, tmp_path), restart=False)
    (tmp_path / "checkpoint-2").mkdir()
    # a kill while the first checkpoint was written: nothing is lost
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("")
    with pytest.warns(UserWarning, match="checkpoint-2 is damaged"):
        assert resume.last_whole(tmp_path) is None
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_text("half")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"none of its checkpoints can be read \(checkpoint-2\): --restart begins"),
    ):
        train(settings(start, tmp_path))


def test_a_finished_run_is_left_alone_and_another_one_refused(start: Path, tmp_path: Path) -> None:
    chosen = settings(start, tmp_path, trainer={"max_steps": 2})
    train(chosen)
    written = (tmp_path / "model.safetensors").stat().st_mtime_ns
    train(chosen)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == written
    other = settings(start, tmp_path, budget=0.25, trainer={"max_steps": 2, "learning_rate": 2e-3})
    with pytest.raises(
        ValueError,
        match=r"holds a run with other settings \(budget, trainer.learning_rate\): choose another --out, or --restart",
    ):
        train(other)
    (tmp_path / "mine.txt").write_text("not from training")
    train(other, restart=True)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns > written and (tmp_path / "mine.txt").exists()
    assert duet_vlm.load_from_config(tmp_path)["budget"] == 0.25


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("left", ["checkpoint-4", "trainer_state.json"])
@pytest.mark.parametrize("beside", [None, "learning_rate: 1\n", "no mapping"])
def test_a_training_that_is_not_ours_is_neither_deleted_nor_gone_on_from(
    left: str, restart: bool, beside: str | None, start: Path, tmp_path: Path
) -> None:
    """Checkpoints of transformers' Trainer have the same names."""
    before = train(settings(start, tmp_path / "theirs", trainer={"max_steps": 4}))
    (before / "train.yaml").unlink()
    for gone in before.iterdir():
        if gone.name.startswith(("checkpoint-", "trainer_state")) and gone.name != left:
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    if beside is not None:
        (before / "train.yaml").write_text(beside)
    held = {file: file.read_bytes() for file in before.rglob("*") if file.is_file()}
    with pytest.raises(
        ValueError, match=f"theirs holds {left}, and no train.yaml of duet-vlm train: .* Choose another --out"
    ):
        train(settings(start, before, budget=0.25, trainer={"max_steps": 5}), restart=restart)
    assert {file: file.read_bytes() for file in before.rglob("*") if file.is_file()} == held


@pytest.mark.parametrize("what", ["conversations", "image", "held out"])
def test_a_run_does_not_go_on_with_other_data(what: str, start: Path, tmp_path: Path) -> None:
    """Nor is it finished already; as they were, it is."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for number in range(24):
        shutil.copy(start / f"{number}.png", data)
    rows = json.loads((start / "data.json").read_text())
    (data / "data.json").write_text(json.dumps(rows))
    (data / "held.json").write_text(json.dumps(rows[:4]))
    held = {"eval_data": (str(data / "held.json"),), "trainer": {"max_steps": 2, "eval_strategy": "no"}}
    chosen = settings(start, out, data=(str(data / "data.json"),), **held)
    train(chosen)

    def change(back: bool = False) -> None:
        if what == "image":
            shutil.copy(start / ("3.png" if back else "4.png"), data / "3.png")
        else:
            changed_ = rows[:4] if what == "held out" else rows[:]
            if not back:
                changed_[0] = chat(("user", [IMAGE, text("what ?")]), ("assistant", "a"), images=["0.png"])
            (data / ("held.json" if what == "held out" else "data.json")).write_text(json.dumps(changed_))

    for unfinished in (False, True):
        change()
        with pytest.raises(
            ValueError, match="conversations or images have changed since; choose another --out, or --restart"
        ):
            train(chosen)
        change(back=True)
        train(chosen)
        if not unfinished:
            (out / "trainer_state.json").unlink()  # as if killed after the last checkpoint
    change()
    train(chosen, restart=True)
    train(chosen)


# ---- the best of a run


@pytest.mark.parametrize(
    ("method", "tune"), [("duet", "full"), ("quecc", "full"), ("quecc", "lora"), ("duet", "projector")]
)
def test_the_best_model_is_loaded_whole(method: str, tune: str, start: Path, tmp_path: Path) -> None:
    """A learning rate so high that held-out answers are lost: what is saved at the end is the best checkpoint, in every
    file. A projector alone learns at that rate: there the best is called the worst."""
    better = max if tune == "projector" else min
    often = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "max_steps": 4,
        "save_total_limit": 10,
        "lr_scheduler_type": "constant",
    }
    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": better is max,
        "learning_rate": 0.3,
    }
    held_out: dict[str, Any] = {
        "eval_data": (str(start / "data.json"),),
        "eval_limit": 8,
        "tune": tune,
        "method": method,
    }
    out = train(settings(start, tmp_path, trainer=often | best, lora={"r": 4} if tune == "lora" else {}, **held_out))
    losses = [entry["eval_loss"] for entry in log(out) if "eval_loss" in entry]
    chosen = out / f"checkpoint-{losses.index(better(losses)) + 1}"
    assert better(losses) != losses[-1] and len(losses) == 4
    files = {file.name for file in out.glob("*.safetensors")}
    assert (BESIDE in files) == (method == "quecc") and files - {BESIDE} == {
        "adapter_model.safetensors" if tune == "lora" else "model.safetensors"
    }
    for name in files:
        ours, theirs, last = load_file(out / name), load_file(chosen / name), load_file(out / "checkpoint-4" / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(weight, theirs[key]) for key, weight in ours.items()), (
            name
        )
        assert any(not torch.equal(weight, last[key]) for key, weight in ours.items()), name


# ---- budgets, evaluation, loss


class Watch(TrainerCallback):
    """The budget in force at every optimiser step and evaluation."""

    def __init__(self, handle: duet_vlm.Handle) -> None:
        self.handle, self.steps, self.evaluations = handle, [], []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append((self.handle.budget, self.handle.report().nominal_mean))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluations.append(self.handle.budget)


def test_annealing_falls_in_a_straight_line_and_evaluation_is_at_the_end(start: Path, tmp_path: Path) -> None:
    held_out = {"eval_data": (str(start / "data.json"),), "eval_limit": 4}
    often = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 2}
    # an image each
    chosen = settings(
        start, tmp_path, budget=0.5, anneal_from=1.0, anneal_until=0.5, limit=2, trainer=often, **held_out
    )
    trainer, handle = build(chosen)
    watch = Watch(handle)
    trainer.add_callback(watch)
    with handle:
        trainer.train()
    assert [budget for budget, _ in watch.steps] == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5, 0.5, 0.5, 0.5])
    assert [mean for _, mean in watch.steps] == pytest.approx([16, 14, 12, 10, 8, 8, 8, 8], abs=1)
    assert watch.evaluations == [0.5] * 4
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 4


def test_mixed_budgets_depend_on_step_and_seed_only(start: Path, tmp_path: Path) -> None:
    chosen = settings(start, tmp_path, budget=(0.9, 0.25, 0.5))
    drawn = [budget_at(chosen, step, 300, seed=1) for step in range(300)]
    random.random()
    assert drawn == [budget_at(chosen, step, 999, seed=1) for step in range(300)]
    assert all(60 < drawn.count(budget) < 140 for budget in (0.9, 0.25, 0.5))
    assert drawn != [budget_at(chosen, step, 300, seed=2) for step in range(300)]
    trainer, handle = build(chosen)
    with handle:
        assert duet_vlm.load_from_config(trainer.model) is None and handle.budget == 0.5


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_without_any_answer_teaches_nothing(accumulate: int, start: Path, tmp_path: Path) -> None:
    rows = json.loads((start / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps([rows[5], rows[0]] * 2))
    options = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulate,
        "train_sampling_strategy": "sequential",
    }
    # the Trainer logs 0 for a loss that is no number
    options |= {"logging_nan_inf_filter": False, "per_device_eval_batch_size": 1}
    source = (str(tmp_path / "data.json"),)
    out = train(settings(start, tmp_path / "out", data=source, eval_data=source, images=str(start), trainer=options))
    assert 0 < log(out)[-2]["eval_loss"] < 20
    losses = [entry["loss"] for entry in log(out) if "loss" in entry]
    assert [loss == 0 for loss in losses] == ([True, False] * 2 if accumulate == 1 else [False, False])
    after = weights(out)
    assert all(bool(weight.isfinite().all()) for weight in after.values()) and changed(weights(start / "model"), after)


@pytest.mark.parametrize("method", ["none", "duet"])
def test_the_held_out_loss_is_the_mean_over_answer_tokens(method: str, start: Path, tmp_path: Path) -> None:
    """In whatever batches the rows come, those without answers among them."""
    rows = json.loads((start / "data.json").read_text())[:7] + [json.loads((start / "data.json").read_text())[5]] * 4
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    source, losses = (str(tmp_path / "rows.json"),), []
    budget = None if method == "none" else 0.5
    for size in (1, 2, 4, 16):
        options = {"per_device_eval_batch_size": size, "max_steps": 1, "save_strategy": "no"}
        chosen = settings(
            start, tmp_path / "out", eval_data=source, images=str(start), method=method, budget=budget, trainer=options
        )
        trainer, handle = build(chosen)
        with handle:
            losses.append(trainer.evaluate()["eval_loss"])
            total = tokens = 0.0
            with torch.no_grad():
                for row in range(len(rows)):  # one by one, by the stock loss
                    batch = trainer.data_collator([trainer.eval_dataset[row]])
                    count = int((batch["labels"][:, 1:] != -100).sum())
                    total += float(trainer.model(**batch).loss) * count if count else 0.0
                    tokens += count
    assert losses == pytest.approx([total / tokens] * 4, rel=1e-5)
    (tmp_path / "rows.json").write_text(json.dumps(rows[7:]))
    trainer, handle = build(chosen)
    with handle, pytest.raises(ValueError, match="eval_data: no row has an answer, so there is no held-out loss"):
        trainer.evaluate()


def test_tensorboard_gets_its_events(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    train(settings(start, tmp_path / "out", trainer={"max_steps": 1, "report_to": "tensorboard"}))
    (file,) = (tmp_path / "events").rglob("events.out.tfevents*")
    assert b"train/loss" in file.read_bytes()


# ---- mistakes


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_clear_line(workers: int, start: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes((start / "0.png").read_bytes()[:200])
    (tmp_path / "data.json").write_text(json.dumps([chat(("user", [IMAGE]), ("assistant", "a"), image="bad.png")]))
    chosen = settings(
        start, tmp_path / "out", data=(str(tmp_path / "data.json"),), trainer={"dataloader_num_workers": workers}
    )
    with pytest.raises(
        ValueError, match=r"^\S*data.json, row 0 \(counted from 0\): \S*bad.png: the file is damaged.*\)$"
    ):
        train(chosen)


def test_arguments_that_cannot_be_right(start: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match="trainer: lerning_rate: unknown .did you mean 'learning_rate'.*arguments of transformers.TrainingArguments",
    ):
        train(settings(start, tmp_path, trainer={"lerning_rate": 1.0}))
    for name, value in (("torch_compile", True), ("torch_compile_backend", "aot_eager")):
        with pytest.raises(
            ValueError, match=f"trainer: {name}={value}: it compiles the model as a whole, .* leave it out"
        ):
            train(settings(start, tmp_path, trainer={name: value}))
        assert not any(key.startswith("ACCELERATE_DYNAMO") for key in os.environ)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        train(settings(start, tmp_path, trainer={"label_smoothing_factor": 0.1}))
    with pytest.raises(duet_vlm.BudgetError, match="floor"):
        train(settings(start, tmp_path, method="fastv", budget=0.01))


@pytest.mark.parametrize("tune", ["full", "lora", "projector"])
def test_checkpointing_leaves_a_frozen_tower_out_of_the_backward_pass(start: Path, tmp_path: Path, tune: str) -> None:
    """The same log as without checkpointing, and no gradient on its way into the tower."""
    logs, needs = [], []
    for checkpointing in (False, True):
        trainer = {"gradient_checkpointing": checkpointing, "max_steps": 2}
        run, handle = build(settings(start, tmp_path / str(checkpointing), tune=tune, trainer=trainer))
        hook = handle.adapter.tower().register_forward_hook(
            lambda module, args, output: needs.append(output.last_hidden_state.requires_grad)
        )
        with handle:
            run.train()
        hook.remove()
        logs.append([entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4) and min(logs[0]) > 0
    assert len(needs) == 4 and not any(needs)
