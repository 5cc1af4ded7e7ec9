"""The training recipe: exact resume, and packing that equals one question at a time."""

import json

import numpy as np
import pytest
import torch

from duet_vlm import tiny
from duet_vlm.tiny.labels import body_patches, tag_patches
from duet_vlm.tiny.network import DECODER_LAYERS, build_model
from duet_vlm.tiny.recipe.decoder import LabelFeatures, all_patches, build_decoder, labels_of, lessons, shorten, train_decoder
from duet_vlm.tiny.recipe.finish import forget, looks, train_finish
from duet_vlm.tiny.recipe.optim import orthogonal, rate
from duet_vlm.tiny.recipe.packing import Lesson, pack
from duet_vlm.tiny.recipe.reading import answer_logits, decode
from duet_vlm.tiny.recipe.starts import NEIGHBOURS, start_tower
from duet_vlm.tiny.recipe.tower import train_tower
from duet_vlm.tiny.render import render
from duet_vlm.tiny.text import prompt


@pytest.mark.parametrize("stage", [train_tower, train_decoder, train_finish])
def test_resume_gives_the_same_weights(stage, tmp_path, monkeypatch):
    monkeypatch.setattr("duet_vlm.tiny.recipe.tower.BATCH", 2)
    monkeypatch.setattr("duet_vlm.tiny.recipe.decoder.BATCH", 2)
    monkeypatch.setattr("duet_vlm.tiny.recipe.finish.BATCH", 2)
    monkeypatch.setattr("duet_vlm.tiny.recipe.finish.QUESTIONS", 3)
    for module in ("tower", "decoder", "finish"):
        monkeypatch.setattr(f"duet_vlm.tiny.recipe.{module}.validate", lambda *_, **__: {"all": 0.0})
    stage(tmp_path / "whole", 0, 6, False)
    stage(tmp_path / "halves", 0, 6, False, stop=3)
    stage(tmp_path / "halves", 0, 6, False)
    (file,) = (tmp_path / "whole").glob("*.pt")
    a = torch.load(file, weights_only=True)
    b = torch.load(tmp_path / "halves" / file.name, weights_only=True)
    assert a["step"] == b["step"] == 6
    for name, module in a["modules"].items():
        assert all(torch.equal(value, b["modules"][name][key]) for key, value in module.items())
    assert [json.loads(line)["stage"] for line in file.with_suffix(".jsonl").read_text().splitlines()]


def test_unguided_finish_forgets_supervised_attention_and_leaves_the_tower_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("duet_vlm.tiny.recipe.finish.BATCH", 2)
    monkeypatch.setattr("duet_vlm.tiny.recipe.finish.QUESTIONS", 3)
    monkeypatch.setattr("duet_vlm.tiny.recipe.finish.validate", lambda *_, **__: {"all": 0.0})
    before, after = tiny.load()[0].model, tiny.load()[0].model
    forget(after.language_model, 0)
    redrawn = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    layers = (2, 3, 4, 5, 6, 9)  # the losses of joint training: naming words 2-3, answers 3-4, counting 3-4, shared 5, 6, 9
    assert redrawn == {f"language_model.layers.{i}.self_attn.{m}_proj.weight" for i in layers for m in "qk"}
    trained = train_finish(tmp_path, 0, 2, False).model
    same = {name for name, p in trained.named_parameters() if torch.equal(p, before.get_parameter(name))}
    assert same == {name for name, _ in trained.named_parameters() if name.startswith("vision_tower")}


def test_looks_equals_the_stock_attention(monkeypatch):
    monkeypatch.setattr("duet_vlm.tiny.recipe.finish.QUESTIONS", 5)
    model, processor = tiny.load()
    found = looks(model, 2)
    masses, shares, patches = [], [], []
    for item in lessons("validation", 0, 0, 2, 5):
        for asked in (q for q in item.questions if q.needed):
            things = [item.scene.things[i] for i in asked.needed]
            needed = torch.from_numpy(np.any([tag_patches(t) if asked.reads else body_patches(t) for t in things], 0))
            inputs = processor(images=render(item.scene), text=prompt(asked.text), return_tensors="pt")
            with torch.no_grad():
                maps = model(**inputs, output_attentions=True).attentions
            visual = torch.stack(maps)[:, 0, :, -1, 2:258]  # <s> USER: stand before the picture
            masses.append(visual[..., needed].sum(-1))
            shares.append(masses[-1] / visual.sum(-1))
            patches.append(needed.float().mean())
    assert len(masses) > 5
    for name, twin in (("mass", masses), ("share", shares), ("patches", patches)):
        torch.testing.assert_close(torch.tensor(found[name]), torch.stack(twin).mean(0), rtol=0, atol=2e-4)


def test_packed_questions_equal_single_ones():
    decoder, features, rng = build_decoder(0).eval(), LabelFeatures(), np.random.default_rng(0)
    features.start(decoder.embed_tokens.weight, torch.Generator().manual_seed(0))
    (item,) = lessons("validation", 0, 0, 1, 5)

    @torch.no_grad()
    def logits(one: Lesson) -> torch.Tensor:
        packed = pack([one], all_patches(1), rng)
        last, _ = decode(decoder, features(labels_of([one], packed, 0.0, rng), packed.patches), packed, DECODER_LAYERS, DECODER_LAYERS)
        return answer_logits(decoder, last, packed.answer_rows)[0]

    together = logits(item)
    for i, q in enumerate(item.questions):
        alone = logits(Lesson(item.scene, item.labels, [q], item.bodies, item.tags))
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-4)


def test_shortened_pictures_keep_every_thing_and_tag():
    items = lessons("train", 0, 0, 16, 4)
    packed = shorten(items, 28, np.random.default_rng(0))
    for item, patches in zip(items, packed.patches.numpy(), strict=True):
        kept = np.isin(np.arange(256), patches)
        assert len(patches) == 28 and (np.diff(patches) > 0).all()
        assert all((body & kept).any() for body in item.bodies)
        assert all((tag & kept).any() for tag in item.tags if tag.any())


def test_late_mask_hides_only_visual_tokens_from_text():
    items = lessons("train", 0, 0, 2, 4)
    packed = pack(items, all_patches(2), np.random.default_rng(0), late=True)
    hidden = (packed.mask != packed.late_mask)[:, 0]
    assert hidden.any() and not hidden[:, :258].any() and not hidden[:, :, :2].any() and not hidden[:, :, 258:].any()


def test_tower_starts_by_looking_at_neighbours():
    tower = build_model().model.vision_tower
    start_tower(tower, torch.Generator().manual_seed(0))
    layer = tower.encoder.layers[0]
    hidden = torch.cat([torch.zeros(1, 128), tower.embeddings.position_embedding.weight[1:].detach()])
    with torch.no_grad():
        query, key = layer.self_attn.q_proj(hidden)[1:].view(256, 4, 32), layer.self_attn.k_proj(hidden)[1:].view(256, 4, 32)
        best = torch.einsum("qhd,khd->hqk", query, key).argmax(-1)
    inner = [r * 16 + c for r in range(2, 14) for c in range(2, 14)]
    for head, (dr, dc) in enumerate(NEIGHBOURS[0]):
        right = best[head, inner] == torch.tensor(inner) + dr * 16 + dc
        assert right.float().mean() > 0.9


def test_muon_step_is_nearly_orthogonal():
    for shape in ((3, 24, 8), (2, 8, 24)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert values.min() > 0.3 and values.max() < 1.4


def test_rate_warms_up_and_falls():
    assert rate(0.0) == 0.02 and rate(0.3) == 1.0 and rate(0.75) == pytest.approx(0.5) and rate(1.0) == 0.02
