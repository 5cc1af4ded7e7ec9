"""The training recipe: stages equal a loop by hand, exact resume, and packing that equals one question at a time."""

import numpy as np
import pytest
import torch
from torch import nn

from duet_vlm.evaluation import tiny
from duet_vlm.evaluation.tiny.labels import body_patches, tag_patches
from duet_vlm.evaluation.tiny.network import DECODER_LAYERS, build_model
from duet_vlm.evaluation.tiny.render import render
from duet_vlm.evaluation.tiny.text import prompt
from duet_vlm_lab.recipe.decoder import (
    DecoderStage,
    LabelFeatures,
    all_patches,
    build_decoder,
    labels_of,
    lessons,
    shorten,
)
from duet_vlm_lab.recipe.finish import FinishStage, forget, looks
from duet_vlm_lab.recipe.join import JoinStage, ProjectorStage
from duet_vlm_lab.recipe.optim import Muon, orthogonal, rate
from duet_vlm_lab.recipe.packing import Lesson, pack
from duet_vlm_lab.recipe.reading import AttentionWatch, answer_logits, count_loss, decode
from duet_vlm_lab.recipe.stages import Stage, curve, fit, last_checkpoint, weights
from duet_vlm_lab.recipe.starts import NEIGHBOURS, start_tower
from duet_vlm_lab.recipe.tower import TowerStage
from duet_vlm_lab.train_tiny import main


class Line(Stage):
    """A small stage with three optimisers; ``dies`` at a step, as if killed."""

    def __init__(self, steps: int = 7, bf16: bool = False, dies: int | None = None) -> None:
        super().__init__(3, steps, bf16)
        self.inner, self.outer, self.dies = nn.Linear(8, 8), nn.Linear(8, 8), dies

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        if step == self.dies:
            raise KeyboardInterrupt
        return {"x": 5 * torch.randn(4, 8, generator=torch.Generator().manual_seed(step))}

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        with self.autocast():
            y = self.outer(self.inner(x).relu())
        return {"loss": (y.float() - x).pow(2).mean(), "largest": y.abs().max().item()}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        groups = [{"params": [self.inner.bias], "lr": 0.02}, {"params": [self.outer.bias], "lr": 0.01}]
        return [
            torch.optim.AdamW(groups, betas=(0.9, 0.98)),
            Muon([self.inner.weight], 0.05),
            Muon([self.outer.weight], 0.01, weight_decay=0.0),
        ]

    def rate(self, step: int) -> float:
        return (0.1, 0.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0)[step]

    def validate(self) -> dict[str, float]:
        return {"norm": self.inner.weight.norm().item()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("bf16", [False, True])
def test_a_stage_equals_a_loop_by_hand(tmp_path, bf16):
    stage, twin = Line(bf16=bf16), Line(bf16=bf16)
    fit(stage, tmp_path)
    opts, norms = twin.optimizers(), []
    full = [[group["lr"] for group in opt.param_groups] for opt in opts]
    for step, factor in enumerate((0.1, 0.5, 1.0, 0.8, 0.6, 0.4, 0.2)):
        for opt, lrs in zip(opts, full, strict=True):
            opt.zero_grad()
            for group, lr in zip(opt.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        twin(**twin.batch(step))["loss"].backward()
        norms.append(nn.utils.clip_grad_norm_(twin.parameters(), 1.0).item())
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            for opt in opts:
                opt.step()
    assert max(norms) > 1  # clipping did something
    assert equal(stage.state_dict(), twin.state_dict()) and equal(weights(tmp_path), twin.state_dict())
    norm = twin.inner.weight.norm().item()
    assert [line["val_norm"] for line in curve(tmp_path)] == [
        pytest.approx(Line().inner.weight.norm().item()),
        pytest.approx(norm),
    ]


def test_a_killed_stage_goes_on_from_its_last_whole_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("duet_vlm_lab.recipe.stages.SAVE", 2)
    monkeypatch.setattr("duet_vlm_lab.recipe.stages.LOG", 1)
    whole = Line()
    fit(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(Line(dies=6), tmp_path / "killed")  # drawn one step ahead: step 5, the sixth, is not done
    assert last_checkpoint(tmp_path / "killed").name == "checkpoint-4"
    (tmp_path / "killed/checkpoint-6").mkdir()  # killed while writing
    (tmp_path / "killed/checkpoint-6/model.safetensors").write_bytes(b"half")
    again = Line()
    fit(again, tmp_path / "killed")
    assert equal(again.state_dict(), whole.state_dict())
    lines = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in curve(tmp_path / run)]
        for run in ("whole", "killed")
    ]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0] if "largest" in line] == [1, 2, 3, 4, 5, 6, 7]
    done = Line(dies=7)  # nothing is drawn any more
    fit(done, tmp_path / "killed")
    assert equal(done.state_dict(), whole.state_dict())
    with pytest.raises(ValueError, match="no checkpoint"):
        weights(tmp_path / "elsewhere")


@pytest.fixture
def small(monkeypatch):
    for module in ("tower", "decoder", "join", "finish"):
        monkeypatch.setattr(f"duet_vlm_lab.recipe.{module}.BATCH", 1)
    monkeypatch.setattr("duet_vlm_lab.recipe.join.FIT_BATCH", 1)
    for module in ("decoder", "join", "finish"):
        monkeypatch.setattr(f"duet_vlm_lab.recipe.{module}.QUESTIONS", 3)
    for stage in (TowerStage, DecoderStage, JoinStage, FinishStage):
        monkeypatch.setattr(stage, "validate", lambda self: {"all": 0.0})


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Tower and decoder at their starts, as the joint stages read them."""
    folder = tmp_path_factory.mktemp("apart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("duet_vlm_lab.recipe.tower.BATCH", 1)
        patch.setattr("duet_vlm_lab.recipe.decoder.BATCH", 1)
        for name, stage in (("tower", TowerStage), ("decoder", DecoderStage)):
            patch.setattr(stage, "validate", lambda self: {})
            fit(stage(0, 9, False), folder / name, stop=1)
    return folder


def resumed_is_whole(build, folder, stop):
    """A stage that was stopped and went on ends where it would have ended, and it has moved; its weights before and
    after."""
    whole = build()
    start = {key: value.clone() for key, value in whole.state_dict().items()}
    fit(whole, folder / "whole")
    fit(build(), folder / "halves", stop=stop)
    assert last_checkpoint(folder / "halves").name == f"checkpoint-{stop}"
    resumed = build()
    fit(resumed, folder / "halves")
    after = whole.state_dict()
    assert not equal(start, after) and equal(resumed.state_dict(), after) and equal(weights(folder / "halves"), after)
    return start, after


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tower", "decoder", "projector", "join", "finish"])
def test_resume_gives_the_same_weights(name, tmp_path, small, apart):
    build = {
        "tower": lambda: TowerStage(0, 3, False),
        "decoder": lambda: DecoderStage(0, 3, False),
        "projector": lambda: ProjectorStage(0, 4, False, apart),
        "join": lambda: JoinStage(0, 3, False, ProjectorStage(0, 8, False, apart)),
        "finish": lambda: FinishStage(0, 3, False),
    }[name]
    resumed_is_whole(build, tmp_path, 2)


def test_projector_uses_a_batch_for_four_steps_at_one_rate(small, apart):
    stage = ProjectorStage(0, 12, False, apart)
    assert [stage.rate(step) for step in range(12)] == pytest.approx([1.0] * 4 + [2 / 3] * 4 + [1 / 3] * 4)
    batches = [stage.batch(step)["target"] for step in range(8)]
    assert all(torch.equal(b, batches[0]) for b in batches[:4]) and all(torch.equal(b, batches[4]) for b in batches[4:])
    assert not torch.equal(batches[0], batches[4])


@pytest.mark.parametrize("whole", [False, True])
def test_unguided_finish_leaves_the_tower_alone_and_is_exported(whole, tmp_path, small):
    flags = [
        "--finish-unguided",
        "--out",
        str(tmp_path),
        "--finish-steps",
        "2",
        "--seed",
        "2",
        "--threads",
        "1",
        "--fp32",
    ]
    main([*flags, "--whole"] if whole else flags)
    before = tiny.load()[0].model.state_dict()
    after = {name.removeprefix("core."): value for name, value in weights(tmp_path / "finish").items()}
    same = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert same == {name for name in after if name.startswith("vision_tower")}
    shown = FinishStage(2, 2, False, cuts=not whole).batch(0)["packed"].patches.shape[1]
    assert (shown == 256) == whole  # the first step of seed 2 is a shortened one
    model = type(tiny.load()[0]).from_pretrained(tmp_path / "weights", dtype=torch.float32)
    for name, value in model.model.state_dict().items():
        torch.testing.assert_close(value, after[name].half().float(), msg=name)
    assert '"finish"' in (tmp_path / "weights/training_log.json").read_text()


def test_unguided_finish_forgets_supervised_attention():
    before, after = tiny.load()[0].model, tiny.load()[0].model
    forget(after.language_model, 0)
    redrawn = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    # the losses of joint training: naming words 2-3, answers 3-4, counting 3-4, shared 5, 6, 9
    layers = (2, 3, 4, 5, 6, 9)
    assert redrawn == {f"language_model.layers.{i}.self_attn.{m}_proj.weight" for i in layers for m in "qk"}


def test_a_batch_without_counting_questions_has_no_counting_loss():
    decoder, rng = build_decoder(0), np.random.default_rng(0)
    watch, features = AttentionWatch(decoder), LabelFeatures()
    items = lessons("validation", 0, 0, 1, 3, ("attribute",))
    packed = pack(items, all_patches(1), rng)
    decode(
        decoder, features(labels_of(items, packed, 0.0, rng), packed.patches), packed, DECODER_LAYERS, DECODER_LAYERS
    )
    assert count_loss(watch, packed) == 0


def test_looks_equals_the_stock_attention(monkeypatch):
    monkeypatch.setattr("duet_vlm_lab.recipe.finish.QUESTIONS", 5)
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
        last, _ = decode(
            decoder,
            features(labels_of([one], packed, 0.0, rng), packed.patches),
            packed,
            DECODER_LAYERS,
            DECODER_LAYERS,
        )
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
        query, key = (
            layer.self_attn.q_proj(hidden)[1:].view(256, 4, 32),
            layer.self_attn.k_proj(hidden)[1:].view(256, 4, 32),
        )
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
