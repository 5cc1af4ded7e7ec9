"""The shipped model: loads without network, and answers (what it answered when it was measured: test_comparison.py)."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from duet_vlm.api.loading import LoadedModel
from duet_vlm.evaluation import tiny
from duet_vlm.evaluation.experiment import ExperimentCell
from duet_vlm.evaluation.run_sample import answer
from duet_vlm.evaluation.tasks import right, task
from duet_vlm.evaluation.tiny.questions import CHANCE
from duet_vlm.evaluation.tiny.text import TOKEN, prompt

COMPARISON = Path(__file__).parents[1] / "lab/comparison"


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


def said(model, processor, questions, *runs: ExperimentCell) -> list[list[str]]:
    found = answer(LoadedModel("tiny", model, processor), runs or [ExperimentCell("none")], questions, 4)
    return [list(outcome.answers) for outcome in found.values()]


def test_import_is_light():
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('tiny', sys.argv[1])\n"
        "module = sys.modules['tiny'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print([n for n in ('torch', 'transformers', 'PIL', 'numpy') if n in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code, tiny.__file__], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_weights_are_small_and_complete():
    files = {f.name: f.stat().st_size for f in tiny.path().iterdir()}
    assert sum(files.values()) < 15e6
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "training_log.json"}
    assert needed <= set(files)


def test_auto_classes_load_without_network(monkeypatch):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    processor = AutoProcessor.from_pretrained(tiny.path())
    model = AutoModelForImageTextToText.from_pretrained(tiny.path())
    assert type(processor).__name__ == "LlavaProcessor" and type(model).__name__ == "LlavaForConditionalGeneration"
    assert (
        processor.patch_size == 14
        and processor.num_additional_image_tokens == 1
        and processor.tokenizer.padding_side == "left"
    )
    assert model.config.text_config.num_hidden_layers == 12 and model.config.vision_feature_layer == -2


def test_typed_questions_become_known_tokens(loaded):
    processor = loaded[1]
    text = prompt("What COLOUR is the Star?")
    encoded = processor.tokenizer(text, return_offsets_mapping=True)
    words = processor.tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert words == ["<s>", "USER:", "<image>", "what", "color", "is", "the", "star", "?", "ASSISTANT:"]
    start, stop = encoded["offset_mapping"][words.index("star")]
    assert text[start:stop] == "Star"
    assert processor.decode([TOKEN["red"], TOKEN["</s>"]], skip_special_tokens=True) == "red"


def test_chat_template_gives_the_prompt(loaded):
    content = [{"type": "image"}, {"type": "text", "text": "How many stars are there?"}]
    text = loaded[1].apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == prompt("How many stars are there?")


def test_answers_end_with_one_token(loaded):
    model, processor = loaded
    item = tiny.sample("test", 0)
    inputs = processor(images=item.image, text=tiny.prompt(item.question), return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 256
    out = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert len(out) == 2 and out[1] == TOKEN["</s>"]


def test_batch_equals_single(loaded):
    questions = [task("tiny").ask(0, i) for i in range(7)]
    assert said(*loaded, questions)[0] == [said(*loaded, [q])[0][0] for q in questions]


def right_by_kind(model, processor, questions) -> dict[str, list[bool]]:
    hits: dict[str, list[bool]] = {}
    for question, text in zip(questions, said(model, processor, questions)[0], strict=True):
        hits.setdefault(question.kind, []).append(right(question, text))
    return hits


def test_shipped_model_answers(loaded):
    """Questions that nothing was tuned on and no file remembers: every kind clearly above what guessing gives."""
    hits = right_by_kind(*loaded, [task("tiny").ask(30, i) for i in range(84)])
    assert set(hits) == set(CHANCE) and np.mean(sum(hits.values(), [])) >= 0.93
    assert all(np.mean(values) >= 0.9 for kind, values in hits.items() if kind != "count")
    assert all(np.mean(values) > CHANCE[kind] + 0.3 for kind, values in hits.items())


def test_model_needs_to_look(loaded):
    questions = [task("tiny").ask(1, i) for i in range(56)]
    share = [
        np.mean([text == q.answers[0] for text, q in zip(row, questions, strict=True)])
        for row in said(*loaded, questions, ExperimentCell("oracle", 28), ExperimentCell("random", 28))
    ]
    assert share[0] > share[1] + 0.15


def test_cls_attention_prefers_foreground(loaded):
    """In front of the decoder the tokens that CLS attends to most hold far more needed patches than their share of the
    picture."""
    questions = [task("tiny").ask(0, i) for i in range(14)]
    runs = [ExperimentCell("duet", settings={"dominant": 64, "contextual": 0, "schedule": ()})]
    (found,) = answer(LoadedModel("tiny", *loaded), runs, questions, 4).values()
    assert found.recalls[1] / found.recalls[0] > 2 * 64 / 256


def test_demo_images():
    shown = tiny.demo_images()
    assert len(shown) == 4 and sum(len(d.questions) for d in shown) == 20
    assert all(d.image.size == (224, 224) for d in shown)


def test_demo_images_are_what_the_script_draws(tmp_path):
    from duet_vlm_lab.make_demo import FOLDER, make

    make(tmp_path)
    assert (tmp_path / "questions.json").read_text() == (FOLDER / "questions.json").read_text()


def test_unguided_checkpoint_is_what_its_readme_says(loaded):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = COMPARISON / "checkpoints"
    model = LlavaForConditionalGeneration.from_pretrained(folder / "unguided", dtype=torch.float32).eval()
    shipped = loaded[0].model.state_dict()
    same = [name for name, value in model.model.state_dict().items() if torch.equal(value, shipped[name])]
    assert [n for n in shipped if n.startswith("vision_tower")] == [n for n in same if n.startswith("vision_tower")]
    assert not any(n.startswith("language_model") and n.endswith("_proj.weight") for n in same)
    hits = right_by_kind(
        model, AutoProcessor.from_pretrained(folder / "unguided"), [task("tiny").ask(30, i) for i in range(70)]
    )
    assert np.mean(sum(hits.values(), [])) >= 0.93
