"""Clips that go through the vision tower some frames at a time: the same bits as in one piece, in bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CLIPS, FAMILIES, ONE, Picture, build, clips_for, forward, generate, shared
from method_matrix import pairs
from torch import Tensor, nn

import duet_vlm
from duet_vlm.evaluation.speed.prompts import encode
from duet_vlm.models.adapter import EncoderCall
from duet_vlm.models.tower_signals import patches_of
from duet_vlm.profiling.flop_counter import count_flops, memory_of
from duet_vlm.runtime import compat
from duet_vlm.runtime.encode.video_chunks import ChunkConfig, changed_steps

MOVING = [name for name, family in FAMILIES.items() if family.video]
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "fastv": {"layers": 2, "keep": 0.4},
    "duet": {"dominant": 0.4, "contextual": 0.2, "schedule": ((3, 0.6), (5, 0.25))},
    "visionzip": {"dominant": 0.3, "contextual": 0.2},
    "evs": {"keep": 0.5},
    "frames": {"keep": 0.5},
    "holitom": {"keep": 0.5, "schedule": ((4, 0.5),)},
    "metok": {"keep": 0.5},
    "fastvid": {"keep": 0.5},
    "divprune": {"keep": 0.4},
    "hired": {"keep": 0.4},
    "frames+duet": {"frames_keep": 0.7, "duet_dominant": 0.4, "duet_contextual": 0.2},
}  # fmt: skip
# CLIP towers of 17 rows a frame: products of so few round by how many there are
ROUNDED = ("llava_next_video", "video_llava")
LONG = [(1, 5, Picture(3, 3, 4, frames=7), 41, 42, 43)]


def same(family: str, ours: Tensor, expected: Tensor) -> bool:
    """To the last bit, where the CPU's products are."""
    return torch.allclose(ours, expected, rtol=1e-4, atol=1e-4) if family in ROUNDED else torch.equal(ours, expected)


def blocks_of(family: str, model: nn.Module) -> nn.Module:
    """A block of the tower of clips: called once for each piece."""
    tower = getattr(model.model, "video_tower", None)
    return (tower.encoder.layers if tower is not None else FAMILIES[family].blocks(model))[0]


def pieces_of(family: str, model: nn.Module, inputs: Any) -> list[int]:
    """Rows that the first block of the tower was given, call by call."""
    rows: list[int] = []
    block = blocks_of(family, model)

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        rows.append(x.shape[:-1].numel())

    hook = block.register_forward_pre_hook(count, with_kwargs=True)
    forward(model, inputs)
    hook.remove()
    return rows


@pairs(METHODS, MOVING)
@pytest.mark.parametrize("steps", [1, 2])
def test_pieces_change_no_bit(family: str, method: str, steps: int) -> None:
    """Of clips of several lengths among images, padded: the same tokens, the same logits."""
    model, made = shared(family), FAMILIES[family]
    inputs = made.inputs([row for row in clips_for(family, CLIPS)])
    settings = METHODS[method]
    with duet_vlm.attach(model, method, **settings) as handle:
        whole, kept, report = forward(model, inputs).logits, handle.trace, handle.report()
        together = handle.adapter.temporal_patch_size()
    with duet_vlm.attach(model, method, **settings, chunk_frames=steps * together) as handle:
        assert same(family, forward(model, inputs).logits, whole)
        assert handle.trace == kept and handle.report() == report


@pytest.mark.parametrize("family", MOVING)
def test_the_tower_sees_no_more_than_a_piece(family: str) -> None:
    model, inputs = shared(family), FAMILIES[family].inputs(LONG)
    with duet_vlm.attach(model, "evs", keep=0.5) as handle:
        (whole,) = pieces_of(family, model, inputs)
        together = handle.adapter.temporal_patch_size()
    found: dict[int, list[int]] = {}
    for count in (1, 3):
        with duet_vlm.attach(model, "evs", keep=0.5, chunk_frames=count * together):
            found[count] = pieces_of(family, model, inputs)
    steps = (
        int(inputs["video_grid_thw"][0, 0]) if "video_grid_thw" in inputs else inputs["pixel_values_videos"].shape[1]
    )
    assert sum(found[1]) == sum(found[3]) == whole and found[1] == [whole // steps] * steps
    assert len(found[3]) == -(-steps // 3) and max(found[3]) == min(3, steps) * found[1][0] and steps > 1


@pytest.mark.parametrize("family", MOVING)
def test_answers_and_costs_are_the_same(family: str) -> None:
    model, inputs = shared(family), FAMILIES[family].inputs(LONG)
    told, counts = [], []
    for settings in ({}, {"chunk_frames": 2}):
        with duet_vlm.attach(model, "duet", **METHODS["duet"], **settings):
            told.append(generate(model, inputs).sequences)
            counts.append(count_flops(lambda: forward(model, inputs)))
    assert torch.equal(*told) and counts[1] == pytest.approx(counts[0], rel=0.02)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "video_llava", "llava_onevision"])
def test_on_an_accelerator_free_memory_says_how_many_frames(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None on the CPU: one piece. Less memory makes more pieces, never less than a step."""
    model, inputs = shared(family), FAMILIES[family].inputs(LONG)
    with duet_vlm.attach(model, "evs", keep=0.5):
        assert len(pieces_of(family, model, inputs)) == 1
        found = []
        for free in (1, 10**6, 10**12):
            monkeypatch.setattr(compat, "free_bytes", lambda device, free=free: free)
            found.append(len(pieces_of(family, model, inputs)))
    assert found[0] >= found[1] >= found[2] == 1 and found[0] >= 2
    with duet_vlm.attach(model, "none"), torch.enable_grad():
        monkeypatch.setattr(compat, "free_bytes", lambda device: 1)
        rows: list[int] = []
        hook = blocks_of(family, model).register_forward_pre_hook(lambda *_: rows.append(1))
        model(**inputs)
        hook.remove()
    assert len(rows) == 1  # gradients keep all of it anyway


def test_free_memory_is_what_the_device_and_torch_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver says is free, and what torch holds without using it. Of a quarter of that as many steps as fit,
    each of as many values as the rows of a block, its attention and its MLP take, and one of every layer."""
    told = {"mem_get_info": (6_000_000, 80_000_000), "memory_reserved": 5_000_000, "memory_allocated": 3_000_000}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert compat.free_bytes(torch.device("cuda", 0)) == 8_000_000 and compat.free_bytes(torch.device("cpu")) is None
    model = shared("qwen2_5_vl")
    with duet_vlm.attach(model, "evs", keep=0.5) as handle:
        adapter, reducer = handle.adapter, handle.reducer
    vision = model.config.vision_config
    values = vision.depth * vision.hidden_size + 10 * vision.hidden_size + 3 * vision.intermediate_size
    call = EncoderCall("video", [[9, 4, 4]], {})
    # on the CPU nobody asks
    there = torch.zeros(9 * 16, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2).to("meta")
    monkeypatch.setattr(compat, "free_bytes", lambda device: 8_000_000)
    assert ChunkConfig()._steps_per_chunk(adapter, reducer, call, there) == 8_000_000 // 4 // (16 * values * 4)
    assert ChunkConfig(4)._steps_per_chunk(adapter, reducer, call, there) == 2  # what is asked for goes first


def test_a_caller_of_the_encoder_gets_the_stock_output() -> None:
    model, inputs = shared("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].inputs(LONG)
    given = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")}
    with torch.no_grad():
        stock = model.model.get_video_features(**given)
        with duet_vlm.attach(model, "evs", keep=0.5, chunk_frames=2):
            ours = model.model.get_video_features(**given)
    assert all(map(torch.equal, ours.pooler_output, stock.pooler_output)) and torch.equal(
        ours.last_hidden_state, stock.last_hidden_state
    )


@pytest.mark.parametrize(
    ("family", "method", "chunk", "error", "message"),
    [
        ("llava", "duet", 4, TypeError, "llava takes no clips, so frames cannot go through its tower some at a time"),
        ("internvl", "duet", 4, TypeError, "internvl takes frames as images, so frames cannot go through its tower"),
        (
            "qwen2_5_vl",
            "duet",
            3,
            ValueError,
            r"chunk_frames=3: qwen2_5_vl looks at 2 frame\(s\) at once; give a multiple of that",
        ),
        ("qwen2_5_vl", "duet", 0, ValueError, "chunk_frames=0: qwen2_5_vl looks at 2"),
        ("qwen2_5_vl", "duet", 2.0, TypeError, r"chunk_frames=2.0: a number of frames \(int\)"),
        (
            "qwen2_5_vl",
            "contrast",
            2,
            TypeError,
            "chunk_frames: contrast reduces in the tower, so a clip goes through it as it is",
        ),
        ("qwen2_5_vl", "motion+duet", 2, TypeError, r"chunk_frames: motion\+duet reduces in the tower"),
        ("video_llava", "zoo_prune", 2, TypeError, "chunk_frames: zoo_prune calls the projector"),
    ],
)
def test_what_cannot_be_cut_is_named(
    family: str, method: str, chunk: Any, error: type[Exception], message: str
) -> None:
    model = shared(family)
    plain = forward(model, FAMILIES[family].inputs([ONE])).logits
    with pytest.raises(error, match=message):
        duet_vlm.attach(model, method, budget=0.5, chunk_frames=chunk)
    assert torch.equal(forward(model, FAMILIES[family].inputs([ONE])).logits, plain)


def test_the_handle_knows_its_pieces() -> None:
    model = build("video_llava")
    with duet_vlm.attach(model, "duet", budget=0.5, chunk_frames=2) as handle:
        assert handle.chunks.chunk_frames == 2
        assert handle.set(budget=0.3).budget == 0.3


# ---- frames that did not change


def repeating(family: str, pattern: list[int]) -> Any:
    """A clip whose step t is step ``pattern[t]`` of a clip that moves."""
    made = FAMILIES[family]
    inputs = made.inputs([(1, 5, Picture(3, 3, 4, frames=len(pattern)), 41, 42, 43)])
    pixels = inputs["pixel_values_videos"]
    if "video_grid_thw" not in inputs:
        return inputs | {"pixel_values_videos": pixels[:, pattern[: pixels.shape[1]]]}
    steps = pixels.unflatten(0, (int(inputs["video_grid_thw"][0, 0]), -1))
    return inputs | {"pixel_values_videos": steps[pattern].flatten(0, 1)}


@pairs(METHODS, MOVING)
@pytest.mark.parametrize("chunk", [None, 4])
def test_frames_that_are_the_same_have_the_same_rows(family: str, method: str, chunk: int | None) -> None:
    """A threshold of 0 leaves out what would come out the same: no bit changes."""
    model, inputs = shared(family), repeating(family, [0, 0, 2, 2, 2, 5])
    settings = METHODS[method]
    with duet_vlm.attach(model, method, **settings) as handle:
        whole, kept = forward(model, inputs).logits, handle.trace
    with duet_vlm.attach(model, method, **settings, chunk_frames=chunk, still_frames=0.0) as handle:
        assert same(family, forward(model, inputs).logits, whole) and handle.trace == kept
        assert sum(handle._prompt_state.sources[0][0].accounting.repeated_parts[0]) == (
            3 if "video_grid_thw" in inputs else 1
        )  # type: ignore[union-attr]


@pytest.mark.parametrize("family", MOVING)
@pytest.mark.parametrize("method", ["none", "duet", "evs", "divprune"])
def test_what_is_not_encoded_costs_nothing(family: str, method: str) -> None:
    """Counted in the model itself: the tower, its signals and the projector run for the encoded steps alone, and the
    report says so."""
    model, inputs, found = shared(family), repeating(family, [0, 0, 2, 2, 2, 5]), []
    for settings in ({}, {"still_frames": 0.0}):
        with duet_vlm.attach(model, method, **METHODS[method], **settings) as handle:
            counted = count_flops(lambda: forward(model, inputs, logits_to_keep=1))
            found.append((counted, handle.report()))
    (whole, before), (less, after) = found
    assert after.observed.flops == after.predicted.flops == pytest.approx(less, rel=0.01)
    assert before.observed.flops - after.observed.flops == pytest.approx(whole - less, rel=0.02)
    assert whole - less > 0.3 * before.observed.vision_flops and after.full == before.full


def test_a_slow_drift_is_seen() -> None:
    """Every step is compared with the last one that was encoded, not with its neighbour."""
    steps = torch.arange(10.0)[:, None, None].expand(-1, 4, 3) * 0.1
    assert changed_steps(steps, 0.25).tolist() == [True, False, False, True, False, False, True, False, False, True]
    assert changed_steps(steps, 0.05).all() and changed_steps(steps, 9.0).tolist() == [True] + [False] * 9
    assert changed_steps(torch.zeros(3, 2, 2), 0.0).tolist() == [True, False, False]
    # for the features to be refused
    assert changed_steps(torch.tensor([[[0.0]], [[float("nan")]], [[0.0]]]), 9.0).tolist() == [True, True, True]


def test_one_patch_that_changes_is_a_change() -> None:
    frames = torch.zeros(3, 3, 28, 42)
    frames[1, :, 14:, 28:] = 0.5  # the last of six patches
    frames[2, 0, 20, 35] = 1.0  # one value of 588
    steps = patches_of(frames, 14)
    assert steps.shape == (3, 6, 588) and steps[1].mean(-1).tolist() == [0, 0, 0, 0, 0, 0.5]
    assert changed_steps(steps, 0.4).tolist() == [True, True, True] and changed_steps(steps, 0.5).tolist() == [
        True,
        False,
        False,
    ]
    assert changed_steps(steps[[0, 2]], 0.01).tolist() == [True, False] and changed_steps(
        steps[[0, 2]], 0.001
    ).tolist() == [True, True]


@pytest.mark.parametrize(
    ("still", "error", "message"),
    [
        (-1.0, ValueError, "still_frames=-1.0: give a finite mean difference of pixel values, 0 or more"),
        (float("nan"), ValueError, "still_frames=nan: give a finite"),
        ("much", TypeError, "still_frames='much': a difference of pixel values"),
        (True, TypeError, "still_frames=True: a difference of pixel values"),
    ],
)
def test_differences_that_cannot_be(still: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        duet_vlm.attach(shared("qwen2_5_vl"), "evs", budget=0.5, still_frames=still)
    with pytest.raises(TypeError, match="still_frames: rlt reduces in the tower, so a clip goes through it as it is"):
        duet_vlm.attach(shared("qwen2_5_vl"), "rlt", keep=0.5, still_frames=0.0)


# ---- what grows with the clip


def most_and_rows(family: str, method: str, settings: dict[str, Any], steps: int) -> tuple[int, int]:
    """The most bytes that encoding a clip a step at a time takes, and the bytes of the rows that come out."""
    model = shared(family)
    inputs = FAMILIES[family].inputs([(1, 5, Picture(3, 6, 6, frames=steps), 41)])
    given = {name: value for name, value in inputs.items() if name.startswith("pixel_") or name.endswith("grid_thw")}
    if "video_grid_thw" not in given:  # the tests' clips of these families have few frames
        given["pixel_values_videos"] = given["pixel_values_videos"][:, :1].expand(-1, steps, -1, -1, -1)
    with duet_vlm.attach(model, method, **settings, chunk_frames=2), torch.inference_mode():
        (output,) = encode(model, given).values()
        rows = [
            *output.pooler_output,
            *(row for level in getattr(output, "deepstack_features", None) or () for row in level),
        ]
        return memory_of(lambda: encode(model, given))[0], sum(row.nbytes for row in rows)


@pytest.mark.every_family
@pytest.mark.parametrize(
    "family", [name if name == "qwen2_5_vl" else pytest.param(name, marks=pytest.mark.slow) for name in MOVING]
)
@pytest.mark.parametrize(("method", "most"), [("none", 1.1), ("duet", 2.5), ("evs", 3.5)])
def test_little_grows_with_the_clip(family: str, method: str, most: float) -> None:
    """No pixels, and of rows their own bytes: once where nothing is chosen, twice where some leave (before and after);
    and what a method makes."""
    settings = {"none": {}, "duet": {"dominant": 4, "contextual": 2, "schedule": ((3, 0.5),)}, "evs": {"keep": 0.3}}[
        method
    ]
    (before, few), (after, many) = (most_and_rows(family, method, settings, steps) for steps in (16, 64))
    assert many > 3.9 * few and after - before <= most * (many - few)
