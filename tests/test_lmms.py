"""lmms-eval with our model: arguments without it, everything else through the real one (`make test-lmms`)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import duet_vlm
from duet_vlm.evaluation import tiny
from duet_vlm.evaluation.lmms import TASKS
from duet_vlm.evaluation.lmms.arguments import LONGEST, cut, fields_of, generation_of, parse_arguments
from duet_vlm.reducers.options import TokenOptions

QUESTIONS = 210
real = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed here: make test-lmms"
)


# ---- arguments


def test_a_method_with_budget_and_settings() -> None:
    asked = parse_arguments(
        None, 64, None, {"schedule": "[[16,0.5],[24,0.0]]", "options": {"text_query": "last"}, "dominant": 3}
    )
    assert (asked.label, asked.method, asked.budget) == ("duet", "duet", 64)
    assert asked.fields == {"schedule": [[16, 0.5], [24, 0.0]], "options": {"text_query": "last"}, "dominant": 3}


def test_a_preset_stands_alone() -> None:
    asked = parse_arguments(None, None, "duet-192", {})
    assert asked.label == "duet-192" and asked.method == duet_vlm.preset("duet-192") and asked.budget is None
    for method, budget, fields in (("duet", None, {}), (None, 64, {}), (None, None, {"dominant": 3})):
        with pytest.raises(
            ValueError, match="preset=duet-192 brings its method and all settings: leave out (method|budget|dominant)"
        ):
            parse_arguments(method, budget, "duet-192", fields)
    with pytest.raises(ValueError, match="known presets: duet-192"):
        parse_arguments(None, None, "duet", {})


def test_settings_are_json_or_a_mapping() -> None:
    assert fields_of('{"schedule": [[16, 0.5]], "options": {"text_query": "last"}}') == {
        "schedule": [[16, 0.5]],
        "options": {"text_query": "last"},
    }
    assert fields_of({"dominant": 3}) == {"dominant": 3} and fields_of(None) == {}
    for bad in ("{dominant}", "[1, 2]", 7):
        with pytest.raises(ValueError, match="settings="):
            fields_of(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "sampled"),
    [
        ({}, False),
        ({"temperature": 0}, False),
        ({"temperature": 0.0, "do_sample": True}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"do_sample": True}, True),
    ],
)
def test_greedy_unless_the_task_samples(task: dict[str, Any], sampled: bool) -> None:
    wanted, _, _ = generation_of(task)
    assert wanted["do_sample"] is sampled
    assert sampled or wanted["temperature"] is wanted["top_p"] is None


def test_generation_settings() -> None:
    task = {
        "until": ["\n\n", "ASSISTANT:"],
        "max_new_tokens": 16,
        "num_beams": 3,
        "top_p": None,
        "image_aspect_ratio": "original",
    }
    wanted, stops, unknown = generation_of(task)
    assert wanted["max_new_tokens"] == 16 and wanted["num_beams"] == 3
    assert stops == ("\n\n", "ASSISTANT:") and unknown == ["image_aspect_ratio"]
    assert generation_of({"until": "end"})[:2] == ({**generation_of({})[0], "max_new_tokens": LONGEST}, ("end",))


def test_answers_end_at_the_first_stop() -> None:
    assert cut(" a cat\n\nQ: b ASSISTANT: c", ("ASSISTANT:", "\n\n")) == "a cat"
    assert cut("a cat", ("\n\n",)) == cut("a cat ", ()) == cut("a cat", ("",)) == "a cat"


def test_the_entry_point_and_the_task_folder_ship() -> None:
    (entry,) = entry_points(group="lmms_eval.models", name="duet_vlm")
    assert entry.value == "duet_vlm.evaluation.lmms:manifest"
    assert {path.name for path in (TASKS / "tiny").iterdir()} >= {"duet_tiny.yaml", "streams.json", "utils.py"}


# ---- the real lmms-eval on the embedded model


def run(out: Path, tasks: str = "duet_tiny", limit: int = QUESTIONS, batch: int = 16, **given: Any) -> dict[str, Any]:
    """Start lmms-eval as docs/evaluate.md says, and read its files: metrics, what was measured, samples, its output."""
    words = {"pretrained": "tiny"} | given | {"measured": out / "measured.json"}
    arguments = ",".join(
        f"{name}={json.dumps(value) if isinstance(value, dict) else value}"
        for name, value in words.items()
        if value is not None
    )
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        "duet_vlm",
        "--model_args",
        arguments,
        "--tasks",
        tasks,
        "--include_path",
        str(TASKS),
    ]
    command += [
        "--limit",
        str(limit),
        "--batch_size",
        str(batch),
        "--device",
        "cpu",
        "--output_path",
        str(out),
        "--log_samples",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    files = sorted(out.rglob("*_results.json"))
    if not files:
        return {"log": done.stdout}
    (samples,) = out.rglob(f"*_samples_{tasks}.jsonl")
    metrics = {
        name: {key.removesuffix(",none"): value for key, value in row.items()}
        for name, row in json.loads(files[0].read_text())["results"].items()
    }
    return {
        "tasks": metrics,
        "measured": json.loads((out / "measured.json").read_text()),
        "samples": samples,
        "log": done.stdout,
    }


def own_answers(budget: float | None) -> list[str]:
    """The library's own path: its loader, its prompt, stock generate, another batch size."""
    model, processor = tiny.load()
    answers: list[str] = []
    handle = None if budget is None else duet_vlm.attach(model, "duet", budget=budget)
    for first in range(0, QUESTIONS, 35):
        items = [tiny.sample("test", i, 0) for i in range(first, first + 35)]
        text = [tiny.prompt(item.question) for item in items]
        inputs = processor(images=[item.image for item in items], text=text, return_tensors="pt", padding=True)
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers += [
            t.strip() for t in processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        ]
    if handle is not None:
        handle.detach()
    return answers


@pytest.fixture(scope="module", params=["none", "duet"])
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, dict[str, Any]]]:
    budget = {"none": None, "duet": 0.11}[request.param]
    out = tmp_path_factory.mktemp(request.param)
    yield request.param, run(out, method=request.param, budget=budget)


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in found["samples"].read_text().splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])


@real
def test_every_answer_equals_the_librarys_own(found: tuple[str, dict[str, Any]]) -> None:
    method, result = found
    rows = rows_of(result)
    assert [row["doc_id"] for row in rows] == list(range(QUESTIONS))
    expected = own_answers({"none": None, "duet": 0.11}[method])
    assert [row["filtered_resps"] for row in rows] == expected
    right = [tiny.sample("test", i, 0).answer == said for i, said in enumerate(expected)]
    assert result["tasks"]["duet_tiny"]["exact_match"] == pytest.approx(sum(right) / QUESTIONS)
    assert 0.8 < sum(right) / QUESTIONS  # it can see
    kinds = {tiny.sample("test", i, 0).kind for i in range(14)}
    assert kinds <= set(result["tasks"]["duet_tiny"])


@real
def test_tokens_are_measured(found: tuple[str, dict[str, Any]]) -> None:
    method, result = found
    measured = result["measured"]["tasks"]["duet_tiny"]
    tokens = {"none": 256, "duet": 28}[method]  # floor(0.11 * 256) per layer at entry 45: (6 * 45 + 3 * 22) / 12
    assert measured["images"] == measured["prompts"] == QUESTIONS and measured["tokens_per_image"] == 256
    assert measured["nominal_mean"] == measured["measured_mean"] == tokens
    assert (
        (measured["gflops"] < measured["full_gflops"])
        == (measured["kv_bytes"] < measured["full_kv_bytes"])
        == (method == "duet")
    )
    assert f"nominal {tokens}.00, measured {tokens}.00" in result["log"]


@real
@pytest.mark.parametrize("start", [["-m", "lmms_eval"], ["lmms-eval"]], ids=["module", "command"])
def test_both_ways_to_start_it_find_the_model(start: list[str], tmp_path: Path) -> None:
    first = [sys.executable, *start] if start[0] == "-m" else [str(Path(sys.executable).parent / start[0])]
    schedule = '{"schedule":[[4,0.5],[8,0.25]]}'
    command = [
        *first,
        "--model",
        "duet_vlm",
        "--model_args",
        f"pretrained=tiny,method=duet,options.text_query=last,settings={schedule}",
    ]
    command += [
        "--tasks",
        "duet_tiny",
        "--include_path",
        str(TASKS),
        "--limit",
        "7",
        "--batch_size",
        "7",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "exact_match" in done.stdout, done.stdout + done.stderr
    measured = json.loads((tmp_path / "duet_vlm_measured.json").read_text())
    assert measured["settings"]["options"]["text_query"] == "last"
    assert measured["tasks"]["duet_tiny"]["measured_mean"] == pytest.approx((4 * 256 + 4 * 128 + 4 * 64) / 12)


@real
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": "no_such_task", "budget": 0.5}, "no_such_task"),
        ({"method": "no_such_method", "budget": 0.5}, "unknown method 'no_such_method'"),
        ({"method": "fastv", "budget": 0.01}, "fastv cannot reach"),
        ({"budget": 0.5, "settings": {"depth": 3}}, "duet has no setting 'depth'"),
        ({"pretrained": "/no/such/folder", "budget": 0.5}, "/no/such/folder"),
    ],
)
def test_a_run_without_results_says_why(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    found = run(tmp_path, limit=2, **given)
    assert set(found) == {"log"} and message in found["log"]


@real
def test_two_processes_share_a_task(tmp_path: Path) -> None:
    """15 questions: eight each, one of them asked twice to keep step; results and samples count it once."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "-m",
        "lmms_eval",
        "--model",
        "duet_vlm",
    ]
    command += [
        "--model_args",
        "pretrained=tiny,budget=0.11,measured=m.json",
        "--tasks",
        "duet_tiny",
        "--include_path",
        str(TASKS),
    ]
    command += ["--limit", "15", "--batch_size", "4", "--output_path", "out", "--log_samples"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"ACCELERATE_USE_CPU": "true"}
    )
    counted = [json.loads((tmp_path / f"m.rank{rank}.json").read_text())["tasks"]["duet_tiny"] for rank in (0, 1)]
    assert [c["images"] for c in counted] == [8, 8] and [c["measured_mean"] for c in counted] == [28, 28], (
        done.stdout + done.stderr
    )
    (samples,) = (tmp_path / "out").rglob("*_samples_duet_tiny.jsonl")
    assert sorted(json.loads(line)["doc_id"] for line in samples.read_text().splitlines()) == list(range(15))


# ---- the model class itself


def requests_of(lm: Any, conversations: list[list[dict[str, Any]]], generation: dict[str, Any]) -> list[Any]:
    """Requests as lmms-eval makes them for chat models, on documents that are the conversations."""
    lm.task_dict = {"talk": {"test": conversations}}
    return [
        SimpleNamespace(args=("", lambda doc: doc, dict(generation), i, "talk", "test"))
        for i in range(len(conversations))
    ]


def user(text: str, *images: Any) -> list[dict[str, Any]]:
    return [
        {
            "role": "user",
            "content": [*({"type": "image", "url": image} for image in images), {"type": "text", "text": text}],
        }
    ]


@real
def test_batches_of_none_one_and_two_images_agree(tmp_path: Path) -> None:
    from duet_vlm.evaluation.lmms.model import DuetVLM

    scenes = [tiny.sample("test", i, 0) for i in range(4)]
    talks = [
        user(scenes[0].question),
        *(user(s.question, s.image) for s in scenes[1:3]),
        user(scenes[3].question, scenes[3].image, scenes[0].image),
    ]
    made = {}
    for batch in (1, 4):
        lm = DuetVLM("tiny", budget=0.22, batch_size=batch, device="cpu", measured=str(tmp_path / f"{batch}.json"))
        made[batch] = lm.generate_until(requests_of(lm, talks, {"max_new_tokens": 6, "temperature": 0}))
        lm.clean()
    assert made[1] == made[4]
    counted = [json.loads((tmp_path / f"{batch}.json").read_text())["tasks"]["talk"] for batch in (1, 4)]
    assert [c["images"] for c in counted] == [4, 4]
    assert [c["measured_mean"] for c in counted] == pytest.approx([counted[0]["nominal_mean"]] * 2)


@real
def test_different_generation_settings_never_share_a_batch(tmp_path: Path) -> None:
    from duet_vlm.evaluation.lmms.model import DuetVLM

    lm = DuetVLM("tiny", method="none", batch_size=8, device="cpu", measured=str(tmp_path / "m.json"))
    item = tiny.sample("test", 0, 0)
    requests = requests_of(lm, [user(item.question, item.image)] * 4, {})
    for request, generation in zip(
        requests, [{"max_new_tokens": 4}, {"max_new_tokens": 4, "until": item.answer[1]}] * 2, strict=True
    ):
        request.args = (*request.args[:2], generation, *request.args[3:])
    assert lm.generate_until(requests) == [item.answer, item.answer[0]] * 2
    lm.clean()


@real
def test_what_it_cannot_do_is_said(tmp_path: Path) -> None:
    from duet_vlm.evaluation.lmms.model import DuetVLM

    with pytest.raises(ValueError, match="batch_size=auto"):
        DuetVLM("tiny", batch_size="auto")
    with pytest.raises(ValueError, match="leave out budget"):
        DuetVLM("tiny", preset="duet-64", budget=3)
    lm = DuetVLM("tiny", budget=0.5, device="cpu", measured=str(tmp_path / "m.json"))
    with pytest.raises(NotImplementedError, match="generate_until, not loglikelihood"):
        lm.loglikelihood([])
    with pytest.raises(NotImplementedError, match="multi-round"):
        lm.generate_until_multi_round([])
    talk = [{"role": "user", "content": [{"type": "video", "url": "clip.mp4"}, {"type": "text", "text": "what ?"}]}]
    with pytest.raises(ValueError, match="task talk brings video: duet_vlm reduces images only"):
        lm.generate_until(requests_of(lm, [talk], {}))
    lm.clean()


@real
def test_dtype_attention_and_salient_words_reach_the_model(tmp_path: Path) -> None:
    from duet_vlm.evaluation.lmms.model import DuetVLM

    item = tiny.sample("test", 0, 0)
    lm = DuetVLM(
        "tiny", budget=0.33, options=TokenOptions(text_query="salient"), dtype="bfloat16", attn_implementation="eager", device="cpu",
        system_prompt="be brief", measured=str(tmp_path / "m.json"),
    )  # fmt: skip
    assert lm.engine.model.dtype == torch.bfloat16 and lm.engine.model.config._attn_implementation == "eager"
    requests = requests_of(lm, [user(item.question, item.image)], {"max_new_tokens": 2})
    assert lm.generate_until(requests)
    first = lm._messages(requests[0].args).messages[0]
    assert (first.role, first.content[0].text) == ("system", "be brief")
    assert lm.engine.handle.report().settings["options"]["text_query"] == "salient"
    lm.clean()


# ---- Qwen2.5-VL: random weights, a processor made here


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from families import IMAGE, VIDEO, VISION_END, VISION_START, qwen2_5_vl, randomise
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    special = {
        "<|video_pad|>": VIDEO,
        "<|vision_start|>": VISION_START,
        "<|vision_end|>": VISION_END,
        "<|image_pad|>": IMAGE,
    }
    letters = ["<pad>", "<s>", "</s>", *(chr(c) for c in range(32, 125))]
    vocabulary = (
        {letter: i for i, letter in enumerate(letters)} | special | {chr(0x3B1 + i): 100 + i for i in range(30)}
    )
    assert len(letters) == 96 and max(vocabulary.values()) == 129
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", additional_special_tokens=list(special)
    )
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 16 * 16, "max_pixels": 64 * 64}
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|>"
        "<|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} answer: {% endif %}"
    )
    images, clips = Qwen2VLImageProcessor(**sizes), Qwen2VLVideoProcessor(**sizes)
    folder = tmp_path_factory.mktemp("qwen")
    Qwen2_5_VLProcessor(images, tokenizer, clips, chat_template=template).save_pretrained(folder)
    randomise(qwen2_5_vl()).eval().save_pretrained(folder)
    return folder


@real
def test_qwen_answers_equal_the_librarys_own(qwen: Path, tmp_path: Path) -> None:
    """Images of several sizes in one batch, against one prompt at a time by hand."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from duet_vlm.evaluation.lmms.model import DuetVLM

    scenes = [tiny.sample("test", i, 0) for i in range(6)]
    pictures = [scene.image.resize((32 + 8 * i, 48)) for i, scene in enumerate(scenes)]
    generation = {"max_new_tokens": 5, "temperature": 0}
    lm = DuetVLM(
        str(qwen),
        method="duet",
        budget=10,
        batch_size=3,
        device="cpu",
        dtype="float32",
        measured=str(tmp_path / "m.json"),
    )
    talks = [user(scene.question, picture) for scene, picture in zip(scenes, pictures, strict=True)]
    said = lm.generate_until(requests_of(lm, talks, generation))
    lm.clean()

    model, processor = (
        AutoModelForImageTextToText.from_pretrained(qwen, dtype=torch.float32).eval(),
        AutoProcessor.from_pretrained(qwen),
    )
    expected, means = [], []
    with duet_vlm.attach(model, "duet", budget=10) as handle:
        for scene, picture in zip(scenes, pictures, strict=True):
            text = f"user: <|vision_start|><|image_pad|><|vision_end|>{scene.question} answer: "
            inputs = processor(images=[picture], text=[text], return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
            expected.append(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
            means.append(handle.report().measured_mean)
    assert said == expected and len(set(expected)) > 1
    counted = json.loads((tmp_path / "m.json").read_text())["tasks"]["talk"]
    assert (
        counted["measured_mean"] == pytest.approx(sum(means) / 6)
        and counted["measured_mean"] <= 10 < counted["tokens_per_image"]
    )


@real
def test_max_pixels_reaches_the_processor(qwen: Path, tmp_path: Path) -> None:
    from duet_vlm.evaluation.lmms.model import DuetVLM

    tokens = []
    for pixels in (64 * 64, 32 * 32):
        file = tmp_path / f"{pixels}.json"
        lm = DuetVLM(str(qwen), method="none", device="cpu", max_pixels=pixels, measured=str(file))
        lm.generate_until(requests_of(lm, [user("what ?", tiny.sample("test", 0, 0).image)], {"max_new_tokens": 1}))
        tokens.append(json.loads(file.read_text())["tasks"]["talk"]["tokens_per_image"])
        lm.clean()
    assert tokens == [64, 16]
