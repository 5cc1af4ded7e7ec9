"""The shipped model: loads without network, answers, and really is as good as its accuracy.json says."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from duet_vlm import tiny
from duet_vlm.tiny.evaluate import evaluate, generated_answers, main, selected_answers, table, wilson
from duet_vlm.tiny.questions import CHANCE, KINDS
from duet_vlm.tiny.selections import choose, tower_features
from duet_vlm.tiny.text import TOKEN, prompt
from duet_vlm.tiny.train import export


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


@pytest.fixture(scope="module")
def stated():
    return json.loads((tiny.path() / "accuracy.json").read_text())


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
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "accuracy.json", "training_log.json"}
    assert needed <= set(files)


def test_auto_classes_load_without_network(monkeypatch):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    processor = AutoProcessor.from_pretrained(tiny.path())
    model = AutoModelForImageTextToText.from_pretrained(tiny.path())
    assert type(processor).__name__ == "LlavaProcessor" and type(model).__name__ == "LlavaForConditionalGeneration"
    assert processor.patch_size == 14 and processor.num_additional_image_tokens == 1 and processor.tokenizer.padding_side == "left"
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
    model, processor = loaded
    items = tiny.samples("test", 7)
    assert generated_answers(model, processor, items) == [generated_answers(model, processor, [i])[0] for i in items]


def test_stated_accuracy(stated):
    kinds = stated["kinds"]
    assert kinds["all"]["n"] == 2000 and kinds["all"]["accuracy"] >= 0.85
    assert all(kinds[k]["accuracy"] >= 0.93 for k in ("attribute", "existence", "read_digit", "read_word", "compare"))
    assert all(kinds[k]["low"] > CHANCE[k] for k in KINDS)


def test_stated_accuracy_is_reproduced_on_the_first_200(loaded, stated):
    result = evaluate(lambda items: generated_answers(*loaded, items), 200)["all"]
    assert result["low"] <= stated["kinds"]["all"]["accuracy"] <= result["high"]


def test_model_needs_to_look(loaded):
    items = tiny.samples("test", 56, seed=1)

    def share(how: str) -> float:
        said = selected_answers(*loaded, items, how, 28, seed=0)
        return float(np.mean([s == i.answer for s, i in zip(said, items, strict=True)]))

    assert share("oracle") > share("random") + 0.15


def test_keeping_everything_changes_nothing(loaded):
    items = tiny.samples("test", 14, seed=2)
    assert selected_answers(*loaded, items, "cls", 256, seed=0) == generated_answers(*loaded, items)


def test_cls_attention_prefers_foreground(loaded):
    model, processor = loaded
    items = tiny.samples("test", 14)
    _, cls = tower_features(model, processor.image_processor(images=[i.image for i in items], return_tensors="pt")["pixel_values"])
    needed = torch.from_numpy(np.stack([i.needed for i in items]))
    rows = needed.any(1)
    share = (cls * needed).sum(1) / cls.sum(1)
    assert share[rows].mean() > 2 * needed[rows].float().mean()
    with pytest.raises(ValueError, match="unknown selection 'best'"):
        choose("best", 3, cls, items, np.random.default_rng(0))


def test_demo_images():
    shown = tiny.demo_images()
    assert len(shown) == 4 and sum(len(d.questions) for d in shown) == 20
    assert all(d.image.size == (224, 224) for d in shown)


def test_demo_images_are_what_the_script_draws(tmp_path):
    from duet_vlm.tiny.make_demo import FOLDER, make

    make(tmp_path)
    assert (tmp_path / "questions.json").read_text() == (FOLDER / "questions.json").read_text()


def test_unguided_checkpoint_is_what_its_readme_says(loaded):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = Path(__file__).parents[1] / "comparison" / "checkpoints"
    model = LlavaForConditionalGeneration.from_pretrained(folder / "unguided", dtype=torch.float32).eval()
    shipped = loaded[0].model.state_dict()
    same = [name for name, value in model.model.state_dict().items() if torch.equal(value, shipped[name])]
    assert [n for n in shipped if n.startswith("vision_tower")] == [n for n in same if n.startswith("vision_tower")]
    assert not any(n.startswith("language_model") and n.endswith("_proj.weight") for n in same)
    measured = json.loads((folder / "measured.json").read_text())["unguided"]
    assert measured["default"]["none"]["accuracy"] >= 0.95
    processor = AutoProcessor.from_pretrained(folder / "unguided")
    result = evaluate(lambda items: generated_answers(model, processor, items), 140, split="validation")["all"]
    assert result["low"] <= measured["default"]["none"]["accuracy"] <= result["high"]


def test_wilson_and_table():
    low, high = wilson(90, 100)
    assert (round(low, 4), round(high, 4)) == (0.8256, 0.9448)
    rows = table({"count": [True, False], "spatial": [True, True]})
    assert rows["all"]["accuracy"] == 0.75 and rows["all"]["chance"] == 0.35


def test_command_line_writes_json(tmp_path, capsys):
    file = tmp_path / "out.json"
    main(["--questions", "14", "--batch", "7", "--select", "oracle", "--keep", "57", "--json", str(file)])
    assert json.loads(file.read_text())["settings"]["select"] == "oracle"
    assert "attribute" in capsys.readouterr().out


def test_export_round_trip(tmp_path):
    from duet_vlm.tiny.network import build_model

    model = build_model()
    torch.save({"modules": {"model": model.model.state_dict()}}, tmp_path / "join.pt")
    export(tmp_path, Path(tmp_path / "weights"), {"seed": 0})
    from transformers import LlavaForConditionalGeneration

    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "weights", dtype=torch.float32)
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        torch.testing.assert_close(a.half().float(), b, msg=name)
