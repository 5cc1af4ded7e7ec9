"""The predicted FLOPs of a training step against what torch counts, on every family and for everything that can be
trained; the benchmark's own prediction and its count of memory."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Picture, build
from method_matrix import REDUCING, pairs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import duet_vlm
from duet_vlm.evaluation.speed.prompts import encode
from duet_vlm.models.adapter import Adapter
from duet_vlm.models.lookup import adapter_for
from duet_vlm.planning.budget import SpanPlan
from duet_vlm.reducers.inputs import DECODER_INPUTS, VISION_LAYER_INPUTS
from duet_vlm_lab.training_cost import LLAVA_7B, StepFlops, TrainedParts, TrainingExample, step_flops

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import train_step
from shapes import TINY
from shapes import build as build_shape

ANSWER = 4
# sides that fill the tower's windows
ROWS = ((1, 5, Picture(1, 4, 6), *range(20, 34)), (1, 6, Picture(2, 4, 6), *range(40, 54)))
PROJECTIONS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"

STAGE_1 = TrainedParts(decoder=False)
STAGE_2 = TrainedParts()
FULL = TrainedParts(tower=True)
LORA = TrainedParts(decoder=False, projector=False, lora=4)
EVERY = {
    "full": FULL,
    "frozen tower": STAGE_2,
    "projector only": STAGE_1,
    "tower only": TrainedParts(tower=True, projector=False, decoder=False),
    "adapters": LORA,
    "adapters and projector": TrainedParts(decoder=False, lora=4),
    "full, checkpointing": TrainedParts(tower=True, checkpointing=True, input_gradients=True),
    "frozen tower, checkpointing": TrainedParts(checkpointing=True),
    "frozen tower, checkpointing, input gradients": TrainedParts(checkpointing=True, input_gradients=True),
    "projector only, checkpointing": TrainedParts(decoder=False, checkpointing=True),
    "adapters, checkpointing, input gradients": TrainedParts(
        decoder=False, projector=False, lora=4, checkpointing=True, input_gradients=True
    ),
}
CASES = [(what, method) for what in EVERY for method in (None, "duet")]
# choosing and merging are left out of the prediction (test_flops counts them): only methods whose choice is next to
# nothing in models this small
DEAR = {"fastvid", "hired", "prunevid", "quecc", "resampler", "vqtoken", "vscan", "zoo_prune"}


def _by_attention(name: str) -> bool:
    method = duet_vlm.make_method(name)
    return (
        method.requires & DECODER_INPUTS <= {duet_vlm.Input.SCORES, duet_vlm.Input.TOKENS}
        and method.options.text_query != "raters"
        and name not in DEAR
    )


CASES += [("frozen tower", name) for name in REDUCING if name != "duet" and _by_attention(name)]


def freeze(adapter: Adapter, trained: TrainedParts) -> nn.Module:
    """The model to run, with what is trained left open; eager attention, because the counter does not know the CPU's
    fused one."""
    model, base = adapter.model.train(), adapter.base
    tower = getattr(base, "vision_tower", None) or base.visual
    projector = getattr(base, "multi_modal_projector", None) or base.visual.merger
    if trained.lora:
        from peft import LoraConfig, get_peft_model

        run = get_peft_model(model, LoraConfig(r=trained.lora, target_modules=PROJECTIONS))  # freezes the rest
        projector.requires_grad_(trained.projector)
    else:
        run = model.requires_grad_(trained.decoder)
        tower.requires_grad_(trained.tower)
        projector.requires_grad_(trained.projector)
    if trained.checkpointing:
        model.gradient_checkpointing_enable()
        model.disable_input_require_grads()
    if trained.input_gradients:
        model.enable_input_require_grads()
    return run


def labels_of(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[:, :-ANSWER] = -100
    return labels


def counted(run: nn.Module, inputs: dict[str, Any], **options: Any) -> tuple[int, int]:
    """FLOPs of forward and backward that torch saw."""
    with FlopCounterMode(display=False) as counter:
        loss = run(**inputs, **options, labels=labels_of(inputs["input_ids"]), use_cache=False).loss
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops() - forward


def predicted(family: str, adapter: Adapter, handle: duet_vlm.Handle | None, trained: TrainedParts) -> StepFlops:
    """From the shapes, the plan, and the prompt as it is written above."""
    tokens = FAMILIES[family].tokens(ROWS[0][2])  # type: ignore[arg-type]
    text = len(FAMILIES[family].expand(ROWS[0])) - tokens
    plan, method = SpanPlan(tokens, tokens, 0, (tokens,) * 8), None
    if handle is not None:
        plan, method = handle.plan(tokens), handle.reducer
    asks = isinstance(method, duet_vlm.DecoderReducer) and duet_vlm.Input.SCORES in method.requires
    question = 14 - ANSWER + FAMILIES[family].mrope  # Qwen's end-of-image token comes after the image, too
    queries = {"all": question, "last": 1}["all" if method is None else method.options.text_query]
    example = TrainingExample(
        text, (plan,), queries=queries if asks else 0, signals=plan.reduces_entry and method is not None and bool(method.requires & VISION_LAYER_INPUTS),
        projects_all=handle is not None and handle.projects_all,
        stages=() if handle is None else handle.dropping(tokens, plan.tower or tokens),
    )  # fmt: skip
    unread = 0 if FAMILIES[family].mrope else 1
    return step_flops(adapter.decoder_dims(), adapter.vision_dims(), [example] * len(ROWS), trained, unread)


@pairs(CASES, ["llava", "qwen2_5_vl"])
def test_predicted_flops_are_the_counted_ones(family: str, method: tuple[str, str | None]) -> None:
    what, name = method
    trained, adapter = EVERY[what], adapter_for(build(family, "eager"))
    run = freeze(adapter, trained)
    with ExitStack() as stack:
        handle = None if name is None else stack.enter_context(duet_vlm.attach(run, name, **REDUCING[name]))
        forward, backward = counted(run, FAMILIES[family].inputs(ROWS))
        found = predicted(family, adapter, handle, trained)
    assert found.vision + found.decoder == pytest.approx(forward, rel=0.01)
    assert found.backward + found.recomputed == pytest.approx(backward, rel=0.01)
    assert found.total == pytest.approx(forward + backward, rel=0.01)
    assert bool(found.recomputed) == trained.checkpointing


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("what", "tower"),
    [
        *((what, {"contrast_keep": 0.5}) for what in ("frozen tower", "full", "full, checkpointing")),
        # no checkpointing: refused
        *((what, {"key_norm_keep": 0.5, "key_norm_after": 1}) for what in ("frozen tower", "full")),
    ],
)
def test_patches_that_left_the_tower_cost_nothing_behind_it(family: str, what: str, tower: dict[str, Any]) -> None:
    """Without handing on mass, whose table of likenesses is much beside towers this small. Windows lose unevenly; the
    prediction is of the mean."""
    name, trained, near = next(iter(tower)).removesuffix("_keep"), EVERY[what], 0.05 if FAMILIES[family].mrope else 0.01
    adapter = adapter_for(build(family, "eager"))
    run = freeze(adapter, trained)
    whole = predicted(family, adapter, None, trained)
    with duet_vlm.attach(run, f"{name}+duet", budget=6, **tower, options={"proportional_attention": False}) as handle:
        forward, backward = counted(run, FAMILIES[family].inputs(ROWS))
        found = predicted(family, adapter, handle, trained)
    assert found.vision < 0.75 * whole.vision
    assert found.vision + found.decoder == pytest.approx(forward, rel=near)
    assert found.backward + found.recomputed == pytest.approx(backward, rel=near)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", [None, "duet", "visionzip"])
def test_the_vision_stage_is_the_encoder_call(family: str, method: str | None) -> None:
    adapter, inputs = adapter_for(build(family, "eager")), FAMILIES[family].inputs(ROWS)
    # with gradients, as in training: the whole tower runs
    with ExitStack() as stack, FlopCounterMode(display=False) as counter:
        handle = (
            None if method is None else stack.enter_context(duet_vlm.attach(adapter.model, method, **REDUCING[method]))
        )
        encode(adapter.model, {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")})
    assert predicted(family, adapter, handle, STAGE_2).vision == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_two_images_in_a_row() -> None:
    adapter = adapter_for(build("llava", "eager"))
    run = freeze(adapter, FULL)
    row = (1, Picture(1), 7, Picture(2), *range(20, 34))
    with duet_vlm.attach(run, "duet", **REDUCING["duet"]) as handle:
        forward, backward = counted(run, FAMILIES["llava"].inputs([row]))
        example = TrainingExample(16, (handle.plan(36), handle.plan(36)), queries=14 - ANSWER, signals=True)
    found = step_flops(adapter.decoder_dims(), adapter.vision_dims(), [example], FULL, unread_layers=1)
    assert found.total == pytest.approx(forward + backward, rel=0.01)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing is trained"):
        TrainedParts(projector=False, decoder=False)
    with pytest.raises(ValueError, match="lora=-1"):
        TrainedParts(lora=-1)


# ---- the benchmark's own


@pytest.fixture
def steps() -> Any:
    with ExitStack() as attached:
        model = build_shape(TINY)
        model.set_attn_implementation("eager")
        yield train_step.prepare(model, train_step.noise(TINY, 2), attached)


def test_the_benchmark_predicts_its_own_steps(steps: dict[train_step.Side, train_step.Step]) -> None:
    assert len(steps) == len(train_step.SIDES) == 9
    for side, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            step()
        assert step.flops.total == pytest.approx(counter.get_total_flops(), rel=0.01), side
    # which drops as duet does at 11 %
    assert len({step.flops.total for side, step in steps.items() if side.method != "duet_plus"}) == 6


def test_a_step_of_the_benchmark_is_a_step_of_training(steps: dict[train_step.Side, train_step.Step]) -> None:
    """Its two calls give the loss of one call as a trainer makes it, stages add up, and the weights that are trained
    move."""
    for side, step in steps.items():
        model, batch = step.model, step.batch
        with torch.no_grad():
            loss = model(**batch.text, pixel_values=batch.pixels, use_cache=False).loss
        frozen, moved = model.model.vision_tower, model.model.language_model.layers[1].mlp.up_proj.weight
        assert not any(p.requires_grad for p in frozen.parameters())
        before = moved.detach().clone()
        torch.testing.assert_close(step(), loss)
        assert not torch.equal(before, moved), side
        seconds = {stage: timing.seconds for stage, timing in step.stages(1).items()}
        assert tuple(seconds) == ("vision", "decoder", "backward", "optimiser")
        assert sum(s for (s,) in seconds.values()) == pytest.approx(step.clocks[-1][-1] - step.clocks[-1][0])


def test_the_shape_has_the_proportions_of_a_7b_model() -> None:
    """Tower and projector in the forward pass, head in the decoder, and what is promised at 11 %: as in LLaVA-1.5-7B,
    hand-counted below."""
    model = build_shape(train_step.DOMINATED)
    adapter = adapter_for(model)
    shares = []
    for decoder, vision in ((adapter.decoder_dims(), adapter.vision_dims()), LLAVA_7B):
        plans = (
            SpanPlan(576, 576, 0, (576,) * decoder.layers),
            duet_vlm.get_method("duet")().plan(576, decoder.layers, 0.11),
        )
        full, reduced = (
            step_flops(decoder, vision, [TrainingExample(65, (plan,))], STAGE_2, unread_layers=1) for plan in plans
        )
        head = 2 * 641 * decoder.hidden * decoder.vocab
        shares.append((full.vision / (full.vision + full.decoder), head / full.decoder, reduced.total / full.total))
    assert shares[0] == pytest.approx(shares[1], rel=0.2)
    # 24 x 577 rows x (12.6 M weights x 2 + 4 x 577 x 1024); projector
    assert full.vision == pytest.approx(0.38e12 + 0.024e12, rel=0.02)
    # 6.61 G weights without embeddings
    assert full.decoder == pytest.approx(2 * 641 * 6.61e9 + 32 * 4 * 641**2 * 4096, rel=0.02)


def test_pictures_are_supervised_on_their_answers() -> None:
    batch = train_step.pictures(4)
    model, processor = duet_vlm.evaluation.tiny.load()
    for item, ids, labels in zip(
        duet_vlm.evaluation.tiny.samples("train", 4), batch.text["input_ids"], batch.text["labels"], strict=True
    ):
        assert processor.tokenizer.decode(labels[labels != -100]).split() == [*item.answer.split(), "</s>"]
        asked = len(processor.tokenizer(item.question, add_special_tokens=False).input_ids)
        assert int((ids == model.config.image_token_id).sum()) == batch.tokens == 256
        assert asked < batch.queries + 1  # the question, and "ASSISTANT:" is no query of its answer
    assert batch.text["labels"].shape == batch.text["input_ids"].shape


def test_peak_memory_counts_what_lives_at_once() -> None:
    mebi = 2**20
    outside = torch.ones(mebi)

    def hold() -> torch.Tensor:
        first = outside + 1  # 4 MiB
        second = torch.ones(4 * mebi, dtype=torch.uint8)  # 4
        del first  # 4 left
        third = torch.ones(3 * mebi)  # 16 left
        del second, third
        return torch.ones(2 * mebi)  # 8

    peak, left = train_step.memory_of(hold)
    assert peak == pytest.approx(16 * mebi, rel=0.001)
    assert left == pytest.approx(8 * mebi, rel=0.001)


def test_activations_are_what_autograd_saves(steps: dict[train_step.Side, train_step.Step]) -> None:
    """Memory that the allocator holds after the plain forward pass is what the graph says it saved (and the logits,
    which the loss keeps)."""
    step = steps[train_step.Side()]
    step()
    known = {
        t.untyped_storage().data_ptr()
        for t in [*step.model.parameters(), *step.model.buffers(), *step.batch.text.values()]
    }
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = step.forward()
    assert alive.requires_grad
    assert train_step.memory_of(step.forward)[1] == pytest.approx(sum(saved.values()), rel=0.05)


def test_memory_of_a_step(steps: dict[train_step.Side, train_step.Step]) -> None:
    """Never less than the gradients; fewer rows and checkpointing need less."""
    for step in steps.values():
        step()
    peak = {str(side): train_step.memory_of(step)[0] for side, step in steps.items()}
    gradients = sum(4 * p.numel() for p in next(iter(steps.values())).model.parameters() if p.requires_grad)
    assert min(peak.values()) >= gradients
    assert peak["duet at 11%"] < peak["duet at 33%"] < peak["plain"]
    assert peak["plain, checkpointing"] < peak["plain"]
