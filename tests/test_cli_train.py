"""``duet-vlm train``: settings in layers, recipes against the published values, a run from the shell to the answer."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_cli import PICTURE, QUESTION, as_json, call
from test_distributed import ROOT, config_for_two
from transformers import LlamaForCausalLM, TrainingArguments

import duet_vlm
from duet_vlm.api.loading import load
from duet_vlm.cli import train as verb
from duet_vlm.evaluation import tiny
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.train.settings import TrainSettings, recipes, settings_from

RECIPES = ("llava-finetune", "llava-finetune-lora", "llava-pretrain", "tiny")
RUN = {"max_steps": "2", "per_device_train_batch_size": "2", "use_cpu": "true"}


def printed(*arguments: Any) -> dict[str, Any]:
    return yaml.safe_load(call("train", *arguments, "--print-config").stdout)


def refused(*arguments: Any) -> str:
    return call("train", *arguments, code=2).stderr.strip()


# ---- layers


def test_options_over_config_over_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "limit: 50\nbudget: 0.33\nout: here\ntrainer: {learning_rate: 3e-4, seed: 7}\nsettings: {cluster_width: 2}\n"
    )
    got = printed(
        "--recipe",
        "tiny",
        "--config",
        file,
        "--limit",
        60,
        "--trainer",
        "seed=8",
        "--set",
        "merge=mean",
        "--budget",
        "22%",
    )
    assert (got["model"], got["data"], got["out"]) == ("tiny", ["tiny"], "here")
    assert (got["limit"], got["budget"], got["settings"]) == (60, 0.22, {"cluster_width": 2, "merge": "mean"})
    recipe = settings_from("tiny").trainer
    assert got["trainer"] == {**recipe, "learning_rate": 0.0003, "seed": 8} and recipe["learning_rate"] == 0.0001


def test_every_option_reaches_the_settings() -> None:
    options = [
        "--model",
        "org/m",
        "--data",
        "a.json",
        "--data",
        "b.jsonl",
        "--images",
        "pics",
        "--limit",
        9,
        "--tune",
        "lora",
        "--out",
        "o",
    ]
    options += [
        "--method",
        "pyramiddrop",
        "--schedule",
        "((16, .5), (24, 0.0))",
        "--set",
        "options.text_query=all",
        "--budget",
        "1.0",
    ]
    options += [
        "--anneal-from",
        "1.0",
        "--anneal-until",
        0.7,
        "--trainer",
        "learning_rate=1e-3",
        "--trainer",
        "report_to=tensorboard",
    ]
    options += ["--trainer", "bf16=true", "--trainer", "label_names=[a, b]"]
    got = printed(*options)
    assert {name: got[name] for name in ("model", "data", "images", "limit", "tune", "out", "method", "budget")} == {
        "model": "org/m", "data": ["a.json", "b.jsonl"], "images": "pics", "limit": 9, "tune": "lora", "out": "o",
        "method": "pyramiddrop", "budget": 1.0,
    }  # fmt: skip
    assert got["settings"] == {"options": {"text_query": "all"}, "schedule": [[16, 0.5], [24, 0.0]]}
    assert (got["anneal_from"], got["anneal_until"]) == (1.0, 0.7)
    assert got["trainer"] == {
        "learning_rate": 1e-3,
        "report_to": "tensorboard",
        "bf16": True,
        "label_names": ["a", "b"],
    }
    assert set(got) == set(TrainSettings.__dataclass_fields__)


@pytest.mark.parametrize(
    ("text", "value"),
    [("64", 64), ("0.22", 0.22), ("22%", 0.22), ("192,128,64", [192, 128, 64]), ("1.0, 33%,0.11", [1.0, 0.33, 0.11])],
)
def test_budgets(text: str, value: Any) -> None:
    found = printed("--data", "tiny", "--budget", text)["budget"]
    assert found == value and [type(b) for b in _listed(found)] == [type(b) for b in _listed(value)]


def test_several_values_have_one_convention(tmp_path: Path) -> None:
    for option in (["-b", "0.33", "-b", "0.11"], ["--budget", "0.33,0.11"], ["--budgets", "0.33", "--budget", "0.11"]):
        assert printed("--data", "tiny", *option)["budget"] == [0.33, 0.11]
    assert (
        printed("--data", "a.json,b.jsonl")["data"]
        == printed("--data", "a.json", "--data", "b.jsonl")["data"]
        == ["a.json", "b.jsonl"]
    )
    (tmp_path / "a,b.json").touch()
    assert printed("--data", tmp_path / "a,b.json")["data"] == [str(tmp_path / "a,b.json")]
    assert as_json("train", "--data", "tiny", "--print-config") == printed("--data", "tiny")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "extra", [[], ["--schedule=((2, 0.5), (5, 3))", "--set=merge=mean", "--budget=0.33,0.11", "--trainer=run_name=1é"]]
)
def test_a_printed_config_is_the_same_settings(recipe: str, extra: list[str], tmp_path: Path) -> None:
    options = ["--recipe", recipe, "--data", "x.json", *extra]
    (tmp_path / "a.yaml").write_text(call("train", *options, "--print-config").stdout)
    again = settings_from(config=tmp_path / "a.yaml")
    assert again.to_dict() == printed(*options)
    given = {"data": ["x.json"]} | ({} if not extra else {
        "settings": {"schedule": ((2, 0.5), (5, 3)), "merge": "mean"}, "budget": (0.33, 0.11), "trainer": {"run_name": "1é"},
    })  # fmt: skip
    assert again == settings_from(recipe, options=given)  # tuples again
    assert call("train", "--config", tmp_path / "a.yaml", "--print-config").stdout == (tmp_path / "a.yaml").read_text()


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: [tiny]\ntrainer: {learning_rate: 1e-3, weight_decay: 1E-2, max_steps: 10, run_name: e-3, "
                                     "save_strategy: no, use_cpu: True}\n")  # fmt: skip
    found = settings_from(config=tmp_path / "a.yaml").trainer
    assert found == {
        "learning_rate": 0.001,
        "weight_decay": 0.01,
        "max_steps": 10,
        "run_name": "e-3",
        "save_strategy": "no",
        "use_cpu": True,
    }
    assert yaml.safe_load("[1e-3, no]") == ["1e-3", False]  # nobody else's loader was changed


def test_mistakes_name_value_and_remedy(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    cases: list[tuple[list[Any], str]] = [
        ([], "data: nothing to train on: name JSON files of conversations, or 'tiny'"),
        (["--recipe", "llama"], f"--recipe llama: unknown; there are {', '.join(RECIPES)}"),
        (["--config", tmp_path / "gone.yaml"], "gone.yaml: no such file"),
        (["--data", "tiny", "--tune", "all"], "tune: 'all': choose one of full, lora, projector"),
        (["--data", "tiny", "--budget", "many"], "--budget many: give a token count"),
        (["--data", "tiny", "--budget", "1.5"], "1.5"),
        (["--data", "tiny", "--anneal-from", "0.5", "--budget", "64"], "anneal_from needs one budget as a fraction"),
        (["--data", "tiny", "--anneal-from", "1.0", "--anneal-until", "2", "--budget", "0.1"], "--anneal-until: 2.0: a share of the steps"),
        (["--data", "tiny", "--trainer", "seed"], "--trainer seed: write it as key=value"),
        (["--data", "tiny", "--set", "seed"], "--set seed: write it as key=value"),
        (["--data", "tiny"], "data: tiny draws conversations without end: give limit"),
        (["--data", "gone.json"], "data: gone.json: give a .json or .jsonl file that exists"),
        (["--data", "tiny", "--limit", 4, "--method", "magic"], "magic"),
        (["--data", "tiny", "--limit", 4, "--set", "speed=3"], "duet has no setting 'speed'"),
        (["--data", "tiny", "--limit", 4, "--budget", "0.5", "--model", "gone"], "--model gone: no such folder"),
        (["--data", "tiny", "--trainer", "lerning_rate=1"], "trainer: lerning_rate: unknown (did you mean 'learning_rate'?)"),
        (["--data", "tiny", "--trainer", "max_steps=many"], "trainer: max_steps: 'many': give a number"),
        (["--data", "tiny", "--trainer", "bf16=perhaps"], "trainer: bf16: 'perhaps': give a truth value"),
        (["--recipe", "tinny"], "--recipe tinny: unknown (did you mean 'tiny'?)"),
        (["--config", tmp_path], f"--config {tmp_path}: is a folder"),
        (["--data", "tiny", "--limit", 4, "--method", "deut"], "unknown method 'deut' (did you mean 'duet'"),
        (["--data", "tiny", "--method", "duet,fastv"], "--method duet,fastv: give one"),
    ]  # fmt: skip
    written = {
        "budgets: 3\ndata: [tiny]": "unknown setting 'budgets' (did you mean 'budget'?); known: anneal_from, anneal_until, budget,",
        "- 1": "expected a mapping of settings, got list",
        "a: [": "bad.yaml: not YAML",
        "data: [tiny]\nbudget: 22%": "'22%'",
        "data: [tiny]\ntrainer: fast": "trainer: expected key: value pairs, got 'fast'",
        "data: [tiny]\nlimit: 0": "limit: 0: a whole number, at least 1",
        "data: [tiny]\nprompts: none": "prompts: 'none': choose one of chat, plain",
        "data: [tiny]\ntrain_vision: true\ntune: lora": "train_vision: true needs tune: full",
        "data: [tiny]\nfrozen_dtype: bfloat16": "frozen_dtype: bfloat16 needs trainer.bf16: true",
    }
    for arguments, message in cases:
        said = refused(*arguments, "--out", tmp_path / "out")
        assert said.startswith("error: ") and message in said and "\n" not in said, said
    for content, message in written.items():
        file.write_text(content)
        said = refused("--config", file)
        assert message in said and "\n" not in said, said


def test_the_extra_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "NEEDED", ("accelerate", "no_such_module"))
    assert 'training needs no_such_module: pip install ".[train]"' in refused("--recipe", "tiny")


# ---- recipes

# LLaVA-1.5 (arXiv 2310.03744), table of hyper-parameters and released scripts: rate, global batch on 8 GPUs, what
# learns
PUBLISHED = {
    "llava-pretrain": (1e-3, 256, "projector", "plain"),
    "llava-finetune": (2e-5, 128, "full", "chat"),
    "llava-finetune-lora": (2e-4, 128, "lora", "chat"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_values(name: str) -> None:
    rate, batch, tune, prompts = PUBLISHED[name]
    got = settings_from(name, options={"data": ["x.json"]})
    args = TrainingArguments(**got.trainer, use_cpu=True, output_dir="x")
    assert (args.learning_rate, 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps) == (
        rate,
        batch,
    )
    assert (got.tune, got.prompts, got.train_vision, got.method, got.budget) == (tune, prompts, False, "duet", 192)
    assert (args.lr_scheduler_type, args.weight_decay, args.num_train_epochs, args.bf16) == ("cosine", 0, 1, True)
    assert args.get_warmup_steps(1000) == 30
    if tune == "lora":
        assert (got.lora["r"], got.lora["lora_alpha"], got.projector_lr) == (128, 256, 2e-5)


def test_recipes_are_listed_with_their_first_line() -> None:
    assert tuple(recipes()) == RECIPES
    shown = " ".join(call("train", "--help").stdout.split())
    for name, said in recipes().items():
        assert len(said) > 20 and f"{name}: {said}." in shown


# ---- from the shell


def options(out: Path, **more: str) -> list[str]:
    return [
        "train",
        "--recipe",
        "tiny",
        "--limit",
        "8",
        "--out",
        str(out),
        *(f"--trainer={k}={v}" for k, v in (RUN | more).items()),
    ]


def test_train_then_run_what_was_trained(tmp_path: Path) -> None:
    command = [
        *options(tmp_path / "out", eval_strategy="no"),
        "--method",
        "visionzip",
        "--budget",
        "0.25",
        "--tune",
        "projector",
    ]
    assert f"trained: {tmp_path / 'out'}" in call(*command).stdout
    assert "is finished already (--restart trains anew)" in call(*command).stdout
    told = as_json(*command)
    assert set(told) == {"out", "was_finished", "steps", "epoch", "loss", "eval_loss"}
    assert (told["out"], told["was_finished"], told["steps"], told["eval_loss"]) == (
        str(tmp_path / "out"),
        True,
        2,
        None,
    )
    assert f"trained: {tmp_path / 'out'}" in call(*command, "--restart").stdout
    again = as_json(*command, "--restart")  # what the Trainer says meanwhile is on stderr
    assert (again["was_finished"], again["steps"], again["loss"]) == (False, 2, told["loss"])
    assert "holds a run with other settings (limit)" in call(*command, "--limit", "9", code=2).stderr
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["duet_vlm"]
    assert saved == {"method": "visionzip", "budget": 0.25, "settings": {}}

    asked = ("run", "--model", tmp_path / "out", "-i", PICTURE, "-p", QUESTION)
    assert (as_json(*asked)["report"]["method"], as_json(*asked)["report"]["measured_mean"]) == ("visionzip", 64)
    assert as_json(*asked, "--budget", "32")["report"]["measured_mean"] == 32
    assert as_json(*asked, "--method", "duet", "--budget", "0.5")["report"]["method"] == "duet"
    assert call(*asked, "--compare").stdout.startswith("visionzip | ")
    assert "visionzip" in call("budget", "--model", tmp_path / "out").stdout
    # the shipped model remembers none
    assert as_json("run", "-i", PICTURE, "-p", QUESTION, "--budget", "0.5")["report"]["method"] == "duet"


def test_a_remembered_salient_query_gets_its_processor(tmp_path: Path) -> None:
    model, processor = tiny.load()
    with duet_vlm.attach(
        model, "duet", budget=0.3, options=TokenOptions(text_query="salient"), processor=processor
    ) as handle:
        duet_vlm.save_to_config(handle)
        model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (
        as_json("run", "-m", tmp_path, "-i", PICTURE, "-p", QUESTION)["report"]["settings"]["options"]["text_query"]
        == "salient"
    )


def test_the_start_of_stage_one_as_the_docs_join_it(tmp_path: Path) -> None:
    """The page's own lines, on small models: tower and decoder are theirs, the projector is new, and the recipe moves
    only that."""
    model, processor = tiny.load()
    source = {"llava-hf/llava-1.5-7b-hf": tiny.path()}
    source |= {"openai/clip-vit-large-patch14-336": tmp_path / "clip", "lmsys/vicuna-7b-v1.5": tmp_path / "vicuna"}
    model.model.vision_tower.save_pretrained(tmp_path / "clip")
    decoder = LlamaForCausalLM(model.config.text_config)
    decoder.resize_token_embeddings(model.config.text_config.vocab_size - 3)  # Vicuna has no image token
    decoder.save_pretrained(tmp_path / "vicuna")
    (code,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs/train-with-reduction.md").read_text(), flags=re.S)
    for name, folder in source.items():
        assert name in code
        code = code.replace(name, str(folder))
    exec(code.replace("out/llava-start", str(tmp_path / "start")), {})
    joined = load_file(tmp_path / "start" / "model.safetensors")
    layer = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(joined[f"language_model.{layer}"], decoder.state_dict()[layer])
    row = {
        "image": str(PICTURE),
        "conversations": [{"from": "human", "value": "<image>\nsay"}, {"from": "gpt", "value": "a red ring"}],
    }
    (tmp_path / "rows.json").write_text(json.dumps([row, row]))
    small = [
        f"--trainer={pair}" for pair in ("use_cpu=true", "max_steps=1", "dataloader_num_workers=0", "warmup_steps=0")
    ]
    paths = ["--model", tmp_path / "start", "--data", tmp_path / "rows.json", "--out", tmp_path / "stage1"]
    call("train", "--recipe", "llava-pretrain", *paths, "--budget", "0.33", *small)
    trained = load_file(tmp_path / "stage1" / "model.safetensors")
    assert joined.keys() == trained.keys()
    assert {name.split(".")[0] for name in joined if not torch.equal(joined[name], trained[name])} == {
        "multi_modal_projector"
    }


@pytest.mark.slow
@pytest.mark.train
@pytest.mark.parametrize(
    ("config", "tune", "method"),
    [("ddp.yaml", "lora", "duet"), ("fsdp2_llava.yaml", "full", "duet"), ("ddp.yaml", "projector", "resampler")],
)
def test_two_processes_train_one_model_and_one_of_them_speaks(
    config: str, tune: str, method: str, tmp_path: Path
) -> None:
    """The configurations of docs/configs with only the machine replaced."""
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config_for_two(config, tmp_path)),
    ]
    launch += ["--main_process_port", "0"]
    command = [
        *launch,
        "-m",
        "duet_vlm.cli.main",
        *options(tmp_path / "out", logging_steps="1", save_steps="1"),
        "--tune",
        tune,
    ]
    command += ["--budget", "0.5,0.11", "--method", method]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 1 of 2:") == done.stdout.count("trained: ") == 1
    whole = load(str(tmp_path / "out")).model.state_dict()
    assert {name: w.shape for name, w in whole.items()} == {
        name: w.shape for name, w in tiny.load()[0].state_dict().items()
    }
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.stdout.count("is finished already") == 1 and "step" not in again.stdout

    (tmp_path / "out" / "trainer_state.json").unlink()  # as if killed after the first step
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    resumed = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert resumed.returncode == 0, resumed.stderr
    assert "step 1 of 2:" not in resumed.stdout and resumed.stdout.count("step 2 of 2: loss") == 1
    assert {
        name: w
        for name, w in load(str(tmp_path / "out")).model.state_dict().items()
        if not torch.allclose(w, whole[name], atol=1e-6)
    } == {}
