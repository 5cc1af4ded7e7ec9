"""The page to play with, less Gradio: what the slider shows at each depth, answers side by side, controls as text,
errors in words."""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, shared
from PIL import Image
from processors import STOCK, picture, processor
from typer.testing import CliRunner

import duet_vlm
import duet_vlm.app
from duet_vlm import Span, SpanTrace, StageTrace, attach
from duet_vlm.api.loading import LoadedModel, load
from duet_vlm.app.controls import ChosenMethod, Controls, starting, tower_methods
from duet_vlm.app.depth import STEP, DepthStrip, DepthView, depth_view
from duet_vlm.app.errors import sentence
from duet_vlm.app.examples import examples
from duet_vlm.app.files import MOST_MB, Uploads, check_question, open_uploads
from duet_vlm.app.generate import FULL, AppSide, RunRecord, answers, same_weights
from duet_vlm.cli.main import app
from duet_vlm.evaluation import tiny
from duet_vlm.viz import at_depth, draw, history, token_fates
from duet_vlm.viz.colors import group
from duet_vlm.viz.overlay import DROPPED, SHADE

PICTURE = tiny._HERE / "demo" / "scene_1.png"
QUESTION = "What shape is the yellow object?"
GREY, CELL = (120, 120, 120), 20
DARK = tuple(round(g * (1 - DROPPED) + s * DROPPED) for g, s in zip(GREY, SHADE, strict=True))


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load("tiny")


@pytest.fixture(scope="module")
def shown(loaded: LoadedModel) -> Uploads:
    return open_uploads(PICTURE, loaded)


# ---- what the slider shows


def story() -> SpanTrace:
    """Of 8 tokens 7 leaves in the tower; at the entry 4 goes into 1, 5 into 2, and 6 is dropped; in front of layer 3
    token 2 goes into 0 and 3 is dropped; in front of layer 5 token 1 is dropped."""
    stages = (StageTrace(0, (0, 1, 2, 3), (6,)), StageTrace(3, (0, 1), (3,), {0: (2,)}), StageTrace(5, (0,), (1,)))
    return SpanTrace(Span(0, 0, 8, (2, 4)), {1: (4,), 2: (5,)}, stages, StageTrace(-1, (0, 1, 2, 3, 4, 5, 6), (7,)))


@pytest.mark.parametrize(
    ("layer", "alive", "into", "dropped"),
    [
        (-1, {0, 1, 2, 3, 4, 5, 6}, {}, {7: -1}),
        (0, {0, 1, 2, 3}, {4: (1,), 5: (2,)}, {7: -1, 6: 0}),
        (2, {0, 1, 2, 3}, {4: (1,), 5: (2,)}, {7: -1, 6: 0}),
        (3, {0, 1}, {4: (1,), 5: (0,), 2: (0,)}, {7: -1, 6: 0, 3: 3}),
        (5, {0}, {5: (0,), 2: (0,)}, {7: -1, 6: 0, 3: 3, 1: 5, 4: 5}),
        (99, {0}, {5: (0,), 2: (0,)}, {7: -1, 6: 0, 3: 3, 1: 5, 4: 5}),
    ],
)
def test_what_has_become_of_every_token(
    layer: int, alive: set[int], into: dict[int, tuple[int, ...]], dropped: dict[int, int]
) -> None:
    found = token_fates(story(), layer)
    assert (set(found.alive), found.into, found.dropped) == (alive, into, dropped)


def test_below_the_tower_there_is_nothing() -> None:
    with pytest.raises(ValueError, match="layer -2: give -1"):
        token_fates(story(), -2)


def test_a_token_of_several_groups_leaves_with_the_last_of_them() -> None:
    stages = (StageTrace(0, (0, 1, 3), ()), StageTrace(2, (1, 3), (0,)), StageTrace(4, (3,), (1,)))
    shared = SpanTrace(Span(0, 0, 4, (2, 2)), {0: (2, 3), 1: (2,)}, stages)
    # who is kept is alive, whatever else it was merged into
    assert token_fates(shared, 0).into == {2: (0, 1)} and 3 in token_fates(shared, 0).alive
    assert token_fates(shared, 2).into == {2: (1,)} and token_fates(shared, 4).dropped == {0: 2, 1: 4, 2: 4}


def test_tokens_that_sleep_come_back() -> None:
    stages = (StageTrace(0, (0, 1, 2), (3,)), StageTrace(2, (1,), (), {}, (0, 2)), StageTrace(4, (0, 2), (), {}, (1,)))
    trace = SpanTrace(Span(0, 0, 5, (1, 5)), {2: (4,)}, stages)
    for layer, awake, asleep in ((0, {0, 1, 2}, set()), (3, {1}, {0, 2}), (5, {0, 2}, {1})):
        found = token_fates(trace, layer)
        assert (found.alive, found.asleep, found.dropped) == (awake, asleep, {3: 0}) and found.into == {4: (2,)}
    assert [history(trace, 1, layer) for layer in (3, 5)] == ["Row 1, column 2 is alive", "Row 1, column 2 is asleep"]
    picture = Image.new("RGB", (50, 10), (200, 200, 200))
    panel = at_depth(picture, trace, 3, size=50)
    assert panel.note == "1 merged into 1 of them, 2 asleep, 1 dropped"
    awake, asleep, dropped = (panel.picture.getpixel((10 * token + 5, 5)) for token in (1, 0, 3))
    assert awake == (200, 200, 200) and asleep[2] > 1.5 * asleep[0] and max(dropped) < 60
    assert panel.picture.getpixel((25, 5)) == asleep  # the one that stands for two


def test_the_story_of_a_patch() -> None:
    told = {layer: [history(story(), token, layer) for token in range(8)] for layer in (0, 3, 5)}
    assert told[0][1] == "Row 1, column 2 is alive and stands for 1 others that were merged into it"
    assert told[0][4] == "Row 2, column 1 is merged into row 1, column 2 (group 1)"
    assert told[3][5] == "Row 2, column 2 is merged into row 1, column 1 (group 3)"
    assert told[5][4] == "Row 2, column 1 was dropped in front of layer 5"
    assert (told[5][6], told[5][7]) == (
        "Row 2, column 3 was dropped at the entry to the decoder",
        "Row 2, column 4 was dropped in the vision tower",
    )


# the others are slow tests
TELLING = ("apet", "contrast+duet", "duet", "duet_plus", "pyramiddrop", "sparsevlm", "tokencarve", "tome", "vscan")


REST = [pytest.param(name, marks=pytest.mark.slow) for name in sorted(duet_vlm.list_methods().keys() - set(TELLING))]


@pytest.mark.parametrize("name", [*TELLING, *REST])
def test_alive_is_what_the_layers_read(name: str, loaded: LoadedModel, shown: Uploads) -> None:
    """Counted by the report on the rows that the layers really had; and every token is in one of the three."""
    side = AppSide(loaded, ChosenMethod(name, 0.3, {}), shown, QUESTION)
    assert [one.error for one in list(answers([side], 1))[-1]] == [""]
    seen, read = side.seen(), side.handle.report().measured  # type: ignore[union-attr]
    for layer in range(seen.depth):
        found = token_fates(seen.traces[0], layer)
        assert len(found.alive) == read[layer]
        assert sorted([*found.alive, *found.into, *found.dropped]) == list(range(256))
        assert set(itertools.chain(*found.into.values())) <= found.alive
    side.close()


def centre(picture: Image.Image, token: int, columns: int) -> tuple[int, ...]:
    row, column = divmod(token, columns)
    return picture.getpixel((column * CELL + CELL - 4, row * CELL + CELL - 4))  # type: ignore[return-value]


def test_the_picture_at_each_depth() -> None:
    grey = Image.new("RGB", (80, 40), GREY)
    at = {layer: at_depth(grey, story(), layer, size=4 * CELL) for layer in (-1, 0, 4, 5)}
    assert at[-1].title == "in the vision tower: 7 of 8 alive" and at[-1].note == "1 dropped"
    assert [centre(at[-1].picture, t, 4) == GREY for t in range(8)] == [True] * 7 + [False]
    assert (
        at[0].title == "at the entry to the decoder: 4 of 8 alive"
        and at[0].note == "2 merged into 2 of them, 2 dropped, 1 of them here"
    )
    assert centre(at[0].picture, 0, 4) == centre(at[0].picture, 3, 4) == GREY
    assert centre(at[0].picture, 6, 4) == centre(at[0].picture, 7, 4) == DARK
    # outlines of 1 and 2
    assert at[0].picture.getpixel((CELL, 0)) == group(0) and at[0].picture.getpixel((2 * CELL, 0)) == group(1)
    first, second = (np.array(centre(at[0].picture, t, 4)) for t in (4, 5))
    assert np.abs(first - group(0)).sum() < np.abs(np.array(GREY) - group(0)).sum() and (first != second).any()
    # 0 stands for 2 and 5 now
    assert at[4].title == "at layer 4: 2 of 8 alive" and at[4].picture.getpixel((0, 0)) == group(2)
    assert [centre(at[5].picture, t, 4) == DARK for t in range(8)] == [
        False,
        True,
        False,
        True,
        True,
        False,
        True,
        True,
    ]


def test_the_scores_are_those_of_the_last_decision() -> None:
    grey, scores = Image.new("RGB", (80, 40), GREY), [{0: 1.0, 6: 0.0}, None, {0: 1.0, 1: 0.0}]
    shown_at = [at_depth(grey, story(), layer, scores, size=4 * CELL).scores for layer in (-1, 0, 2, 3, 5, 7)]
    assert [picture is not None for picture in shown_at] == [False, True, True, False, True, True]
    assert shown_at[1] is not None and shown_at[4] is not None
    assert centre(shown_at[1], 1, 4) == DARK != centre(shown_at[4], 1, 4)


def test_at_the_entry_it_is_the_picture_of_viz() -> None:
    """The same patches are clear, tinted and dark as in the panel that ``draw`` makes of the first stage."""
    picture = Image.effect_noise((80, 40), 40).convert("RGB")
    one = SpanTrace(story().span, story().merged, story().stages[:1])
    sheet, entry = (
        np.asarray(draw(picture, one, size=4 * CELL)),
        np.asarray(at_depth(picture, one, 0, size=4 * CELL).picture),
    )
    found = np.lib.stride_tricks.sliding_window_view(sheet, entry.shape)[:, :, 0]
    assert any((window == entry).all() for row in found for window in row)


def test_the_first_depth_at_which_something_is_gone() -> None:
    grey = Image.new("RGB", (80, 40), GREY)
    span, entry = Span(0, 0, 8, (2, 4)), StageTrace(0, tuple(range(8)), ())
    late = SpanTrace(span, {}, (entry, StageTrace(3, (0, 1), (2, 3, 4, 5, 6, 7))))
    merged = SpanTrace(span, {}, (entry, StageTrace(5, tuple(range(7)), (), {0: (7,)})))
    never = SpanTrace(span, {}, (entry,))
    of = {"story": [story()], "late": [late], "merged": [merged], "never": [never], "two": [late, merged]}
    strips = {name: tuple(DepthStrip(grey, trace, []) for trace in traces) for name, traces in of.items()}
    found = {name: DepthView(each, 12).first_loss for name, each in strips.items()}
    assert found == {"story": 0, "late": 3, "merged": 5, "never": 0, "two": 3}


def clip_walk(apart: bool) -> DepthView:
    """Six steps of 2 x 2 tokens, of which the first in each stays: as one span, or a span for each step."""
    frames = [Image.new("RGB", (16, 16), (40 * step, 0, 0)) for step in range(6)]
    if apart:
        trace = SpanTrace(Span(0, 0, 4, (2, 2)), {}, (StageTrace(0, (0,), (1, 2, 3)),))
        return DepthView(tuple(DepthStrip(frame, trace, []) for frame in frames), 4)
    whole = Image.new("RGB", (16, 96))
    for step, frame in enumerate(frames):
        whole.paste(frame, (0, 16 * step))
    gone = tuple(token for token in range(24) if token % 4)
    return DepthView(
        (
            DepthStrip(
                whole, SpanTrace(Span(0, 0, 24, (12, 2)), {}, (StageTrace(0, tuple(range(0, 24, 4)), gone),)), [], 6
            ),
        ),
        4,
    )


@pytest.mark.parametrize("apart", [False, True])
def test_a_clip_is_laid_out_in_rows_of_four(apart: bool) -> None:
    way = clip_walk(apart)
    picture = way.at(0).patches
    assert picture.size == (4 * STEP, 2 * STEP)
    for step in range(6):
        left, top = step % 4 * STEP, step // 4 * STEP
        first, second = (np.array(picture.getpixel((left + STEP * part // 4, top + STEP // 4))) for part in (1, 3))
        clear = np.array((40 * step, 0, 0))
        assert (
            np.abs(first - clear).max() <= 3
            and np.abs(second - (clear * (1 - DROPPED) + np.array(SHADE) * DROPPED)).max() <= 3
        )
    assert "is alive" in way.story(1.1 / 4, 0.1, 0) and "was dropped" in way.story(1.9 / 4, 0.1, 0)
    assert "is alive" in way.story(1.1 / 4, 0.6, 0) and way.story(3.5 / 4, 0.9, 0) == ""  # nothing lies there
    assert way.story(1.1 / 4, 0.6, 0) == (
        "Part 6: Row 1, column 1 is alive" if apart else "Step 6, row 1, column 1 is alive"
    )


def test_one_click_one_patch(loaded: LoadedModel, shown: Uploads) -> None:
    side = AppSide(loaded, ChosenMethod("duet", 0.22, {}), shown, QUESTION)
    list(answers([side], 1))
    way = depth_view(shown, side.inputs, loaded.processor, side.seen())
    kept = way.strips[0].trace.stages[0].kept
    for token in (0, 17, 255):
        said = way.story((token % 16 + 0.5) / 16, (token // 16 + 0.5) / 16, 0)
        assert said.startswith(f"Row {token // 16 + 1}, column {token % 16 + 1} ") and ("is alive" in said) == (
            token in kept
        )
    assert way.story(1.0, 1.0, 0).startswith("Row 16, column 16 ") and way.story(1.2, 0.5, 0) == ""
    side.close()


# ---- answers side by side


@pytest.fixture
def endless(loaded: LoadedModel) -> Iterator[None]:
    """Answers go on to their longest."""
    settings = loaded.model.generation_config
    settings.suppress_tokens = [settings.eos_token_id]
    yield
    settings.suppress_tokens = None


SIDES = (None, ChosenMethod("duet", 0.22, {}), ChosenMethod("contrast+fastv", 0.22, {"contrast_keep": 0.5}))


def test_answers_are_those_of_stock_generate(loaded: LoadedModel, shown: Uploads, endless: None) -> None:
    sides = [AppSide(loaded, asked, shown, QUESTION) for asked in SIDES]
    told = list(answers(sides, 6))[-1]
    model, processor = tiny.load()
    model.generation_config.suppress_tokens = [model.generation_config.eos_token_id]
    inputs = processor(images=Image.open(PICTURE), text=tiny.prompt(QUESTION), return_tensors="pt")
    for asked, said in zip(SIDES, told, strict=True):
        handle = None if asked is None else attach(model, asked.method, budget=asked.budget, **asked.settings)
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        if handle is not None:
            handle.detach()
        assert said.done and not said.error and said.tokens == len(out) == 6
        assert said.text == processor.decode(out, skip_special_tokens=True).strip()
    assert [said.name for said in told] == [FULL, "duet at 22 %", "contrast+fastv at 22 %"]
    for side in sides:
        side.close()


def test_each_side_begins_when_the_one_before_it_has_and_goes_on_when_all_have(
    loaded: LoadedModel, shown: Uploads
) -> None:
    told = list(answers([AppSide(loaded, asked, shown, QUESTION) for asked in SIDES], 8))
    for moment in told:
        started = [said.first is not None for said in moment]
        assert started == sorted(started, reverse=True)  # one after the other
        if not all(started):
            assert all(said.tokens <= 1 and not said.done for said in moment)
    assert all(said.done for said in told[-1]) and all(said.first > 0 for said in told[-1])  # type: ignore[operator]


def test_whoever_stops_looking_stops_the_answers(loaded: LoadedModel, shown: Uploads, endless: None) -> None:
    before = threading.active_count()
    going: Iterator[Any] = answers([AppSide(loaded, asked, shown, QUESTION) for asked in SIDES], 100_000)
    next(going)
    going.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_what_fails_on_one_side_is_said_there_and_the_others_go_on(loaded: LoadedModel, shown: Uploads) -> None:
    sides = [AppSide(loaded, asked, shown, QUESTION) for asked in SIDES]
    sides[1].inputs["attention_mask"] = torch.ones(1, 3)
    full, failed, other = list(answers(sides, 4))[-1]
    assert failed.error and "\n" not in failed.error and failed.first is None
    assert full.text == other.text == "cross" and not full.error + other.error


def test_nothing_is_left_on_the_model_and_no_weight_is_copied(loaded: LoadedModel, shown: Uploads) -> None:
    twin = same_weights(loaded.model)
    ours = dict(loaded.model.named_parameters()) | dict(loaded.model.named_buffers())
    assert all(tensor is ours[name] for name, tensor in (*twin.named_parameters(), *twin.named_buffers()))
    mine = {id(module) for module in loaded.model.modules()}
    assert not mine & {id(module) for module in twin.modules()}
    side = AppSide(loaded, SIDES[1], shown, QUESTION)
    list(answers([side], 2))
    side.seen()
    assert duet_vlm.handle_of(loaded.model) is None and duet_vlm.handle_of(side.model) is not None
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in loaded.model.modules())


def test_two_at_once_get_the_answers_that_they_get_alone(loaded: LoadedModel) -> None:
    """Two pictures, two methods, two threads, one model."""
    items = tiny.demo_images()[:2]
    pairs = zip(items, ("duet", "pyramiddrop"), strict=True)
    asked = [(Uploads((item.image,), ()), item.questions[0][0], ChosenMethod(name, 0.3, {})) for item, name in pairs]

    def ask(one: tuple[Uploads, str, ChosenMethod], out: list[Any]) -> None:
        for _ in range(2):
            sides = [AppSide(loaded, None, one[0], one[1]), AppSide(loaded, one[2], one[0], one[1])]
            texts = [said.text for said in list(answers(sides, 4))[-1]]
            out.append((texts, sides[1].seen().traces[0].stages[-1].kept))
            for side in sides:
                side.close()

    alone: list[list[Any]] = [[], []]
    both: list[list[Any]] = [[], []]
    for one, out in zip(asked, alone, strict=True):
        ask(one, out)
    threads = [threading.Thread(target=ask, args=pair) for pair in zip(asked, both, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert both == alone and len(both[0]) == len(both[1]) == 2


def test_salient_words_rank_for_those_who_ask_for_them(loaded: LoadedModel, shown: Uploads) -> None:
    sides = [
        AppSide(loaded, asked, shown, QUESTION)
        for asked in (None, ChosenMethod("duet", 0.22, {"options": {"text_query": "salient"}}), SIDES[1])
    ]
    assert [said.error for said in list(answers(sides, 2))[-1]] == ["", "", ""]
    assert sides[1].seen().scores[0][1]
    for side in sides:
        side.close()


@pytest.mark.parametrize("name", ["tiny-video", "tiny-long"])
def test_a_clip_from_its_file_to_the_slider(name: str, tmp_path: Path) -> None:
    pytest.importorskip("av")
    takes_clips = load(name)
    ((path, question),) = examples(takes_clips, tmp_path)
    clip = open_uploads(path, takes_clips)
    assert len(clip.preview) == takes_clips.frames
    side = AppSide(takes_clips, ChosenMethod("frames+duet", 0.3, {}), clip, question)
    assert not list(answers([side], 2))[-1][0].error
    seen = side.seen()
    way, (trace,) = depth_view(clip, side.inputs, takes_clips.processor, seen), seen.traces
    frames = takes_clips.frames
    each = trace.span.tokens // frames  # a CLS row in front of the square of every frame
    steps = int((each - 1) ** 0.5)
    assert way.at(0).patches.size == (4 * STEP, -(-frames // 4) * STEP)
    for step, row, column in ((0, 0, 0), (5, min(2, steps - 1), min(3, steps - 1)), (frames - 1, steps - 1, steps - 1)):
        token = step * each + 1 + row * steps + column
        said = way.story(
            (step % 4 + (column + 0.5) / steps) / 4, (step // 4 + (row + 0.5) / steps) / -(-frames // 4), 0
        )
        assert said.startswith(f"Step {step + 1}, row {row + 1}, column {column + 1} ") and ("is alive" in said) == (
            token in trace.stages[0].kept
        )
    ranked = next(number for number, stage in enumerate(seen.scores[0]) if stage)
    # the scores stand with their tokens
    assert len(way.strips[0].scores[ranked] or ()) == len(seen.scores[0][ranked] or ()) > 0
    assert way.at(trace.stages[ranked].layer).scores is not None
    side.close()


PARTS = "{% for part in messages[0]['content'] %}{{ part['text'] if part['type'] == 'text' else '@' }}{% endfor %}"


# whose template wants torchvision
@pytest.mark.parametrize("name", sorted(STOCK.keys() & FAMILIES.keys() - {"smolvlm"}))
def test_every_family_answers_and_shows_its_depth(name: str) -> None:
    """With its stock processor: from a picture to what each layer read."""
    processors = processor(name)
    processors.chat_template = PARTS.replace("@", STOCK[name].mark or STOCK[name].image)
    model = shared(name)
    asked = Uploads((picture("photo", 90, 70),), ())
    sides = [
        AppSide(LoadedModel(name, model, processors), each, asked, "what is this")
        for each in (None, ChosenMethod("duet", 0.5, {}))
    ]
    said = list(answers(sides, 3))[-1]
    assert [one.error for one in said] == ["", ""] and [one.tokens for one in said] == [3, 3]
    seen, read = sides[1].seen(), sides[1].handle.report().measured  # type: ignore[union-attr]
    assert [sum(len(token_fates(trace, layer).alive) for trace in seen.traces) for layer in range(seen.depth)] == list(
        read
    )
    if all(trace.span.grid for trace in seen.traces):
        step = depth_view(asked, sides[1].inputs, processors, seen).at(seen.depth - 1)
        assert (
            step.title == f"at layer {seen.depth - 1}: {read[-1]:.0f} of {seen.tokens} alive"
            and step.patches.width > 100
        )
    assert duet_vlm.handle_of(model) is None
    sides[1].close()


def test_tokens_without_a_grid_are_an_error_in_words(shown: Uploads) -> None:
    bare = SpanTrace(Span(0, 0, 7), {}, (StageTrace(0, (0,), (1, 2, 3, 4, 5, 6)),))
    way = depth_view(shown, {"pixel_values": torch.zeros(4, 8)}, None, RunRecord([bare], [[]], "", 1.0, 7, 4, 1.0))
    with pytest.raises(ValueError, match="the 7 tokens of this image form no grid"):
        way.at(0)
    with pytest.raises(ValueError, match="what was shown makes 2 spans"):
        depth_view(
            shown, {"pixel_values": torch.zeros(4, 8)}, None, RunRecord([bare, bare], [[], []], "", 1.0, 7, 4, 1.0)
        )


# ---- controls


@pytest.mark.parametrize(
    ("asked", "controls"),
    [
        (ChosenMethod("duet", 0.22, {}), Controls("duet", "0.22")),
        (ChosenMethod("duet", 64, {}), Controls("duet", "64")),
        (ChosenMethod("scope", None, {"keep": 30}), Controls("scope", settings="keep=30")),
        (
            ChosenMethod("contrast+duet", 0.11, {"contrast_keep": 0.5}),
            Controls("duet", "0.11", tower="contrast", tower_keep="0.5"),
        ),
        (
            ChosenMethod("frames+duet", 0.11, {"frames_keep": 0.4}),
            Controls("frames+duet", "0.11", settings="frames_keep=0.4"),
        ),
        (
            ChosenMethod("contrast", 0.3, {"options": {"proportional_attention": False}}),
            Controls("contrast", "0.3", settings="options.proportional_attention=False"),
        ),
        (
            ChosenMethod("duet", None, {"dominant": 40, "contextual": 8, "schedule": ((6, 0.5), (9, 0))}),
            Controls("duet", schedule="((6, 0.5), (9, 0))", settings="dominant=40\ncontextual=8"),
        ),
        (
            ChosenMethod(
                "contrast+duet",
                None,
                {"duet_schedule": ((6, 0.5),), "duet_dominant": 40, "options": {"text_query": "last"}},
            ),
            Controls(
                "duet", schedule="((6, 0.5),)", tower="contrast", settings="duet_dominant=40\noptions.text_query=last"
            ),
        ),
    ],
)
def test_controls_say_what_is_asked_and_the_other_way_round(asked: ChosenMethod, controls: Controls) -> None:
    assert Controls.of(asked.method, asked.budget, asked.settings) == controls
    assert controls.read() == asked


@pytest.mark.parametrize(
    ("controls", "words"),
    [
        (Controls(""), "no method is chosen"),
        (Controls("fastw", "0.2"), "unknown method 'fastw' (did you mean 'fastv'"),
        (Controls("fastv+duet", "0.2"), "at most one of each, in this order"),
        (Controls("duet", "lots"), "budget lots: give a token count (64), a fraction (0.22) or a percentage (22%)"),
        (Controls("duet", "1.5"), "budget 1.5: a fraction of the visual tokens is above 0 and up to 1.0"),
        (Controls("duet", "-3"), "budget -3: keep at least 1 token"),
        (Controls("duet", "220%"), "budget 220%: a fraction of the visual tokens is above 0 % and up to 100 %"),
        (Controls("duet", "nan"), "budget nan: a fraction of the visual tokens"),
        (Controls("scope", schedule="((6, .5),)"), "schedule ((6, .5),): scope has no schedule, leave it empty"),
        (Controls("duet", "0.2", tower_keep="0.5"), "choose a method in the tower as well"),
        (Controls("duet", "0.2", settings="dominant"), "setting dominant: write it as key=value, one to a line"),
    ],
)
def test_controls_that_cannot_be_are_named(controls: Controls, words: str) -> None:
    with pytest.raises(ValueError) as error:
        controls.read()
    assert words in sentence(error.value) and "\n" not in sentence(error.value)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            ChosenMethod("fastv", 0.01, {}),
            "fastv cannot reach 2.56 mean visual tokens per layer on a span of 256 tokens",
        ),
        (ChosenMethod("duet", 0.2, {"dominnant": 3}), "duet has no setting 'dominnant' (did you mean 'dominant'?)"),
        (ChosenMethod("duet", 0.2, {"options": {"text_query": "first"}}), "duet: "),
        (
            ChosenMethod("duet", None, {"schedule": ((60, 0.5),), "dominant": 40, "contextual": 8}),
            "duet: schedule drops before layer 60",
        ),
        (ChosenMethod("adsc", 0.2, {}), "adsc cannot reach"),
    ],
)
def test_what_the_model_cannot_run_is_said_with_the_method(
    asked: ChosenMethod, words: str, loaded: LoadedModel, shown: Uploads
) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        AppSide(loaded, asked, shown, QUESTION)
    assert sentence(error.value).startswith(words) and "\n" not in sentence(error.value)


@pytest.mark.parametrize(
    "method", ["d2pruner", "fitprune", "vqtoken", "quecc", "resampler", "visionzip+d2pruner", "resampler+fastv"]
)
@pytest.mark.parametrize("there", [True, False])
def test_visitors_name_no_files(method: str, there: bool, tmp_path: Path) -> None:
    """Not even to be told whether a file is there; whoever starts the page may name one, which visitors may then leave
    where it is."""
    names = [name for name in duet_vlm.make_method(method).settings() if name.endswith(("prior", "table", "weights"))]
    file = tmp_path / "some.json"
    if there:
        file.write_text("{}")
    for name in names:
        wanted = Controls(method, "", settings=f"{name}={file}")
        with pytest.raises(ValueError, match=f"setting {name}: the page opens no files"):
            wanted.read()
        with pytest.raises(ValueError, match=f"setting {name}: the page opens no files"):
            wanted.read({name: str(tmp_path / "other.json")})
        assert wanted.files == {name: str(file)} and wanted.read(wanted.files).settings == {name: str(file)}
        assert Controls(method, "", settings=f"{name}=None").read().settings == {name: None}
    assert names


@pytest.mark.slow
def test_every_setting_that_a_method_opens_is_known_to_be_a_file(tmp_path: Path, loaded: LoadedModel) -> None:
    """Python itself says what is opened when each text setting of each method is a path."""
    path = str(tmp_path / "opened.json")
    Path(path).write_text("{}")
    opened_, listening = set(), True

    def hear(event: str, words: tuple[Any, ...]) -> None:
        if listening and event == "open" and words[0] is not None and str(words[0]).startswith(path):
            opened_.add(setting)

    sys.addaudithook(hear)
    marked = set()
    for method, cls in duet_vlm.list_methods().items():
        for name, field in cls.__dataclass_fields__.items():
            marked |= {(method, name)} if field.metadata.get("file") else set()
            if "str" in str(field.type):
                setting = (method, name)
                with (
                    contextlib.suppress(ValueError, TypeError),
                    attach(same_weights(loaded.model), method, budget=64, **{name: path}),
                ):
                    pass
    listening = False
    assert (
        opened_
        and opened_ <= marked
        and {method for method, _ in marked} >= {"d2pruner", "fitprune", "quecc", "resampler", "vqtoken"}
    )


def test_the_page_opens_with_what_the_command_line_says() -> None:
    bare = type("Model", (), {"config": None})()
    assert starting(None, None, {}, bare) == Controls("duet", "0.22")
    assert starting("fastv", None, {"keep": 30}, bare) == Controls("fastv", "", settings="keep=30")
    assert starting(None, 64, {}, bare) == Controls("duet", "64")
    trained = type(
        "Model", (), {"config": type("Config", (), {"duet_vlm": {"method": "scope", "budget": 0.11, "settings": {}}})()}
    )()
    assert starting(None, None, {}, trained) == Controls("scope", "0.11")
    assert starting(None, 0.5, {}, trained) == Controls("scope", "0.5")
    preset = duet_vlm.preset("duet-64")
    assert (
        duet_vlm.get_method(starting(preset, None, {}, bare).read().method)(
            **starting(preset, None, {}, bare).read().settings
        )
        == preset
    )
    assert "contrast" in tower_methods() and "duet" not in tower_methods()


# ---- bad files, bad questions, bad command lines


def test_files_that_cannot_be_are_named_without_their_folder(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "clip.mp4").write_bytes(b"no clip")
    (tmp_path / "empty.jpg").touch()
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(200_000_000)  # takes no room on the disk
    expected = {
        "notes.png": "notes.png: not an image that can be read",
        "clip.mp4": "clip.mp4: tiny takes pictures only, drop one, or start the page with a model that takes clips",
        "empty.jpg": "empty.jpg: the file is empty",
        "large.png": f"large.png: 200 MB; at most {MOST_MB} MB are taken. Make it smaller first",
        "gone.png": "gone.png: no such file",
    }
    for name, words in expected.items():
        with pytest.raises(ValueError) as error:
            open_uploads(tmp_path / name, loaded)
        assert sentence(error.value, tmp_path / name) == words
    with pytest.raises(ValueError, match="nothing to look at: drop a picture or a clip first"):
        open_uploads(None, loaded)


def test_questions_that_cannot_be() -> None:
    assert check_question("  what ? ") == "what ?"
    for wrong in (None, "", "  \n"):
        with pytest.raises(ValueError, match="no question"):
            check_question(wrong)
    with pytest.raises(ValueError, match="the question has 5000 letters; at most 4000"):
        check_question("a" * 5000)


def test_a_question_with_the_word_for_a_picture(loaded: LoadedModel, shown: Uploads) -> None:
    with pytest.raises(ValueError) as error:
        AppSide(loaded, None, shown, "what is <image> ?")
    assert sentence(error.value).startswith("the question holds '<image>'")


def test_any_error_is_one_line() -> None:
    assert sentence(RuntimeError("CUDA out of memory. Tried to\nallocate 3 GiB")).startswith(
        "the model ran out of memory: take a smaller picture"
    )
    assert sentence(KeyError("a\nb")) == "unexpected KeyError: 'a\\nb'"
    assert sentence(ValueError()) == "ValueError"


def call(*words: Any) -> Any:
    result = CliRunner().invoke(app, ["app", *map(str, words)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    return result.stderr


def test_what_the_command_line_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert (
            f"--host 127.0.0.1 --port {port}: cannot listen there (Address already in use); choose another with --port"
            in call("--port", port)
        )
    assert "did you mean 'tiny-video'" in call("--model", "tiny-vidoe", "--port", port)
    assert "unknown method 'fastw' (did you mean 'fastv'" in call("--method", "fastw", "--port", port)
    assert "budget 1.5: a fraction of the visual tokens is above 0 and up to 1.0" in call(
        "--budget", "1.5", "--port", port
    )
    assert "--budget 0.2,0.3: give one" in call("--budget", "0.2,0.3", "--port", port)
    monkeypatch.setattr("duet_vlm.cli.app.find_spec", lambda name: None)
    assert 'the page needs Gradio: pip install ".[app]"' in call("--port", port)
    monkeypatch.setattr("duet_vlm.cli.app.find_spec", lambda name: name)
    # before the page opens
    assert "fastv cannot reach" in call("--method", "fastv", "--budget", "0.01", "--port", port)


def test_gradio_is_loaded_for_the_page_alone() -> None:
    files = sorted(
        path.stem for path in Path(duet_vlm.app.__file__).parent.glob("*.py") if path.stem not in ("page", "__init__")
    )
    code = f"import sys, importlib as i, duet_vlm.cli.main; [i.import_module('duet_vlm.app.' + name) for name in {files}]; "
    code += "print('gradio' in sys.modules)"
    assert (
        len(files) > 5
        and subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )
