"""One step of training, reduced over plain: time by stage, memory, and what the FLOPs promise. Here ratios are reduced
over plain.

A step is: images through tower and projector, text through the decoder to the loss, backward, AdamW. As in LLaVA's
second stage the tower is frozen; projector and decoder are trained. All sides of a shape share their weights, gradients
and optimiser and take turns.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import Options, side_by_side
from shapes import LLAVA, TINY, Shape, build, picture, prompt, twin
from torch import Tensor, nn

import duet_vlm
from duet_vlm.evaluation import tiny
from duet_vlm.evaluation.speed.prompts import encode
from duet_vlm.models.lookup import adapter_for
from duet_vlm.planning.budget import SpanPlan
from duet_vlm.profiling.flop_counter import memory_of
from duet_vlm.profiling.timing import PairedTiming, ratio, time_paired
from duet_vlm_lab.training_cost import StepFlops, TrainedParts, TrainingExample, step_flops

STAGES = ("vision", "decoder", "backward", "optimiser")
TARGET = 0.55  # at 11 % where the decoder dominates
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# proportions of LLaVA-1.5-7B: the tower does about 5 % of a forward pass, the head 2 % of the decoder's part
DOMINATED = replace(LLAVA, vision_layers=3, vision_hidden=384, vision_mlp=1536, vocab=3072)


@dataclass(frozen=True)
class Batch:
    """``text``: input_ids, attention_mask and labels [B, S]; one image per row, ``queries`` rows of the question at
    most."""

    text: dict[str, Tensor]
    pixels: Tensor
    tokens: int
    queries: int

    @property
    def size(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class Side:
    """Plain, or a method at a budget, behind the whole tower or ``patches`` of it; with or without gradient
    checkpointing."""

    method: str | None = None
    budget: float | None = None
    checkpointing: bool = False
    patches: float | None = None

    def __str__(self) -> str:
        reduced = "plain" if self.budget is None else f"{self.method} at {self.budget:.0%}"
        reduced += "" if self.patches is None else f", {self.patches:.0%} of the patches"
        return reduced + (", checkpointing" if self.checkpointing else "")

    @property
    def base(self) -> Side:
        return Side(checkpointing=self.checkpointing)


REDUCED = (
    *(Side("duet", budget) for budget in (0.33, 0.22, 0.11)),
    Side("duet_plus", 0.11),
    *(Side("duet_plus", 0.11, patches=share) for share in (0.5, 0.4)),
    Side("duet", 0.11, checkpointing=True),
)
SIDES = (Side(), Side(checkpointing=True), *REDUCED)


def run(options: Options) -> list[dict[str, Any]]:
    keep_memory()
    shape, few = (TINY, 2) if options.quick else (DOMINATED, 8)
    dominated = _compare(options, "decoder dominates", shape, build(shape), noise(shape, 2), 9)
    model, _ = tiny.load()
    batch = pictures(few)
    return dominated + _compare(options, "embedded model", shape_of(model, batch), model, batch, 15)


def _compare(
    options: Options, name: str, shape: Shape, plain: nn.Module, batch: Batch, rounds: int
) -> list[dict[str, Any]]:
    with ExitStack() as attached:
        steps = prepare(plain, batch, attached)
        rounds = options.repeats(rounds)
        times = time_paired({str(side): step for side, step in steps.items()}, rounds, warmup=2)
        stages = {side: step.stages(rounds) for side, step in steps.items()}
        flops = {side: step.flops for side, step in steps.items()}
        left = {side: memory_of(step.forward, DEVICE)[1] / 2**20 for side, step in steps.items()}
        peak = {side: memory_of(step, DEVICE)[0] / 2**20 for side, step in steps.items()}
    full = flops[Side()]
    gradients = sum(p.nbytes for p in plain.parameters() if p.requires_grad) / 2**20
    same = {"trained": "projector and decoder", "batch": batch.size, "device": DEVICE, "gradients_mib": gradients}
    same["tower_share"] = full.vision / (full.vision + full.decoder)  # of the plain forward pass
    rows = []
    for side in REDUCED:
        base = side.base
        found = {stage: _stage(stage, stages[side], stages[base], flops[side], flops[base]) for stage in STAGES}
        more = {"predicted": flops[side].total / flops[base].total, "stages": found} | same
        more |= {"activations_mib": [left[side], left[base]], "memory_mib": [peak[side], peak[base]]}
        target = TARGET if name == "decoder dominates" and side.budget == 0.11 else None
        rows.append(
            side_by_side(
                f"{name}, {side}",
                shape,
                times[str(side)],
                times[str(base)],
                target,
                side=str(side),
                base=str(base),
                **more,
            )
        )
    return rows


def _stage(
    stage: str, a: dict[str, PairedTiming], b: dict[str, PairedTiming], reduced: StepFlops, full: StepFlops
) -> dict[str, Any]:
    """One stage of side ``a`` over that of ``b``; the optimiser does no matrix products."""
    found = ratio(a[stage], b[stage])
    row = {
        "milliseconds": [1000 * a[stage].median, 1000 * b[stage].median],
        "median": found.median,
        "interval": [found.low, found.high],
    }
    if stage == "optimiser":
        return row
    counted = [getattr(f, stage) + f.recomputed * (stage == "backward") for f in (reduced, full)]
    return row | {"flops": counted, "predicted": counted[0] / counted[1]}


# ---- a step


class Step:
    """One optimiser step of one side; notes the time between its stages."""

    def __init__(self, model: nn.Module, optimiser: torch.optim.Optimizer, batch: Batch, flops: StepFlops) -> None:
        self.model, self.optimiser, self.batch, self.flops = model, optimiser, batch, flops
        self.clocks: list[list[float]] = []

    def __call__(self) -> Tensor:
        loss = self.forward()
        loss.backward()
        self.clock.append(_now())
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.clock.append(_now())
        self.clocks.append(self.clock)
        return loss.detach()

    def forward(self) -> Tensor:
        self.clock = [_now()]
        images = encode(self.model, {"pixel_values": self.batch.pixels})
        self.clock.append(_now())
        loss = self.model(**self.batch.text, mm_encoder_outputs=images, use_cache=False).loss
        self.clock.append(_now())
        return loss

    def stages(self, rounds: int) -> dict[str, PairedTiming]:
        """Seconds of each stage in the last ``rounds`` calls, in the order of the calls."""
        spans = [[b - a for a, b in itertools.pairwise(clock)] for clock in self.clocks[-rounds:]]
        return {stage: PairedTiming(seconds) for stage, seconds in zip(STAGES, zip(*spans, strict=True), strict=True)}


def prepare(plain: nn.Module, batch: Batch, attached: ExitStack) -> dict[Side, Step]:
    """The step of every side; reducers stay attached until ``attached`` closes."""
    plain = plain.to(DEVICE).train()
    plain.model.vision_tower.requires_grad_(False)
    optimiser = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-5, fused=True)
    steps = {}
    for side in SIDES:
        model = twin(plain)
        if side.checkpointing:
            model.gradient_checkpointing_enable()
        handle = None
        if side.method is not None:
            handle = attached.enter_context(attach(model, side))
        steps[side] = Step(model, optimiser, batch, predicted(model, handle, batch, side))
    return steps


def attach(model: nn.Module, side: Side) -> duet_vlm.Handle:
    if side.patches is None:
        return duet_vlm.attach(model, side.method, budget=side.budget)
    return duet_vlm.attach(model, f"contrast+{side.method}", budget=side.budget, contrast_keep=side.patches)


def predicted(model: nn.Module, handle: duet_vlm.Handle | None, batch: Batch, side: Side) -> StepFlops:
    """FLOPs of the step, from shapes and plans."""
    adapter, tokens = adapter_for(model), batch.tokens
    plan = (
        SpanPlan(tokens, tokens, 0, (tokens,) * adapter.decoder_dims().layers)
        if handle is None
        else handle.plan(tokens)
    )
    text = batch.text["input_ids"].shape[1] - tokens
    stages = () if handle is None else handle.dropping(tokens, plan.tower or tokens)
    example = TrainingExample(text, (plan,), queries=batch.queries, signals=plan.reduces_entry, stages=stages)
    trained = TrainedParts(checkpointing=side.checkpointing, input_gradients=side.checkpointing)
    return step_flops(adapter.decoder_dims(), adapter.vision_dims(), [example] * batch.size, trained, unread_layers=1)


def keep_memory() -> None:
    """Have the C library keep freed memory for the next step, as CUDA's allocator does: else the plain step, which
    frees most, pays most for page faults (half of its forward pass was seen to be such time)."""
    library = ctypes.CDLL(None)
    # glibc; its numbers for "blocks mapped on their own" and "free bytes at which to give back"
    if hasattr(library, "mallopt"):
        library.mallopt(-4, 0)
        library.mallopt(-1, -1)


def _now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- what is trained on


def noise(shape: Shape, size: int) -> Batch:
    """Rows of noise at a shape; the last quarter of the text is supervised."""
    ids = prompt(shape)["input_ids"].repeat(size, 1)
    ids[1:, -shape.text :] = torch.randint(2, shape.vocab - 4, (size - 1, shape.text))
    labels = ids.clone()
    labels[:, : -(shape.text // 4)] = -100
    pixels = picture(shape)["pixel_values"]
    pixels = torch.cat([pixels, torch.randn(size - 1, *pixels.shape[1:])])
    return _batch(ids, torch.ones_like(ids), labels, pixels, shape.visual_tokens, shape.text - shape.text // 4)


def pictures(size: int) -> Batch:
    """Questions of the embedded model with their answers, which are supervised."""
    model, processor = tiny.load()
    items = tiny.samples("train", size)
    words = [f"{tiny.prompt(item.question)} {item.answer}</s>" for item in items]
    found = processor(images=[item.image for item in items], text=words, padding=True, return_tensors="pt")
    ids = found["input_ids"]
    asked = ids == processor.tokenizer.convert_tokens_to_ids("ASSISTANT:")
    answers = (asked.cumsum(1) > 0) & ~asked
    image = ids == model.config.image_token_id
    questions = (image.cumsum(1) == image.sum(1, keepdim=True)) & ~image & ~answers
    tokens, queries = int(image[0].sum()), int(questions.sum(1).max())
    return _batch(ids, found["attention_mask"], ids.masked_fill(~answers, -100), found["pixel_values"], tokens, queries)


def _batch(ids: Tensor, mask: Tensor, labels: Tensor, pixels: Tensor, tokens: int, queries: int) -> Batch:
    text = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return Batch({name: t.to(DEVICE) for name, t in text.items()}, pixels.to(DEVICE), tokens, queries)


def shape_of(model: nn.Module, batch: Batch) -> Shape:
    """The sizes of a loaded LLaVA and of what it is given."""
    text, vision = model.config.text_config, model.config.vision_config
    return Shape(
        layers=text.num_hidden_layers, hidden=text.hidden_size, heads=text.num_attention_heads, kv_heads=text.num_key_value_heads,
        mlp=text.intermediate_size, vision_layers=vision.num_hidden_layers, vision_hidden=vision.hidden_size,
        vision_mlp=vision.intermediate_size, side=vision.image_size // vision.patch_size, vocab=text.vocab_size,
        text=batch.text["input_ids"].shape[1] - batch.tokens,
    )  # fmt: skip
