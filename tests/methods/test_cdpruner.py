"""CDPruner: relevance by embeddings or by a text tower."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, ONE, THREE, TWO, Picture, forward, generate, shared
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerFast

import duet_vlm
from duet_vlm.evaluation.speed.prompts import encode
from duet_vlm.inputs.clip_text import ClipTextEncoder
from duet_vlm.methods.encoder.cdpruner import CDPruner


def clip(width: int = 32) -> Any:
    sizes = dict(intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=60, hidden_size=16, max_position_embeddings=8, eos_token_id=59) | sizes
    vision = dict(hidden_size=width, image_size=28, patch_size=14) | sizes
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()


def test_cdpruner_by_the_decoders_own_embeddings() -> None:
    """Relevance: mean cosine to the words behind the image, scaled over each picture; another question chooses other
    tokens."""
    model, seen = shared("llava"), []

    class Spy(CDPruner):
        def select_tokens(self, view: Any) -> Any:
            seen.append((view, self.score(view)))
            return super().select_tokens(view)

    inputs = FAMILIES["llava"].inputs([ONE, TWO])
    with duet_vlm.attach(model, Spy(keep=8)) as handle:
        forward(model, inputs)
        first = [handle.trace[0][0].stages[0].kept]
        inputs["input_ids"][0, -3:] = torch.tensor([61, 62, 63])
        forward(model, inputs)
        second = [handle.trace[0][0].stages[0].kept]
    view, weight = seen[0]
    for span, row in enumerate((ONE, TWO, TWO)):
        last = max(i for i, item in enumerate(row) if isinstance(item, Picture))
        words = torch.nn.functional.normalize(model.get_input_embeddings()(torch.tensor(row[last + 1 :])), dim=-1)
        likeness = (torch.nn.functional.normalize(view.features[span], dim=-1) @ words.T).mean(1)
        expected = (likeness - likeness.min() + 1e-6) / (likeness.max() - likeness.min())
        torch.testing.assert_close(weight[span], expected.detach(), rtol=1e-3, atol=1e-5)
    assert first != second


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_the_same_question_chooses_the_same_tokens_by_any_way(family: str) -> None:
    """forward, generate() with and without beams, several pictures in a prompt, left and right padding."""
    model, made = shared(family), FAMILIES[family]
    rows = (ONE, THREE)
    with duet_vlm.attach(model, "cdpruner", keep=0.4) as handle:
        found = []
        for side in ("left", "right"):
            forward(model, made.inputs(rows, side))
            found.append([[span.stages[0].kept for span in sample] for sample in handle.trace])
        for options in ({}, {"num_beams": 2}, {"use_cache": False}):
            generate(model, made.inputs(rows), 2, **options)
            beams = options.get("num_beams", 1)
            found.append([[span.stages[0].kept for span in sample] for sample in handle.trace[::beams]])
        with pytest.raises(
            ValueError,
            match=f"{made.make().config.model_type}: cdpruner chooses by the question, and an encoder that is called",
        ):
            brought = {
                name: value
                for name, value in made.inputs([ONE]).items()
                if "ids" not in name and name != "attention_mask"
            }
            encode(model, brought)
    assert all(each == found[0] for each in found)


class Processor:
    """A tokenizer whose words are the ids."""

    tokenizer = SimpleNamespace(decode=lambda ids, **options: " ".join(map(str, ids)))


def ids_of(text: str) -> dict[str, list[int]]:
    return {"input_ids": [58, *(int(word) % 50 for word in text.split()), 59]}


def test_cdpruner_reads_each_question_with_the_text_tower() -> None:
    """Two samples with questions of different lengths, one longer than the tower's window: negated mean cosine over its
    pieces."""
    model, seen, tower = shared("llava"), [], ClipTextEncoder(clip(), ids_of)

    class Spy(CDPruner):
        def select_tokens(self, view: Any) -> Any:
            seen.append((view, self.likeness(view)))
            return super().select_tokens(view)

    long = (1, ONE[2], *range(30, 42))
    inputs = FAMILIES["llava"].inputs([ONE, long])
    with duet_vlm.attach(model, Spy(keep=0.4, relevance="contrastive"), text_tower=tower, processor=Processor()):
        forward(model, inputs)
    ((view, likeness),) = seen
    with torch.no_grad():
        rows = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        images = torch.nn.functional.normalize(
            tower.clip.visual_projection(tower.clip.vision_model.post_layernorm(rows)), dim=-1
        )
        for sample, words in enumerate((ONE[3:], long[2:])):
            ids = ids_of(" ".join(map(str, words)))["input_ids"]
            texts = [
                tower.clip.text_model(input_ids=torch.tensor([ids[i : i + 8]])).pooler_output
                for i in range(0, len(ids), 8)
            ]
            texts = torch.nn.functional.normalize(tower.clip.text_projection(torch.cat(texts)), dim=-1)
            assert int(view.text_similarity_valid[sample].sum()) == len(texts) == math.ceil(len(ids) / 8)
            torch.testing.assert_close(likeness[sample], -(images[sample] @ texts.T).mean(1), rtol=1e-4, atol=1e-5)


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A CLIP model as ``save_pretrained`` writes it, with a tokenizer whose words are the ids."""
    words = Tokenizer(WordLevel({str(number): number % 50 for number in range(100)} | {"<unk>": 57}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    clip().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("method", ["cdpruner", "cdpruner+fastv"])
def test_a_clip_model_by_name_is_the_one_that_is_passed(method: str, clip_folder: Path) -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs([ONE])
    passed = ClipTextEncoder(CLIPModel.from_pretrained(clip_folder), AutoTokenizer.from_pretrained(clip_folder))
    stage = "" if method == "cdpruner" else "cdpruner_"
    settings: dict[str, Any] = {f"{stage}relevance": "contrastive", f"{stage}keep": 0.4}
    with duet_vlm.attach(model, method, **settings, text_tower=passed, processor=Processor()) as handle:
        forward(model, inputs)
        expected = handle.trace
    named = settings | {f"{stage}clip": str(clip_folder)}
    with duet_vlm.attach(model, method, **named, processor=Processor()) as handle:
        forward(model, inputs)
        assert handle.trace == expected
        with pytest.raises(ValueError, match="detach and attach again"):
            handle.set(**{f"{stage}clip": "elsewhere"})
    assert ClipTextEncoder.load(str(clip_folder), model.device) is ClipTextEncoder.load(str(clip_folder), model.device)


def test_clip_models_that_cannot_be_are_refused(tmp_path: Path) -> None:
    model = shared("llava")
    with pytest.raises(ValueError, match=r"clip='x' is read where relevance='contrastive', not 'decoder'"):
        CDPruner(clip="x")
    settings: dict[str, Any] = {"relevance": "contrastive", "keep": 0.4, "processor": Processor()}
    with pytest.raises(ValueError, match=r"no such model here .*name a folder or a hub id"):
        duet_vlm.attach(model, "cdpruner", clip=str(tmp_path / "none"), **settings)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a model of type 'llava'; name a CLIP model"):
        duet_vlm.attach(model, "cdpruner", clip=str(tmp_path), **settings)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llava", {}, "pass text_tower=duet_vlm.inputs.clip_text.ClipTextEncoder"),
        ("llava", {"text_tower": "clip"}, "got str"),
        ("llava", {"text_tower": ClipTextEncoder(clip(), ids_of)}, "pass processor= to attach"),
        (
            "llava",
            {"text_tower": ClipTextEncoder(clip(48), ids_of), "processor": Processor()},
            "a vision tower of width 48, this model's has 32",
        ),
        (
            "qwen2_5_vl",
            {"text_tower": ClipTextEncoder(clip(), ids_of), "processor": Processor()},
            "qwen2_5_vl cannot give: its vision",
        ),
    ],
)
def test_text_towers_that_do_not_fit_are_refused(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        duet_vlm.attach(shared(family), "cdpruner", relevance="contrastive", keep=0.4, **options)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(TypeError, match="Linear has no text_model; give a transformers CLIPModel"):
        ClipTextEncoder(torch.nn.Linear(2, 2), ids_of)
