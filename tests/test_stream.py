"""A clip that arrives in pieces: what is held is what evs keeps of the whole clip, and answers are those of that
choice, offline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, Inputs, Picture, forward, generate, shared

import duet_vlm
from duet_vlm.api.streaming import StreamingVideo

QUESTION = tuple(range(41, 91))  # long enough to end behind the last step of time, where all ways to count on agree


def clip_of(family: str, frames: int, seed: int = 3) -> Inputs:
    return FAMILIES[family].inputs([(1, 5, Picture(seed, 3, 4, frames=frames), *QUESTION)])


def pieces(family: str, inputs: Inputs, sizes: list[int]) -> list[dict[str, Any]]:
    """The clip cut into pieces of so many steps."""
    pixels, start, cut = inputs["pixel_values_videos"], 0, []
    grid = inputs.get("video_grid_thw")
    for size in sizes:
        if grid is None:
            cut.append({"pixel_values_videos": pixels[:, start : start + size]})
        else:
            patches = int(grid[0, 1] * grid[0, 2])
            cut.append({
                "pixel_values_videos": pixels[start * patches : (start + size) * patches],
                "video_grid_thw": torch.tensor([[size, *grid[0, 1:].tolist()]]),
            })  # fmt: skip
        start += size
    return cut


STREAMED = ("qwen2_vl", "qwen2_5_vl", "llava_onevision", "llava_next_video", "video_llava")


@pytest.mark.parametrize("family", [name for name in STREAMED if name in FAMILIES])
@pytest.mark.parametrize("budget", [5, 12, 30, 500])
@pytest.mark.parametrize("sizes", [[6], [1] * 6, [2, 3, 1]])
def test_equals_evs_offline(family: str, budget: int, sizes: list[int]) -> None:
    """The same tokens as attach(model, "evs") keeps of the whole clip, and the same logits and answer."""
    model, inputs = shared(family), clip_of(family, 6)
    stream = StreamingVideo(model, budget)
    grid = inputs.get("video_grid_thw")
    steps = inputs["pixel_values_videos"].shape[1] if grid is None else 6
    for piece in pieces(family, inputs, sizes if steps == 6 else [1] * steps if len(sizes) > 1 else [steps]):
        stream.add(**piece)
    with duet_vlm.attach(model, "evs", budget=budget) as handle:
        expected = forward(model, inputs).logits[0]
        kept = handle.trace[0][0].stages[0].kept
        written = generate(model, inputs).sequences[0, inputs["input_ids"].shape[1] :]
    assert [step * stream.places + place for step, place in stream.held] == [
        token for token in kept if token < stream.steps * stream.places
    ]
    found = stream.inputs(inputs["input_ids"])
    logits = forward(model, found).logits[0]
    torch.testing.assert_close(logits[-len(QUESTION) :], expected[-len(QUESTION) :], rtol=1e-3, atol=2e-4)
    assert torch.equal(generate(model, found).sequences[0, -4:], written)


def test_placeholders_of_any_length_and_questions_at_any_time() -> None:
    model, inputs = shared("qwen2_5_vl"), clip_of("qwen2_5_vl", 4)
    stream, few = StreamingVideo(model, 9), clip_of("qwen2_5_vl", 1)
    for number, piece in enumerate(pieces("qwen2_5_vl", inputs, [1, 1, 1, 1]), start=1):
        stream.add(**piece)
        asked = stream.inputs(few["input_ids"])["inputs_embeds"]
        assert (
            len(stream.held)
            == min(9, number * stream.places)
            == asked.shape[1] - len(few["input_ids"][0]) + stream.places
        )
    a, b = stream.inputs(few["input_ids"]), stream.inputs(inputs["input_ids"])
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_memory_does_not_grow_with_the_clip() -> None:
    """What is held after 400 steps is as large as after 4."""
    model = shared("qwen2_5_vl")
    piece = clip_of("qwen2_5_vl", 4)
    stream = StreamingVideo(model, 20)
    sizes = []
    for _ in range(100):
        stream.add(**{name: piece[name] for name in ("pixel_values_videos", "video_grid_thw")})
        sizes.append(sum(x.untyped_storage().nbytes() for x in vars(stream).values() if isinstance(x, torch.Tensor)))
    assert stream.steps == 400 and len(stream.held) == 20
    assert len(set(sizes)) == 1


def test_what_cannot_be() -> None:
    model = shared("qwen2_5_vl")
    with pytest.raises(TypeError, match=r"budget=0.5: a stream has no end yet"):
        StreamingVideo(model, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budget=0: a stream holds at least 1"):
        StreamingVideo(model, 0)
    with pytest.raises(TypeError, match="llava takes no clips"):
        StreamingVideo(shared("llava"), 8)
    stream, inputs = StreamingVideo(model, 8), clip_of("qwen2_5_vl", 2)
    with pytest.raises(ValueError, match="nothing was added yet"):
        stream.inputs(inputs["input_ids"])
    with pytest.raises(ValueError, match="no pixel_values_videos among input_ids"):
        stream.add(input_ids=inputs["input_ids"])
    stream.add(**inputs)
    other = FAMILIES["qwen2_5_vl"].inputs([(1, Picture(4, 2, 2, frames=1), 5)])
    with pytest.raises(ValueError, match="keep to one size"):
        stream.add(**other)
    two = FAMILIES["qwen2_5_vl"].inputs([(1, Picture(3, 3, 4, frames=1), 5, Picture(4, 3, 4, frames=1), 6)])
    with pytest.raises(ValueError, match="2 clips; a stream is one clip"):
        stream.add(**two)
    with pytest.raises(ValueError, match="give one unbroken run"):
        stream.inputs(two["input_ids"])
    with pytest.raises(ValueError, match="the prompt holds 0 placeholders"):
        stream.inputs(torch.tensor([[1, 5]]))
    with pytest.raises(ValueError, match="one prompt at a time"):
        stream.inputs(inputs["input_ids"].repeat(2, 1))
    broken = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"] * float("nan")}
    with pytest.raises(ValueError, match="NaN or Inf"):
        stream.add(**broken)
