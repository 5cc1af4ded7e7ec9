"""Stage C: tower and decoder meet. First the projector alone learns to imitate the label features, then everything is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from ..labels import presence
from ..network import DECODER_LAYERS, FEATURE_LAYER, VISUAL_TOKENS, build_model
from ..render import render
from .decoder import FEW, LabelFeatures, all_patches, lessons, shorten
from .optim import optimizers, rate, set_rate
from .packing import Lesson, Packed, pack
from .reading import Probes, Watch, accuracy_by_kind, answer_loss, attention_loss, count_loss, decode, probe_loss
from .run import Run, apply
from .tower import Heads, Targets, dense_loss, presence_loss, to_pixels

BATCH, QUESTIONS = 8, 16
FIT_BATCH = 16
FIT_REPEATS = 4


def pixels_of(items: list[Lesson]) -> Tensor:
    """(B, 3, 224, 224) of the pictures of lessons."""
    return to_pixels([render(i.scene) for i in items])


def build_for_training(folder: Path) -> tuple[LlavaForConditionalGeneration, dict[str, nn.Module]]:
    """The model with tower and decoder of the stages before, and the training-only parts."""
    model, heads, probes, features = build_model(), Heads(), Probes(), LabelFeatures()
    a = torch.load(folder / "tower.pt", weights_only=True)["modules"]
    b = torch.load(folder / "decoder.pt", weights_only=True)["modules"]
    model.model.vision_tower.load_state_dict(a["tower"])
    heads.load_state_dict(a["heads"])
    model.model.language_model.load_state_dict(b["decoder"])
    probes.load_state_dict(b["probes"])
    features.load_state_dict(b["features"])
    model.set_attn_implementation("eager")
    return model, {"heads": heads, "probes": probes, "features": features}


def fit_projector(
    folder: Path, seed: int, steps: int, model: LlavaForConditionalGeneration, features: LabelFeatures, bf16: bool
) -> None:
    """Train the projector alone so that tower features become label features; leaves ``projector.pt``."""
    projector = model.model.multi_modal_projector
    opts: list[torch.optim.Optimizer] = [torch.optim.AdamW(projector.parameters(), 3e-3)]
    run = Run(folder, "projector", {"projector": projector}, opts, every=50)
    patches = torch.arange(VISUAL_TOKENS)[None]
    for step in range(run.resume(), steps):
        set_rate(opts, max(0.05, 1 - step / steps))
        items = lessons("train", seed + 2000, step * FIT_BATCH, FIT_BATCH, 0)
        labels = torch.from_numpy(np.stack([i.labels for i in items]))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            seen = model.model.vision_tower(pixels_of(items), output_hidden_states=True).hidden_states[FEATURE_LAYER][:, 1:].float()
            target = features(labels, patches.expand(len(items), -1))
            weight = 1.0 + 3.0 * (labels[..., :1] > 0)
        for _ in range(FIT_REPEATS):  # drawing and the tower cost far more than the projector
            loss = (weight * (projector(seen) - target) ** 2).mean() / (weight * target**2).mean()
            apply(loss, [projector], opts, False)
        if (step + 1) % 25 == 0:
            run.log(step + 1, error=loss.item())
        if (step + 1) % run.every == 0 or step + 1 == steps:
            run.save(step + 1)


@torch.no_grad()
def validate(model: LlavaForConditionalGeneration, n: int = 48, keep: int | None = None) -> dict[str, float]:
    """Accuracy per kind on validation pictures; ``keep``: only so many visual tokens, those that matter first."""
    rng, hits, items = np.random.default_rng(0), [], lessons("validation", 0, 0, n, QUESTIONS)
    decoder = model.model.language_model
    for i in range(0, n, 8):
        part = items[i : i + 8]
        packed = shorten(part, keep, rng) if keep else pack(part, all_patches(8), rng)
        visual = visual_tokens(model, pixels_of(part))[0]
        visual = visual[torch.arange(8)[:, None], packed.patches]
        last, _ = decode(decoder, visual, packed, DECODER_LAYERS, DECODER_LAYERS)
        hits += list(answer_loss(decoder, last, packed)[1])
    return accuracy_by_kind(hits, items)


def visual_tokens(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Visual tokens (B, 256, WIDTH), the tower features they come from (B, 257, WIDTH), and the last CLS output (B, WIDTH)."""
    out = model.model.vision_tower(pixels, output_hidden_states=True)
    features = out.hidden_states[FEATURE_LAYER]
    return model.model.multi_modal_projector(features[:, 1:]), features.float(), out.pooler_output.float()


def train_join(
    folder: Path, seed: int, steps: int, bf16: bool, fit_steps: int = 300, stop: int | None = None
) -> LlavaForConditionalGeneration:
    """Fit the projector, then train everything for ``steps`` steps of ``BATCH`` pictures; leaves ``join.pt``."""
    torch.manual_seed(seed)
    model, extra = build_for_training(folder)
    heads, probes, core = extra["heads"], extra["probes"], model.model
    modules: dict[str, nn.Module] = {"model": core, "heads": heads, "probes": probes}
    opts = optimizers(core.vision_tower.named_parameters(), matrix=0.0015, query_key=4e-4, embedding=1e-4, rest=4e-4)
    opts += optimizers(core.language_model.named_parameters(), matrix=0.003, query_key=8e-4, embedding=4e-4, rest=8e-4)
    rest = [*core.multi_modal_projector.parameters(), *heads.parameters(), *probes.parameters()]
    opts.append(torch.optim.AdamW(rest, 8e-4, betas=(0.9, 0.98), weight_decay=0.01))
    run = Run(folder, "join", modules, opts)
    first = run.resume()
    if not first:
        fit_projector(folder, seed, fit_steps, model, extra["features"], bf16)
        run.log(0, **{f"val_{k}": v for k, v in validate(model).items()})
    watch = Watch(core.language_model)
    for step in range(first, min(steps, stop or steps)):
        t, rng = step / steps, np.random.default_rng([seed, 7, step])
        set_rate(opts, rate(t, flat=0.3))
        items = lessons("train", seed + 3000, step * BATCH, BATCH, QUESTIONS)
        short = rng.random() < 0.5
        packed = shorten(items, int(rng.choice(FEW)), rng) if short else pack(items, all_patches(BATCH), rng, late=rng.random() < 0.5)
        losses, right = join_losses(model, heads, probes, watch, items, packed, int(rng.choice((6, 7, 9, 10))), bf16)
        guide = max(0.25, 1 - t / 0.7)
        loss = losses["answer"] + 0.1 * losses["dense"] + 0.3 * losses["seen"]
        loss = loss + guide * (0.15 * losses["lookup"] + 0.15 * losses["shared"] + 0.1 * losses["counted"] + 0.05 * losses["facts"])
        apply(loss, list(modules.values()), opts, bf16)
        done = step + 1
        if done % 50 == 0:
            run.log(done, tokens=packed.patches.shape[1], **{k: v.item() for k, v in losses.items()}, **right)
        if done % 400 == 0 or done == steps:
            run.log(done, **{f"val_{k}": v for k, v in validate(model).items()}, val_28=validate(model, keep=28)["all"])
        if done % run.every == 0 or done == min(steps, stop or steps):
            run.save(done)
    return model


def join_losses(
    model: LlavaForConditionalGeneration,
    heads: Heads,
    probes: Probes,
    watch: Watch,
    items: list[Lesson],
    packed: Packed,
    cut: int,
    bf16: bool,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """All losses of a joint step and the accuracy per kind."""
    decoder = model.model.language_model
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        visual, features, cls = visual_tokens(model, pixels_of(items))
        kept = visual[torch.arange(len(items))[:, None], packed.patches]
        last, states = decode(decoder, kept, packed, DECODER_LAYERS, cut)
    targets = Targets(
        torch.from_numpy(np.stack([i.labels for i in items])), torch.from_numpy(np.stack([presence(i.scene) for i in items]))
    )
    answer, hits = answer_loss(decoder, last, packed)
    lookup, shared = attention_loss(watch, packed, DECODER_LAYERS)
    losses = {
        "answer": answer,
        "dense": dense_loss(heads.patch(features[:, 1:]), targets.labels)[0],
        "seen": presence_loss(heads, features, cls, targets.presence),
        "lookup": lookup,
        "shared": shared,
        "counted": count_loss(watch, packed),
        "facts": probe_loss(probes, states, packed),
    }
    return losses, accuracy_by_kind(list(hits), items)
